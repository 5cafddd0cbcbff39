"""What several ranks of one training agree on: counts and ranges of all data, and that they hold the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from torchopt_passes.errors import CallbackError

__all__ = [
    "checksum",
    "max_over_ranks",
    "mean_over_ranks",
    "ranges_over_ranks",
    "refuse_differences",
    "sum_over_ranks",
    "world_size",
]

_BLOCK = 1 << 18
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


def world_size(group: Any = None) -> int:
    """Return how many ranks there are: 1 where ``torch.distributed`` is not in use.

    Args:
        group: a process group; None for all ranks.

    Example:
        >>> world_size()
        1
    """
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(value: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return the sum of a tensor over all ranks; every rank must call it.

    Args:
        value: any shape and dtype.
        group: see `world_size`.
    """
    return _reduced(value, distributed.ReduceOp.SUM, group) if world_size(group) > 1 else value


def max_over_ranks(value: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return the largest value of all ranks, by entry; every rank must call it.

    Args:
        value: any shape.
        group: see `world_size`.
    """
    return _reduced(value, distributed.ReduceOp.MAX, group) if world_size(group) > 1 else value


def ranges_over_ranks(low: torch.Tensor, high: torch.Tensor, group: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest `low` and the largest `high` of all ranks, by entry; every rank must call it.

    Args:
        low: any shape.
        high: likewise.
        group: see `world_size`.

    Example:
        >>> ranges_over_ranks(torch.tensor([0.0]), torch.tensor([2.0]))
        (tensor([0.]), tensor([2.]))
    """
    if world_size(group) == 1:
        return low, high
    both = torch.stack([low.detach(), -high.detach()])  # one message: max(h) = -min(-h)
    both = _reduced(both, distributed.ReduceOp.MIN, group)
    return both[0], -both[1]


def mean_over_ranks(metrics: Mapping[str, float], group: Any = None, *, weight: float = 1.0) -> dict[str, float]:
    """Return each metric's mean over the ranks that have it; every rank must call it.

    Args:
        metrics: name -> value on this rank.
        group: see `world_size`.
        weight: of this rank, >= 0: how much its values are means over. If it is 0 on all ranks, they are equal.

    Example:
        >>> mean_over_ranks({"kd_loss": 0.5})
        {'kd_loss': 0.5}
    """
    if world_size(group) == 1:
        return dict(metrics)
    gathered: list[Any] = [None] * world_size(group)
    distributed.all_gather_object(gathered, (dict(metrics), weight), group=group)
    if not any(share for _, share in gathered):
        gathered = [(each, 1.0) for each, _ in gathered]
    names = dict.fromkeys(name for each, _ in gathered for name in each)
    values = {name: [(each[name], share) for each, share in gathered if name in each] for name in names}
    totals = {name: sum(share for _, share in found) for name, found in values.items()}
    return {name: sum(v * share for v, share in found) / totals[name] for name, found in values.items() if totals[name]}


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number that depends on every bit of a tensor and on its place, the same on every device.

    Args:
        tensor: any shape and dtype.

    Returns:
        int64 scalar >= 0, on the device of `tensor`.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> int(checksum(mask)) == int(checksum(mask.clone())), int(checksum(mask)) == int(checksum(~mask))
        (True, False)
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    places = torch.arange(1, min(_BLOCK, flat.numel()) + 1, device=flat.device)
    weights = (places * _MIX) ^ (places << 17)  # int64 arithmetic wraps around
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in flat.split(_BLOCK):
        total = total * 1_000_003 + (block * weights[: len(block)]).sum()
    return total & ((1 << 62) - 1)


def refuse_differences(tensors: Mapping[str, torch.Tensor], what: str, group: Any = None) -> None:
    """Make sure that every rank holds the same tensors: one message of 16 bytes a tensor; every rank must call it.

    Args:
        tensors: name -> tensor; the same names on every rank.
        what: they are, for the error.
        group: see `world_size`.

    Raises:
        CallbackError: names the first tensor that differs.
    """
    if world_size(group) == 1 or not tensors:
        return
    device = next(iter(tensors.values())).device
    sums = torch.stack([checksum(tensor).to(device) for tensor in tensors.values()])
    lowest, highest = ranges_over_ranks(sums, sums, group)
    for name, differs in zip(tensors, (lowest != highest).tolist(), strict=True):
        if differs:
            raise CallbackError(
                f"{name}: {what} differs between the ranks, so that they train different models: give every rank the "
                "same weights, seed and options, and let DistributedDataParallel reduce every gradient"
            )


def _reduced(value: torch.Tensor, op: Any, group: Any) -> torch.Tensor:
    """Reduce a copy, on a device that the backend can send from, and return it on that of `value`."""
    message = value.detach().clone()
    if distributed.get_backend(group) == "nccl" and not message.is_cuda:
        message = message.cuda()
    distributed.all_reduce(message, op=op, group=group)
    return message.to(value.device)
