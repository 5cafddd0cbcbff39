"""Blocks of random networks: what they share.

A block is a wish: `make` builds what of it fits the shape, or returns None. So every list of blocks is a network, and
hypothesis may drop or change any of them while it shrinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.norms import ChannelsLast

__all__ = [
    "Apply",
    "Block",
    "Shape",
    "chain",
    "channels",
    "dim_of",
    "fit",
    "moved",
    "shape_after",
    "with_channels",
]

Shape = tuple[int, ...]
"""Of one example: (C, H, W) of images, (T, C) of tokens, (C,) of vectors."""

MAX_CHANNELS, MAX_POSITIONS, MAX_FLAT = 24, 64, 256


@dataclass(frozen=True)
class Block:
    """A description of a part of a network."""

    def make(self, shape: Shape) -> nn.Module | None:
        """Build it for inputs (N, *shape); None where it does not fit."""
        raise NotImplementedError


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def channels(shape: Shape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def dim_of(shape: Shape) -> int:
    """Return the channel dimension of a batch."""
    return 2 if len(shape) == 2 else 1


def with_channels(shape: Shape, number: int) -> Shape:
    return (number, *shape[1:]) if len(shape) == 3 else (*shape[:-1], number)


def moved(shape: Shape, module: nn.Module) -> nn.Module:
    """Return a module on the last dimension as one on channels."""
    return ChannelsLast(module) if len(shape) == 3 else module


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return tuple(module.eval()(torch.zeros(2, *shape)).shape[1:])


def chain(blocks: tuple[Block, ...], shape: Shape, *, inside: bool = False) -> tuple[nn.Sequential, Shape]:
    """Build blocks one after the other; those that do not fit, or grow too large, are left out.

    Args:
        inside: leave out, too, what changes more than the number of channels.
    """
    modules: list[nn.Module] = []
    for block in blocks:
        module = block.make(shape)
        if module is None:
            continue
        after = shape_after(module, shape)
        positions, most = prod(after) // channels(after), MAX_FLAT if len(after) == 1 else MAX_CHANNELS
        if channels(after) > most or positions > MAX_POSITIONS:
            continue
        if inside and with_channels(after, channels(shape)) != shape:
            continue
        modules.append(module)
        shape = after
    return nn.Sequential(*modules), shape


def fit(form: Literal["linear", "pad"], before: Shape, after: Shape) -> nn.Module:
    """Return what changes the number of channels: a projection, or zeros around them (or a part of them)."""
    old, new = channels(before), channels(after)
    if old == new:
        return nn.Identity()
    if form == "linear":
        return nn.Conv2d(old, new, 1) if len(before) == 3 else nn.Linear(old, new)
    if new < old:
        return Apply(f"narrow to {new}", lambda x: x.narrow(dim_of(before), 1, new))
    front = (new - old) // 2
    pad = (0, 0) * (2 if len(before) == 3 else 0) + (front, new - old - front)
    return Apply(f"pad to {new}", lambda x: F.pad(x, pad))
