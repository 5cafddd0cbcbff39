"""Keep-masks: which weights stay, by an exact count.

Every function returns bool tensors, True for a weight that is kept. Where a share is given, exactly
`removed_count(sparsity, n)` of the n candidates go, ranked by score; among equal scores the one that comes first in
memory goes first, so that the same weights give the same mask on every device and every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from torchopt_passes.errors import ConfigError

__all__ = [
    "expand_slices",
    "global_magnitude_masks",
    "keep_largest",
    "keep_largest_of_all",
    "magnitude_mask",
    "random_mask",
    "removed_count",
    "slice_mask",
    "sparsity_of",
    "threshold_mask",
    "zero_out",
]


def removed_count(sparsity: float, n: int) -> int:
    """Return how many of `n` candidates a share removes: floor(sparsity * n + 1/2), halves rounded up.

    Args:
        sparsity: share to remove, 0 <= sparsity <= 1.
        n: number of candidates.

    Raises:
        ConfigError: `sparsity` is outside [0, 1] or not a number.

    Example:
        >>> removed_count(0.5, 5), removed_count(0.8, 10)
        (3, 8)
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ConfigError(f"sparsity must be in [0, 1], not {sparsity}")
    return math.floor(sparsity * n + 0.5)


def keep_largest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the mask that removes the lowest scores.

    Args:
        scores: importance of each weight, any shape; a NaN ranks highest and is kept.
        sparsity: share to remove, 0 <= sparsity <= 1.

    Returns:
        bool, shape of `scores`.

    Example:
        >>> keep_largest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.25)
        tensor([ True, False,  True,  True])
    """
    removed = removed_count(sparsity, scores.numel())
    if removed == 0:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    flat = scores.detach().flatten()
    # selection, not sorting: a tenth of the time
    threshold = flat.kthvalue(removed).values
    highest = flat.isnan() if bool(threshold.isnan()) else None
    below, ties = (flat < threshold, flat == threshold) if highest is None else (~highest, highest)
    mask = ~below
    mask[ties.nonzero().flatten()[: removed - int(below.sum())]] = False
    return mask.view(scores.shape)


def magnitude_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the mask that removes the smallest ``|w|`` of one tensor.

    Args:
        weight: any shape.
        sparsity: share to remove, 0 <= sparsity <= 1.

    Returns:
        bool, shape of `weight`.

    Source:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.

    Example:
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 2.0, -0.2]), 0.5)
        tensor([False,  True,  True, False])
    """
    return keep_largest(weight.abs(), sparsity)


