"""Slicing: indices leave a tensor in place, with its gradient, so that everyone who holds the tensor stays in step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from torchopt_passes.errors import PlanError

__all__ = ["Removal", "blocks_of", "cut_tensor", "slice_in_place"]


@dataclass(frozen=True)
class Removal:
    """What leaves one tensor.

    Args:
        shape: of the tensor before.
        indices: dimension -> the indices that leave it, ascending.

    Example:
        >>> removal = Removal((4, 3), {0: (1, 2)})
        >>> removal.new_shape, removal.kept(0), removal.kept(1)
        ((2, 3), [0, 3], [0, 1, 2])
    """

    shape: tuple[int, ...]
    indices: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])

    @property
    def new_shape(self) -> tuple[int, ...]:
        """The shape after."""
        return tuple(size - len(self.indices.get(dim, ())) for dim, size in enumerate(self.shape))

    def kept(self, dim: int) -> list[int]:
        """Return the indices of a dimension that stay, ascending."""
        gone = set(self.indices.get(dim, ()))
        return [index for index in range(self.shape[dim]) if index not in gone]


def cut_tensor(tensor: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Return a tensor without the indices that leave; contiguous, or in channels-last order where it was.

    Example:
        >>> cut_tensor(torch.arange(6).view(3, 2), Removal((3, 2), {0: (1,)}))
        tensor([[0, 1],
                [4, 5]])
    """
    result = tensor.detach()
    for dim in removal.indices:
        kept = torch.tensor(removal.kept(dim), dtype=torch.long, device=tensor.device)
        result = result.index_select(dim, kept)
    if tensor.layout is torch.strided and not tensor.is_contiguous():
        for form, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if tensor.ndim == ndim and tensor.is_contiguous(memory_format=form):
                return result.contiguous(memory_format=form)
    return result


def slice_in_place(tensor: torch.Tensor, removal: Removal) -> None:
    """Make a parameter or buffer smaller: the same object, with the values and the gradient that stay.

    Optimizers, tied modules and captured graphs that hold the object go on with it.

    Raises:
        PlanError: the tensor is of a kind that cannot be cut (a quantized weight, a sharded one).
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise PlanError(
            f"a {type(tensor).__name__} cannot be cut: remove channels first, quantize, shard or parametrize after"
        )
    gradient = tensor.grad
    data = cut_tensor(tensor.data, removal)
    tensor.grad = None
    if tensor.is_leaf and tensor.requires_grad:
        # a loss that is still alive keeps the node that accumulates into this parameter, and with it the old shape:
        # the next backward would fail. A change of dtype makes autograd forget the node.
        other = torch.float32 if tensor.dtype is torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    if gradient is not None:
        tensor.grad = cut_tensor(gradient, removal)


def blocks_of(kept: list[int], blocks: int, size: int) -> dict[int, tuple[int, ...]]:
    """Return what stays of an axis of equal blocks: block -> the places inside it that stay; empty blocks are left out.

    Args:
        kept: the indices that stay.
        blocks: number of equal blocks before, such as heads or groups.
        size: of the axis before.

    Raises:
        PlanError: the blocks do not divide the axis, or blocks that stay are left with unequal sizes.

    Example:
        >>> blocks_of([0, 2, 4, 6], 4, 8), blocks_of([2, 3, 6, 7], 4, 8)
        ({0: (0,), 1: (0,), 2: (0,), 3: (0,)}, {1: (0, 1), 3: (0, 1)})
    """
    if blocks < 1 or size % blocks:
        raise PlanError(f"an axis of {size} has no {blocks} equal blocks")
    width = size // blocks
    found: dict[int, list[int]] = {}
    for index in kept:
        found.setdefault(index // width, []).append(index % width)
    if len({len(places) for places in found.values()}) > 1:
        raise PlanError(f"the {blocks} blocks of an axis of {size} would be left with unequal sizes")
    return {block: tuple(places) for block, places in found.items()}
