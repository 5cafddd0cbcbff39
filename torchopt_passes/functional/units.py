"""From scores of indices to scores of the units of a group, which leave together.

The indices of one dimension of a tensor are rows of a matrix (`channel_rows`), which `functional.importance` scores.
Those that leave together make one score of the unit (`unit_scores`); the axes that a unit has in several tensors make
one of the group (`normalize`, then `aggregate`). NaN stands for a unit that an axis does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from torchopt_passes.errors import ConfigError

__all__ = ["Aggregation", "Normalization", "aggregate", "channel_rows", "normalize", "unit_scores"]

Aggregation = Literal["mean", "max", "product"]
"""How the axes of a group make one score."""

Normalization = Literal["none", "mean", "max"]
"""What the scores of one axis are divided by."""


def channel_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the matrix whose row i is all of a tensor that has index i in one dimension.

    Args:
        tensor: at least one dimension.
        dim: the dimension.

    Returns:
        (n, m): n the size of the dimension, m that of all others together.

    Example:
        >>> channel_rows(torch.tensor([[1, 2], [3, 4]]), 1)
        tensor([[1, 3],
                [2, 4]])
    """
    return tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1)


def unit_scores(
    scores: torch.Tensor, unit_of: npt.NDArray[np.int64] | torch.Tensor, size: int, p: float = 1.0
) -> torch.Tensor:
    """Return the score of each unit from those of the indices that leave with it: their p-norm, their sum for p = 1.

    Args:
        scores: (n,), of the indices. With p = 1 they may have any sign.
        unit_of: (n,) integers, the unit of each index; -1 where an index belongs to none.
        size: number of units.
        p: > 0, inf included; that of `lp_norm` makes it the norm of all the unit's weights.

    Returns:
        (size,); NaN for a unit without an index.

    Example:
        >>> unit_scores(torch.tensor([3.0, 4.0, 9.0, 1.0]), torch.tensor([0, 0, -1, 2]), 3, p=2.0)
        tensor([5., nan, 1.], dtype=torch.float64)
    """
    units = torch.as_tensor(unit_of, device=scores.device)
    inside = units >= 0
    units, scores = units[inside], _wide(scores)[inside]
    found = torch.zeros(size, dtype=torch.float64, device=scores.device)
    if p == 1.0:
        found.index_add_(0, units, scores)
    else:
        largest = found.scatter_reduce(0, units, scores.abs(), "amax")
        if math.isinf(p):
            found = largest
        else:
            # relative to the largest, so that no power over- or underflows
            scale = torch.where(largest > 0, largest, 1.0)
            found = scale * found.index_add(0, units, (scores.abs() / scale[units]) ** p) ** (1 / p)
    return torch.where(torch.bincount(units, minlength=size) > 0, found, torch.nan)


def normalize(scores: torch.Tensor, how: Normalization) -> torch.Tensor:
    """Return the scores of one axis, divided so that axes and groups can be ranked together.

    Args:
        scores: (size,), >= 0; NaN is left out.
        how: ``"mean"`` and ``"max"`` divide by the mean or the largest; scores that are all zero stay. ``"none"``
            leaves them.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0]), "mean")
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    if how not in ("none", "mean", "max"):
        raise ConfigError(f'normalize must be "none", "mean" or "max", not {how!r}')
    wide = _wide(scores)
    held = wide[~wide.isnan()]
    if how == "none" or not len(held):
        return wide
    divisor = held.mean() if how == "mean" else held.max()
    return wide / divisor if divisor > 0 else wide


def aggregate(axes: Sequence[torch.Tensor], how: Aggregation) -> torch.Tensor:
    """Return the score of each unit of a group from those that it has on the group's axes.

    Args:
        axes: at least one, each (size,), >= 0; NaN where an axis does not hold a unit: it does not count there.
        how: ``"mean"``, ``"max"``, or ``"product"``: the geometric mean, which ranks units as their product does and
            can be compared between groups with few axes and with many.

    Returns:
        (size,); NaN for a unit that no axis holds.

    Source:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", section 3.3 (importance of a whole group).

    Example:
        >>> aggregate([torch.tensor([1.0, 2.0]), torch.tensor([9.0, torch.nan])], "product").round(decimals=6)
        tensor([3., 2.], dtype=torch.float64)
    """
    stacked = torch.stack([_wide(scores) for scores in axes])
    if how == "mean":
        return stacked.nanmean(0)
    if how == "max":
        return torch.where(stacked.isnan().all(0), torch.nan, stacked.nan_to_num(nan=-1.0).amax(0))
    if how == "product":
        return stacked.log().nanmean(0).exp()
    raise ConfigError(f'aggregation must be "mean", "max" or "product", not {how!r}')


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64)
