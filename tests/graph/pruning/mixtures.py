"""Recurrent layers and mixtures of experts, on tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Block, Shape
from tests.graph.pruning.norms import Keeping

__all__ = ["Mixture", "Recurrent"]


@dataclass(frozen=True)
class Recurrent(Block):
    kind: Literal["lstm", "gru", "rnn"] = "lstm"
    hidden: int = 4
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        return _Recurrent(shape[1], self) if len(shape) == 2 else None


class _Recurrent(nn.Module):
    def __init__(self, width: int, wish: Recurrent) -> None:
        super().__init__()
        self.batch_first = wish.batch_first
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[wish.kind]
        self.rnn = kind(
            width,
            wish.hidden,
            wish.layers,
            batch_first=wish.batch_first,
            bidirectional=wish.bidirectional,
            dropout=0.1 if wish.layers > 1 else 0.0,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batch_first:
            return self.rnn(x)[0]
        return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)


@dataclass(frozen=True)
class Mixture(Block):
    """A mixture of experts where every token goes to all, weighted by a softmax."""

    experts: int = 3
    hidden: int = 4
    form: Literal["einsum", "bmm", "loop"] = "einsum"

    def make(self, shape: Shape) -> nn.Module | None:
        return _Mixture(shape[1], self) if len(shape) == 2 else None


class _Mixture(Keeping):
    def __init__(self, width: int, wish: Mixture) -> None:
        super().__init__()
        self.form = wish.form
        self.router = nn.Linear(width, wish.experts)
        if wish.form == "loop":
            pairs = [(nn.Linear(width, wish.hidden), nn.Linear(wish.hidden, width)) for _ in range(wish.experts)]
            self.experts = nn.ModuleList(nn.Sequential(up, nn.ReLU(), down) for up, down in pairs)
        else:
            self.up = nn.Parameter(torch.empty(wish.experts, width, wish.hidden))
            self.down = nn.Parameter(torch.empty(wish.experts, wish.hidden, width))

    def axis(self) -> tuple[torch.Tensor, int]:
        return self.router.weight, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.router(x)
        if self.kept is None:
            share = share.softmax(-1)
        else:
            share = torch.zeros_like(share).index_copy(-1, self.kept, share[..., self.kept].softmax(-1))
        if self.form == "loop":
            outputs = [share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
            return torch.stack(outputs).sum(0)
        if self.form == "einsum":
            hidden = F.relu(torch.einsum("btc,ecf->btef", x, self.up))
            return torch.einsum("btec,bte->btc", torch.einsum("btef,efc->btec", hidden, self.down), share)
        n, t, c = x.shape
        every = x.reshape(1, n * t, c).expand(self.up.shape[0], n * t, c)
        outputs = torch.bmm(F.relu(torch.bmm(every, self.up)), self.down)
        return (outputs * share.reshape(n * t, -1).t().unsqueeze(-1)).sum(0).reshape(n, t, c)
