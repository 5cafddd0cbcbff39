"""Blocks that hold other blocks: sums, gates, concatenations, splits, modules called twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tests.graph.pruning.blocks import Block, Shape, chain, channels, dim_of, fit, with_channels

__all__ = ["Concat", "Gate", "Residual", "Split", "Twice"]

Blocks = tuple[Block, ...]
Fit = Literal["linear", "pad"]


@dataclass(frozen=True)
class Residual(Block):
    """x + inner(x); or their difference, or the sum of a stack of the two."""

    inner: Blocks
    form: Literal["add", "sub", "stack"] = "add"
    fit: Fit = "linear"
    fit_input: bool = False

    def make(self, shape: Shape) -> nn.Module | None:
        inner, after = chain(self.inner, shape, inside=True)
        if not len(inner):
            return None
        if self.fit_input:
            return _Residual(self.form, inner, fit(self.fit, shape, after))
        return _Residual(self.form, nn.Sequential(inner, fit(self.fit, after, shape)), nn.Identity())


class _Residual(nn.Module):
    def __init__(self, form: str, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.form, self.inner, self.shortcut = form, inner, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, x = self.inner(x), self.shortcut(x)
        if self.form == "stack":
            return torch.stack((x, y)).sum(0)
        return x + y if self.form == "add" else x - y


@dataclass(frozen=True)
class Gate(Block):
    """left(x) * sigmoid(right(x)), or the plain product."""

    left: Blocks
    right: Blocks
    sigmoid: bool = True
    fit: Fit = "linear"

    def make(self, shape: Shape) -> nn.Module | None:
        left, after = chain(self.left, shape, inside=True)
        right, other = chain(self.right, shape, inside=True)
        return _Gate(left, nn.Sequential(right, fit(self.fit, other, after)), self.sigmoid)


class _Gate(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module, sigmoid: bool) -> None:
        super().__init__()
        self.left, self.right, self.sigmoid = left, right, sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        right = self.right(x)
        return self.left(x) * (right.sigmoid() if self.sigmoid else right)


@dataclass(frozen=True)
class Concat(Block):
    """The branches' channels one after the other, those of the input before them (DenseNet) or not."""

    branches: tuple[Blocks, ...]
    keep_input: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        if not self.branches:
            return None
        return _Concat([chain(b, shape, inside=True)[0] for b in self.branches], self.keep_input, dim_of(shape))


class _Concat(nn.Module):
    def __init__(self, branches: list[nn.Module], keep_input: bool, dim: int) -> None:
        super().__init__()
        self.branches, self.keep_input, self.dim = nn.ModuleList(branches), keep_input, dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [branch(x) for branch in self.branches]
        return torch.cat([x, *parts] if self.keep_input else parts, self.dim)


@dataclass(frozen=True)
class Split(Block):
    """Channels in two parts, another branch on each, and back together."""

    first: Blocks
    second: Blocks
    form: Literal["chunk", "split", "slice", "narrow", "strided", "unbind", "index"] = "chunk"
    join: Literal["cat", "swap", "interleave", "stack", "add", "mul"] = "cat"
    fit: Fit = "linear"

    def make(self, shape: Shape) -> nn.Module | None:
        number = channels(shape)
        even = self.form in ("chunk", "unbind")
        if number < 2 or (even and number % 2):
            return None
        size = (number + 1) // 2 if even or self.form == "strided" else max(1, number // 3)
        first, after = chain(self.first, with_channels(shape, size), inside=True)
        second, other = chain(self.second, with_channels(shape, number - size), inside=True)
        if self.join not in ("cat", "swap"):
            second = nn.Sequential(second, fit(self.fit, other, after))
        return _Split(self, dim_of(shape), size, number, first, second)


class _Split(nn.Module):
    order: torch.Tensor

    def __init__(self, wish: Split, dim: int, size: int, number: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.form, self.join, self.dim, self.size, self.rest = wish.form, wish.join, dim, size, number - size
        self.first, self.second = first, second
        if self.form == "index":
            self.register_buffer("order", torch.randperm(number, generator=torch.Generator().manual_seed(number)))

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dim, size = self.dim, self.size
        if self.form == "chunk":
            return x.chunk(2, dim)
        if self.form == "split":
            return x.split([size, self.rest], dim)
        if self.form == "narrow":
            return x.narrow(dim, 0, size), x.narrow(dim, size, self.rest)
        if self.form == "unbind":
            return x.unflatten(dim, (2, size)).unbind(dim)
        if self.form == "index":
            return x.index_select(dim, self.order[:size]), x.index_select(dim, self.order[size:])
        if self.form == "strided":
            return (x[:, ::2], x[:, 1::2]) if dim == 1 else (x[..., ::2], x[..., 1::2])
        return (x[:, :size], x[:, size:]) if dim == 1 else (x[:, :, :size], x[:, :, size:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.parts(x)
        first, second = self.first(first), self.second(second)
        if self.join == "add":
            return first + second
        if self.join == "mul":
            return first * second
        if self.join in ("cat", "swap"):
            return torch.cat((first, second) if self.join == "cat" else (second, first), self.dim)
        stacked = torch.stack((first, second), self.dim + (self.join == "interleave"))
        return stacked.flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Twice(Block):
    """One module, called twice."""

    inner: Blocks
    fit: Fit = "linear"

    def make(self, shape: Shape) -> nn.Module | None:
        inner, after = chain(self.inner, shape, inside=True)
        return _Twice(nn.Sequential(inner, fit(self.fit, after, shape)))


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.inner(x)))
