"""Sparse training whose pattern moves: some weights are dropped, as many grow elsewhere."""

from __future__ import annotations

import math

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["drop_and_grow", "drop_fraction"]


def drop_fraction(step: int, end: int, alpha: float) -> float:
    """Return the share of the active weights that is exchanged at an update: a cosine from alpha to 0.

    Args:
        step: completed optimizer steps, t.
        end: the step from which nothing is exchanged, T_end.
        alpha: the share at step 0, in [0, 1].

    Math:
        f(t) = alpha / 2 (1 + cos(pi t / T_end)).

    Source:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 (2).

    Example:
        >>> [round(drop_fraction(t, 100, 0.3), 6) for t in (0, 50, 100, 120)]
        [0.3, 0.15, 0.0, 0.0]
    """
    if step >= end:
        return 0.0
    return alpha / 2.0 * (1.0 + math.cos(math.pi * step / end))


def drop_and_grow(
    kept: torch.Tensor, growth: torch.Tensor, mask: torch.Tensor, fraction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask after an exchange of as many weights as are dropped.

    Args:
        kept: what ranks active weights, such as ``|w|``: the lowest are dropped.
        growth: what ranks the others, such as ``|g|`` or noise: the highest grow. Those dropped just now compete too.
        mask: bool, True for active weights; all three have one shape.
        fraction: share of the active weights to drop, in [0, 1]; of n active ones floor(fraction * n) go.

    Returns:
        ``(mask, grown)``: the new mask, with as many active weights as before, and what became active by it. Weights
        that were dropped and grew again are not among the grown: they keep their value. Of equal scores the one that
        comes first in memory is dropped, or grows, first.

    Raises:
        ConfigError: a fraction that is none.

    Source:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1; what is dropped and grows
        again keeps its value in the authors' code (sparse_optimizers_base.py, reinit_when_same=False).

    Example:
        >>> mask = torch.tensor([True, True, False, False])
        >>> drop_and_grow(torch.tensor([3.0, 0.1, 0.0, 0.0]), torch.tensor([0.0, 0.2, 0.1, 0.9]), mask, 0.5)
        (tensor([ True, False, False,  True]), tensor([False, False, False,  True]))
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"the share to drop must be in [0, 1], not {fraction}")
    count = math.floor(fraction * int(mask.sum()))
    flat = mask.flatten().clone()
    lowest = kept.detach().flatten().masked_fill(~flat, torch.inf).argsort(stable=True)
    flat[lowest[:count]] = False
    highest = growth.detach().flatten().masked_fill(flat, -torch.inf).argsort(descending=True, stable=True)
    flat[highest[:count]] = True
    new = flat.view(mask.shape)
    return new, new & ~mask
