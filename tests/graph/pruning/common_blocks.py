"""Blocks of random networks that work on images, tokens and vectors alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Apply, Block, Shape, channels, dim_of, moved
from tests.graph.pruning.norms import Keeping, Spanning

__all__ = ["FUNCTIONS", "Activation", "ChannelOrder", "Dropout", "LayerScale", "Reshape", "Span"]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "relu_": lambda x: F.relu(x + 0.1, inplace=True),
}


@dataclass(frozen=True)
class Activation(Block):
    """An element-wise function; ``prelu`` has a slope per channel; ``glu`` and ``swiglu`` halve the channels."""

    form: str = "relu"

    def make(self, shape: Shape) -> nn.Module | None:
        number, dim = channels(shape), dim_of(shape)
        if self.form == "prelu":
            return ChannelPReLU(number) if len(shape) == 2 else nn.PReLU(number)
        if self.form in ("glu", "swiglu"):
            if number % 2 or number < 4:
                return None
            if self.form == "glu":
                return nn.GLU(dim)

            def swiglu(x: torch.Tensor) -> torch.Tensor:
                gate, value = x.chunk(2, dim)
                return F.silu(gate) * value

            return Apply("swiglu", swiglu)
        return Apply(self.form, FUNCTIONS[self.form])


class ChannelPReLU(nn.PReLU):
    """PReLU with a slope per channel of the last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Dropout(Block):
    whole: bool = False

    def make(self, shape: Shape) -> nn.Module | None:
        return nn.Dropout2d(0.1) if self.whole and len(shape) == 3 else nn.Dropout(0.1)


@dataclass(frozen=True)
class Span(Block):
    """Something that every channel goes into: see `Spanning`."""

    form: str = "softmax"

    def make(self, shape: Shape) -> nn.Module | None:
        return moved(shape, Spanning(self.form, channels(shape)))


@dataclass(frozen=True)
class LayerScale(Block):
    """A parameter that is broadcast: per channel, with a leading dimension of size 1 or without."""

    leading: bool = False

    def make(self, shape: Shape) -> nn.Module | None:
        return Scale((1,) * self.leading + ((channels(shape), 1, 1) if len(shape) == 3 else (channels(shape),)))


class Scale(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


@dataclass(frozen=True)
class ChannelOrder(Block):
    """Channels in another order: by a constant buffer, reversed, rolled, or repeated."""

    form: Literal["index_select", "index", "flip", "roll", "repeat"] = "index_select"

    def make(self, shape: Shape) -> nn.Module | None:
        return _Order(self.form, dim_of(shape), channels(shape))


class _Order(nn.Module):
    order: torch.Tensor

    def __init__(self, form: str, dim: int, number: int) -> None:
        super().__init__()
        self.form, self.dim = form, dim
        if form.startswith("index"):
            self.register_buffer("order", torch.randperm(number, generator=torch.Generator().manual_seed(number)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "index_select":
            return x.index_select(self.dim, self.order)
        if self.form == "index":
            return x[:, self.order] if self.dim == 1 else x[:, :, self.order]
        if self.form == "repeat":
            return x.repeat_interleave(2, self.dim)
        return x.flip(self.dim) if self.form == "flip" else x.roll(1, self.dim)


@dataclass(frozen=True)
class Reshape(Block):
    """Channels are split in blocks x places, something is done there, and they are merged again."""

    form: Literal["shuffle", "scale_blocks", "scale_places", "max_blocks", "mean_blocks"] = "shuffle"
    blocks: int = 2

    def make(self, shape: Shape) -> nn.Module | None:
        blocks = gcd(self.blocks, channels(shape))
        if blocks in (1, channels(shape)):
            return None
        if self.form in ("max_blocks", "mean_blocks"):
            return _OverBlocks(self.form, dim_of(shape), blocks, len(shape))
        return _Reshape(self.form, dim_of(shape), blocks, shape)


class _Reshape(nn.Module):
    def __init__(self, form: str, dim: int, blocks: int, shape: Shape) -> None:
        super().__init__()
        self.form, self.dim, self.blocks = form, dim, blocks
        if form.startswith("scale"):
            both = (blocks, 1) if form == "scale_blocks" else (channels(shape) // blocks,)
            self.gamma = nn.Parameter(torch.ones(both + ((1, 1) if len(shape) == 3 else ())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim = self.dim
        y = x.unflatten(dim, (self.blocks, -1))
        y = y.transpose(dim, dim + 1) if self.form == "shuffle" else y * self.gamma
        return y.reshape(x.shape)


class _OverBlocks(Keeping):
    """The greatest of, or the mean over, blocks of the channels, each with a weight (it tells which blocks left)."""

    def __init__(self, form: str, dim: int, blocks: int, rank: int) -> None:
        super().__init__()
        self.form, self.dim, self.blocks = form, dim, blocks
        self.weight = nn.Parameter(torch.ones((blocks, 1) + ((1, 1) if rank == 3 else ())))

    def axis(self) -> tuple[torch.Tensor, int]:
        return self.weight, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(self.dim, (self.blocks, -1)) * self.weight
        if self.kept is not None:
            y = y.index_select(self.dim, self.kept)
        return y.amax(self.dim) if self.form == "max_blocks" else y.mean(self.dim)
