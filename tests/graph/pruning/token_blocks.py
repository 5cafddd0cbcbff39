"""Blocks of random networks on tokens (N, T, C); the linear ones work on vectors (N, C) too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Apply, Block, Shape, channels
from tests.graph.pruning.common_blocks import FUNCTIONS
from tests.graph.pruning.norms import Keeping, LayerNorm, ManualRMSNorm, RMSNorm

__all__ = [
    "MLP",
    "ClassToken",
    "Linear",
    "Positions",
    "TimeConv",
    "TimeShift",
    "TokenNorm",
]


@dataclass(frozen=True)
class Linear(Block):
    out: int = 8
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        return None if len(shape) == 3 else nn.Linear(channels(shape), self.out, bias=self.bias)


@dataclass(frozen=True)
class MLP(Block):
    """Linear, function, linear; gated: the first one's two halves, or two of them, are multiplied."""

    hidden: int = 8
    form: str = "gelu"
    gate: Literal["none", "packed", "two"] = "none"

    def make(self, shape: Shape) -> nn.Module | None:
        return None if len(shape) == 3 else _MLP(channels(shape), self)


class _MLP(nn.Module):
    def __init__(self, width: int, wish: MLP) -> None:
        super().__init__()
        self.function, self.gated = FUNCTIONS[wish.form], wish.gate
        self.up = nn.Linear(width, wish.hidden * (2 if wish.gate == "packed" else 1))
        self.gate = nn.Linear(width, wish.hidden, bias=False) if wish.gate == "two" else None
        self.down = nn.Linear(wish.hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        if self.gated == "packed":
            gate, value = up.chunk(2, -1)
            return self.down(self.function(gate) * value)
        if self.gate is not None:
            return self.down(self.function(self.gate(x)) * up)
        return self.down(self.function(up))


@dataclass(frozen=True)
class TokenNorm(Block):
    """A normalisation over channels (or a batch norm); ``plain`` has no weight and is followed by a linear."""

    form: Literal["layer", "rms", "manual_rms", "batch", "plain"] = "layer"
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        n = channels(shape)
        if len(shape) == 3:
            return None
        if self.form == "batch":
            return nn.BatchNorm1d(n) if len(shape) == 1 else _Transposed(nn.BatchNorm1d(n))
        if self.form == "layer":
            return LayerNorm(n, bias=self.bias)
        return {"rms": RMSNorm, "manual_rms": ManualRMSNorm, "plain": PlainNorm}[self.form](n)


class PlainNorm(Keeping):
    """A layer norm without weight, and the linear behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def axis(self) -> tuple[torch.Tensor, int]:
        return self.linear.weight, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            return self.linear(F.layer_norm(x, (x.shape[-1],)))
        y = F.layer_norm(x[..., self.kept], (len(self.kept),))
        return F.linear(y, self.linear.weight[:, self.kept], self.linear.bias)


class _Transposed(nn.Module):
    """A module on (N, C, T), for tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class _Mixed(_Transposed):
    """The residual keeps the tokens: some of them alone would change what is pooled over tokens later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


@dataclass(frozen=True)
class TimeConv(Block):
    """A convolution over time; depthwise or not."""

    out: int = 8
    depthwise: bool = False

    def make(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 2:
            return None
        groups = shape[1] if self.depthwise else 1
        return _Transposed(nn.Conv1d(shape[1], shape[1] if self.depthwise else self.out, 3, padding=1, groups=groups))


@dataclass(frozen=True)
class TimeShift(Block):
    """Tokens reversed, rolled, or mixed by two matrices of parameters beside a residual (MLP-Mixer)."""

    form: Literal["flip", "roll", "mix"] = "flip"

    def make(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 2:
            return None
        if self.form == "mix":
            hidden = 2 * shape[0]
            return _Mixed(nn.Sequential(nn.Linear(shape[0], hidden), nn.GELU(), nn.Linear(hidden, shape[0])))
        return Apply(self.form, (lambda x: x.flip(1)) if self.form == "flip" else (lambda x: x.roll(1, 1)))


@dataclass(frozen=True)
class ClassToken(Block):
    """A parameter expanded over the batch, before the tokens."""

    def make(self, shape: Shape) -> nn.Module | None:
        return _ClassToken(shape[1]) if len(shape) == 2 else None


class _ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)


@dataclass(frozen=True)
class Positions(Block):
    """A position embedding: a parameter, sines in a buffer, or an embedding of a range."""

    form: Literal["parameter", "sines", "embedding"] = "parameter"

    def make(self, shape: Shape) -> nn.Module | None:
        return _Positions(self.form, *shape) if len(shape) == 2 else None


class _Positions(nn.Module):
    sines: torch.Tensor

    def __init__(self, form: str, length: int, width: int) -> None:
        super().__init__()
        self.form = form
        if form == "parameter":
            self.table = nn.Parameter(torch.zeros(1, length, width))
        elif form == "embedding":
            self.embed = nn.Embedding(length, width)
        else:
            angles = torch.arange(length)[:, None] / 10.0 ** (torch.arange(width) / width)
            self.register_buffer("sines", torch.sin(angles + torch.arange(width) % 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "embedding":
            return x + self.embed(torch.arange(x.shape[1], device=x.device))
        return x + (self.table if self.form == "parameter" else self.sines)
