"""Small models with channel groups, in float64, and the loops that train them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torchopt_passes.callbacks import attach
from torchopt_passes.graph.capture import CapturedModule, capture


class Deep(nn.Module):
    """Convolutions with batch norms, a residual branch, a linear: groups of 8, 12 and 10 units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn3 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.branch(x)))
        x = torch.relu(self.bn3(self.conv2(x))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


GROUPS = {"conv1.weight:0": 8, "conv2.weight:0": 12, "fc1.weight:0": 10}


class Normed(nn.Module):
    """A hidden layer under a layer norm, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.a(x.mean((2, 3)))))
        return self.c(torch.relu(self.b(hidden)))


class Blocks(nn.Module):
    """A group norm over four blocks of two channels: whole blocks may leave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.conv(x))).amax((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(2, 8, bias=False), nn.Linear(2, 8, bias=False), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.a(x.mean((2, 3)))) + torch.relu(self.b(x.amax((2, 3)))))


class Stubborn(nn.Module):
    """Its code holds a size that nobody can set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.a(x.mean((2, 3)))).view(-1, 8))


class Shifted(nn.Module):
    """A product of two activations in which channels with zero weights still count: softplus(0) is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 8), nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = nn.functional.softplus(self.a(x.mean((2, 3))))
        right = nn.functional.softplus(self.b(x.amax((2, 3))))
        return left @ right.T


def batch(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kind: type[nn.Module] = Deep, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double().train()


def graph_of(kind: type[nn.Module] = Deep, seed: int = 0) -> CapturedModule:
    return capture(make(kind, seed), (batch(),))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)


def step(model: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, number: int) -> None:
    x = batch(6, seed=number)
    nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(
    model: nn.Module,
    callbacks: Sequence[Any],
    *,
    steps: int = 8,
    stop: int | None = None,
    seen: Callable[[int], None] | None = None,
) -> torch.optim.Optimizer:
    """Train with momentum and weight decay; returns the optimizer."""
    optimizer = optimizer_of(model)
    with attach(model, optimizer, callbacks, total_steps=steps):
        for number in range(1, (stop or steps) + 1):
            step(model, optimizer, number)
            if seen is not None:
                seen(number)
    return optimizer


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
