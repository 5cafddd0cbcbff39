"""Weights in parts on several ranks (FSDP2, tensor parallel): their masks are those of the whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from torchopt_passes.functional.layer_sparsities import layer_sparsities
from torchopt_passes.functional.mask_rules import MaskRule
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.ranks import sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "count_false",
    "is_sharded",
    "keep_largest_by_counts",
    "masks_by",
    "own_part",
    "part_of",
    "shard_group",
    "whole",
]


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor, of which a rank may hold a part."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all of its entries: gathered from the ranks, where each holds a part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def count_false(mask: torch.Tensor) -> int:
    """Return how many entries of a bool tensor are False, on all ranks together; of a mask, what it removes."""
    return mask.numel() - int(whole(mask.sum()))


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that every rank has whole, in parts as `like` is; without a message."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_group(tensor: torch.Tensor) -> Any | None:
    """Return the ranks over which the rows of a tensor are dealt out, each row on one; None for another layout."""
    if not is_sharded(tensor):
        return None
    places = [index for index, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(places) != 1 or not tensor.placements[places[0]].is_shard(0):
        return None
    return tensor.device_mesh.get_group(places[0])


def masks_by(
    rule: MaskRule,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    input_dims: Mapping[str, int | None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the masks that a rule makes of scores that may be in parts: those of the whole scores.

    Of weights in parts all together are ranked by counts; otherwise they are gathered, one at a time.

    Args:
        rule: scope and pattern.
        scores: as in `MaskRule.masks`.
        sparsity: likewise.
        input_dims: likewise.

    Returns:
        Masks, whole or in parts as their scores.
    """
    groups = [shard_group(score) for score in scores.values()]
    if rule.scope == "global" and rule.kind == "" and groups[0] is not None and set(groups) == {groups[0]}:
        return keep_largest_by_counts(scores, sparsity)
    if rule.scope == "global" or not any(map(is_sharded, scores.values())):
        return rule.masks({name: whole(score) for name, score in scores.items()}, sparsity, input_dims)
    shares = layer_sparsities(rule.scope, [score.shape for score in scores.values()], sparsity)
    one = MaskRule("tensor", rule.pattern)
    found: dict[str, torch.Tensor] = {}
    for (name, score), share in zip(scores.items(), shares, strict=True):
        mask = one.masks({name: whole(score)}, share, input_dims)[name]
        found[name] = part_of(mask, score)
    return found


@torch.no_grad()
def keep_largest_by_counts(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Return the masks that remove the lowest scores of all tensors together, without gathering any of them.

    The threshold is found by halving an interval of bit patterns, with one all-reduced count a step: 32 numbers for
    float32. The masks are those of `keep_largest_of_all` on the whole tensors, ties included.

    Args:
        scores: name -> DTensor, all with the same `shard_group`.
        sparsity: share of all scores to remove, in [0, 1].

    Returns:
        name -> bool DTensor, laid out as its scores.
    """
    group = shard_group(next(iter(scores.values())))
    keys = {name: _ordered(own_part(score)) for name, score in scores.items()}
    removed = removed_count(sparsity, sum(score.numel() for score in scores.values()))
    kept = {name: torch.ones_like(key, dtype=torch.bool) for name, key in keys.items()}
    if removed:
        threshold = _threshold(keys, removed, group)
        below = {name: key < threshold for name, key in keys.items()}
        left = removed - int(sum_over_ranks(_count(below), group))
        ties = {name: key == threshold for name, key in keys.items()}
        for name, before in _ties_before(ties, group).items():
            places = ties[name].flatten().nonzero().flatten()[: max(0, left - before)]
            kept[name] = ~below[name]
            kept[name].view(-1)[places] = False
    return {name: _laid_out(kept[name], score) for name, score in scores.items()}


def _laid_out(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Return integers in the order of the scores: a NaN highest, both zeros equal."""
    values = scores.detach().contiguous() + 0.0
    values = values if values.dtype is torch.float64 else values.float()
    bits = values.view(torch.int64 if values.dtype is torch.float64 else torch.int32)
    most = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ most, bits).masked_fill_(values.isnan(), most)


def _count(chosen: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([mask.sum() for mask in chosen.values()]).sum()


def _threshold(keys: Mapping[str, torch.Tensor], removed: int, group: Any) -> int:
    """Return the smallest key that at least `removed` keys of all ranks do not exceed."""
    limits = torch.iinfo(next(iter(keys.values())).dtype)
    low, high = limits.min, limits.max
    while low < high:
        middle = (low + high) // 2
        count = sum_over_ranks(_count({name: key <= middle for name, key in keys.items()}), group)
        low, high = (low, middle) if int(count) >= removed else (middle + 1, high)
    return low


def _ties_before(ties: Mapping[str, torch.Tensor], group: Any) -> dict[str, int]:
    """Return how many ties come before this rank's part of each tensor: tensor by tensor, rows in their order."""
    own = torch.stack([mask.sum() for mask in ties.values()])
    table = torch.zeros(torch.distributed.get_world_size(group), len(own), dtype=own.dtype, device=own.device)
    rank = torch.distributed.get_rank(group)
    table[rank] = own
    table = sum_over_ranks(table, group)
    tensors, earlier = table.sum(0).cumsum(0) - table.sum(0), table[:rank].sum(0)
    return dict(zip(ties, (tensors + earlier).tolist(), strict=True))
