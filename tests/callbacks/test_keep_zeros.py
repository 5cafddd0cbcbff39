"""KeepZeros: zeros stay, the rest trains as without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import KeepZeros, attach


def train(model: nn.Module, callbacks: list[KeepZeros], steps: int = 4) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(3)
    with attach(model, optimizer, callbacks, total_steps=steps):
        for _ in range(steps):
            model(torch.randn(8, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_zeros_stay_and_the_rest_moves() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    graph = top.capture(model, (torch.randn(8, 6),))
    top.PruneWeights(pattern="1:2")(graph)
    zero = {n: p == 0 for n, p in graph.named_parameters() if p.ndim == 2}
    before = {n: p.detach().clone() for n, p in graph.named_parameters()}
    keys = list(graph.state_dict())
    train(graph, [KeepZeros()])
    for name, parameter in graph.named_parameters():
        if name in zero:
            assert torch.equal(parameter == 0, zero[name])
            moved = (parameter != before[name])[~zero[name]]
            assert float(moved.float().mean()) > 0.5  # but for units that nothing reads any more
    assert list(graph.state_dict()) == keys


def test_without_it_the_zeros_grow_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight.data[:, :3] = 0
    train(model, [])
    assert int((model[0].weight == 0).sum()) == 0


def test_a_dense_model_is_refused_and_left_clean() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(top.ConfigError, match="no weight has a zero"):
        train(model, [KeepZeros()])
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