def global_magnitude_masks(weights: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks that remove the smallest ``|w|`` of all tensors ranked together.

    Args:
        weights: fqn -> tensor; equal magnitudes go in the order of the mapping.
        sparsity: share of all weights together to remove, 0 <= sparsity <= 1.

    Returns:
        fqn -> bool, shape and device of its weight.

    Example:
        >>> masks = global_magnitude_masks({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
        >>> masks["a"], masks["b"]
        (tensor([False, False]), tensor([True, True]))
    """
    return keep_largest_of_all({fqn: weight.detach().abs() for fqn, weight in weights.items()}, sparsity)


def keep_largest_of_all(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks that remove the lowest scores of all tensors ranked together.

    Args:
        scores: name -> importance; equal ones go in the order of the mapping.
        sparsity: share of all together to remove, 0 <= sparsity <= 1.

    Returns:
        name -> bool, shape and device of its scores.

    Example:
        >>> keep_largest_of_all({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 0.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    removed_count(sparsity, 0)
    if not scores:
        return {}
    device = next(iter(scores.values())).device
    flat = torch.cat([each.detach().flatten().to(device) for each in scores.values()])
    parts = keep_largest(flat, sparsity).split([each.numel() for each in scores.values()])
    return {
        name: part.view(each.shape).to(each.device, copy=True)
        for (name, each), part in zip(scores.items(), parts, strict=True)
    }


def random_mask(weight: torch.Tensor, sparsity: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return the mask that removes weights at random, whatever their values.

    Args:
        weight: any shape; only its shape and device count.
        sparsity: share to remove, 0 <= sparsity <= 1.
        generator: source of the choice; a CPU generator gives the same mask on every device.

    Returns:
        bool, shape of `weight`.

    Example:
        >>> mask = random_mask(torch.ones(2, 5), 0.3, torch.Generator().manual_seed(0))
        >>> int((~mask).sum())
        3
    """
    source = generator.device if generator is not None else torch.device("cpu")
    scores = torch.rand(weight.shape, generator=generator, device=source, dtype=torch.float64)
    return keep_largest(scores, sparsity).to(weight.device)


def slice_mask(weight: torch.Tensor, dim: int, sparsity: float, order: float) -> torch.Tensor:
    """Return the mask that removes the whole slices along a dimension with the smallest norms.

    Args:
        weight: any shape.
        dim: the dimension, from the end where negative.
        sparsity: share of the slices to remove, 0 <= sparsity <= 1.
        order: of the norm over all other dimensions: any number, inf or -inf.

    Returns:
        bool, shape of `weight`.

    Math:
        (sum_k |w_k|^p)^(1/p); the largest |w_k| for inf, the smallest for -inf, the number of non-zeros for 0.

    Source:
        Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1 (p = 1, filters).

    Example:
        >>> slice_mask(torch.tensor([[1.0, 4.0], [2.0, -5.0]]), 1, 0.5, 2.0)
        tensor([[False,  True],
                [False,  True]])
    """
    rows = weight.detach().movedim(dim, 0).reshape(weight.shape[dim], -1)
    norms = torch.linalg.vector_norm(rows, order, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return expand_slices(keep_largest(norms, sparsity), weight, dim)


def expand_slices(kept: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the mask of a weight that keeps whole slices along a dimension.

    Args:
        kept: bool, one for each index of that dimension.
        weight: any shape.
        dim: the dimension.

    Example:
        >>> expand_slices(torch.tensor([True, False]), torch.ones(2, 2), 0)
        tensor([[ True,  True],
                [False, False]])
    """
    shape = [1] * weight.ndim
    shape[dim] = -1
    return kept.view(shape).expand(weight.shape).clone()


def threshold_mask(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the mask that removes ``|w| <= threshold``.

    Args:
        weight: any shape.
        threshold: in the units of the weight, >= 0.

    Returns:
        bool, shape of `weight`.

    Example:
        >>> threshold_mask(torch.tensor([0.1, -0.5, 0.2]), 0.2)
        tensor([False,  True, False])
    """
    if not threshold >= 0:
        raise ConfigError(f"threshold must be >= 0, not {threshold}")
    # Not `abs() > threshold`: a NaN weight must not vanish silently.
    return ~(weight.detach().abs() <= threshold)


def sparsity_of(tensors: Iterable[torch.Tensor]) -> float:
    """Return the share of exact zeros in all tensors together, 0 for no weights at all.

    Example:
        >>> sparsity_of([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])])
        0.75
    """
    zeros = total = 0
    for tensor in tensors:
        total += tensor.numel()
        zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros / total if total else 0.0


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_out(weight: torch.Tensor, mask: torch.Tensor) -> None:
    """Set a weight to +0 in place where its mask is False, whatever it is: NaN, infinite, negative.

    As integers, bits times 1 or 0: `masked_fill_` branches for each entry, and is four times as slow on a CPU.

    Args:
        weight: floating point.
        mask: bool, of its shape; True for what is kept.

    Example:
        >>> weight = torch.tensor([1.0, -torch.inf, -2.0])
        >>> zero_out(weight, torch.tensor([True, False, False]))
        >>> weight
        tensor([1., 0., 0.])
    """
    integer = _INTEGERS.get(weight.element_size())
    if integer is None or not weight.is_floating_point():
        weight.masked_fill_(~mask, 0)
    else:
        weight.view(integer).mul_(mask)
