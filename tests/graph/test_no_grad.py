"""What runs under ``torch.no_grad`` is a part of the graph, and no gradient goes through it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchopt_passes as top


class Tracked(nn.Module):
    """Divides by a size that is no function of its own weights for the optimizer, and keeps a mean in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(x)
        with torch.no_grad():
            size, _ = (self.fc(hidden) * self.scale).abs().max(0)
            if self.training:
                self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
                self.calls.add_(1)
        return hidden / (size + 1) - self.mean


class Frozen(nn.Module):
    """A trained head on a part that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.body(x).mean((2, 3))
        return self.head(hidden)


class Reopened(nn.Module):
    """Gradients are on again for a part inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            first = self.one(x)
            with torch.enable_grad():
                second = self.two(first)
            third = self.three(second)
        return second * third


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Tracked, (3, 4)), (Frozen, (2, 3, 8, 8)), (Reopened, (3, 4))],
    ids=["buffers written", "frozen part", "on again inside"],
)
def test_outputs_gradients_and_buffers_are_those_of_the_source(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    source = make()
    graph = top.capture(copy.deepcopy(source), (torch.randn(shape),))
    for training in (True, False, True):
        x = torch.randn(shape, requires_grad=True)
        found: list[list[torch.Tensor | None]] = []
        for module in (source, graph):
            module.train(training)
            module.zero_grad()
            x.grad = None
            output = module(x)
            output.square().sum().backward()
            gradients = dict(module.named_parameters())
            found.append([output, x.grad, *(gradients[name].grad for name, _ in source.named_parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        for name, value in source.named_buffers():
            torch.testing.assert_close(graph.get_buffer(name), value, rtol=0, atol=1e-6)
            assert not graph.get_buffer(name).requires_grad
    assert any(parameter.grad is None for parameter in graph.parameters())


def test_weights_of_a_frozen_part_are_seen() -> None:
    graph = top.capture(Frozen().eval(), (torch.randn(2, 3, 8, 8),))
    plan = top.InsertFakeQuant(target="onnx", qat=False)(graph).plan
    assert {"body.0.weight", "body.3.weight", "head.weight"} <= {edit.target for edit in plan.edits}
    smaller = top.capture(Frozen().eval(), (torch.randn(2, 3, 8, 8),))
    top.PruneChannels(ratio=0.5)(smaller)
    assert smaller.get_parameter("body.3.weight").shape == (4, 4, 3, 3)
