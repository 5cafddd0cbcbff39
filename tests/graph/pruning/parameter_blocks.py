"""Blocks with tied weights, and with parameters that the forward uses without a module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Block, Shape, channels

__all__ = ["DIRECT", "Direct", "TiedLinears"]


@dataclass(frozen=True)
class TiedLinears(Block):
    """Two linears with one weight: the same way round, or the second one transposed (an autoencoder)."""

    transposed: bool = False
    hidden: int = 8

    def make(self, shape: Shape) -> nn.Module | None:
        return None if len(shape) == 3 else _TiedLinears(channels(shape), self)


class _TiedLinears(nn.Module):
    def __init__(self, width: int, wish: TiedLinears) -> None:
        super().__init__()
        self.transposed = wish.transposed
        self.first = nn.Linear(width, wish.hidden if wish.transposed else width)
        if wish.transposed:
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.second = nn.Linear(width, width)
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        return y @ self.first.weight + self.bias if self.transposed else self.second(y)


DIRECT = ("matmul", "matmul_t", "einsum", "rows", "columns", "scaled", "sum", "cat", "low_rank")


@dataclass(frozen=True)
class Direct(Block):
    """Parameters that the forward computes with, not a module."""

    form: str = "matmul"
    out: int = 8

    def make(self, shape: Shape) -> nn.Module | None:
        return None if len(shape) == 3 else _Direct(self.form, channels(shape), self.out)


class _Direct(nn.Module):
    def __init__(self, form: str, width: int, out: int) -> None:
        super().__init__()
        self.form, self.width, self.out = form, width, out
        shape = {"matmul": (width, out), "rows": (out + 2, width), "columns": (out, width + 2)}.get(form, (out, width))
        self.weight = nn.Parameter(torch.empty(shape))
        if form in ("scaled", "sum", "cat"):
            self.other = nn.Parameter(torch.empty({"scaled": (out, 1), "cat": (2, width)}.get(form, shape)))
        if form == "low_rank":
            self.down, self.up = nn.Parameter(torch.empty(4, width)), nn.Parameter(torch.empty(out, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.form == "matmul":
            return x @ weight
        if self.form == "matmul_t":
            return x @ weight.t()
        if self.form == "einsum":
            return torch.einsum("...c,oc->...o", x, weight)
        if self.form == "rows":
            return F.linear(x, weight[: self.out])
        if self.form == "columns":
            return F.linear(x, weight[:, : self.width])
        if self.form == "low_rank":
            return F.linear(x, weight + self.up @ self.down)
        if self.form == "cat":
            return F.linear(x, torch.cat((weight, self.other)))
        return F.linear(x, weight * self.other if self.form == "scaled" else weight + self.other)
