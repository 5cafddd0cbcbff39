"""Blocks between images, tokens and vectors: patches, windows, flattening, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tests.graph.pruning.blocks import Apply, Block, Shape, chain, fit
from tests.graph.pruning.norms import LayerNorm

__all__ = ["AsTokens", "Flatten", "PatchMerging", "Patchify", "Pooled", "Windows"]


@dataclass(frozen=True)
class Flatten(Block):
    """Everything in one vector."""

    method: Literal["flatten", "view", "reshape"] = "flatten"

    def make(self, shape: Shape) -> nn.Module | None:
        if self.method == "flatten" or len(shape) == 1:
            return nn.Flatten()
        return Apply(self.method, lambda x: getattr(x.contiguous(), self.method)(x.shape[0], -1))


@dataclass(frozen=True)
class Pooled(Block):
    """One vector: the mean or maximum over positions, or the first token."""

    form: Literal["mean", "max", "first"] = "mean"

    def make(self, shape: Shape) -> nn.Module | None:
        if len(shape) == 1:
            return None
        dims = (2, 3) if len(shape) == 3 else (1,)
        if self.form == "first":
            return Apply("first", lambda x: x[:, :, 0, 0] if len(shape) == 3 else x[:, 0])
        return Apply(self.form, lambda x: x.mean(dims) if self.form == "mean" else x.amax(dims))


@dataclass(frozen=True)
class Patchify(Block):
    """Images to tokens: every position, patches of 2 x 2 by a convolution, or patches cut by a view."""

    form: Literal["positions", "conv", "view"] = "positions"
    width: int = 8

    def make(self, shape: Shape) -> nn.Module | None:
        if self.form == "positions":
            return Apply("positions", lambda x: x.flatten(2).transpose(1, 2))
        if min(shape[1:]) < 2 or shape[1] % 2 or shape[2] % 2:
            return None
        if self.form == "conv":
            return nn.Sequential(
                nn.Conv2d(shape[0], self.width, 2, 2), Apply("positions", lambda x: x.flatten(2).permute(0, 2, 1))
            )
        return nn.Sequential(Apply("patches", _patches), nn.Linear(4 * shape[0], self.width))


def _patches(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w // 4, 4 * c)


@dataclass(frozen=True)
class AsTokens(Block):
    """Images to tokens, blocks on these, and back to images."""

    inner: tuple[Block, ...] = ()

    def make(self, shape: Shape) -> nn.Module | None:
        inner, _ = chain(self.inner, (shape[1] * shape[2], shape[0]), inside=True)
        return _AsTokens(inner)


class _AsTokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        y = self.inner(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(n, -1, h, w)


@dataclass(frozen=True)
class Windows(Block):
    """Swin's windows of 2 x 2 (shifted or not), blocks on the tokens of each, and back."""

    inner: tuple[Block, ...] = ()
    shift: bool = False
    residual: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        if shape[1] % 2 or shape[2] % 2:
            return None
        inner, after = chain(self.inner, (4, shape[0]), inside=True)
        if self.residual:
            inner = nn.Sequential(inner, fit("linear", after, (4, shape[0])))
        return _Windows(inner, self)


class _Windows(nn.Module):
    def __init__(self, inner: nn.Module, wish: Windows) -> None:
        super().__init__()
        self.inner, self.shift, self.residual = inner, wish.shift, wish.residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1)
        if self.shift:
            y = torch.roll(y, (-1, -1), (1, 2))
        y = y.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.inner(y)
        y = y.reshape(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        if self.shift:
            y = torch.roll(y, (1, 1), (1, 2))
        y = y.permute(0, 3, 1, 2)
        return x + y if self.residual else y


@dataclass(frozen=True)
class PatchMerging(Block):
    """Swin's: four neighbours one after the other, a norm and a linear."""

    out: int = 8
    norm: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        if shape[1] % 2 or shape[2] % 2 or shape[0] > 16:
            return None
        return _PatchMerging(shape[0], self)


class _PatchMerging(nn.Module):
    def __init__(self, channels: int, wish: PatchMerging) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * channels) if wish.norm else nn.Identity()
        self.reduction = nn.Linear(4 * channels, wish.out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1))).permute(0, 3, 1, 2)
