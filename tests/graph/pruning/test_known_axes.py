"""The analysis of a graph is made once for as long as the graph is what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.graph import axes
from torchopt_passes.graph.axes import analyse_axes


class Shuffled(nn.Module):
    """Reads its features in an order that stands in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)[:, self.order].relu())


@pytest.fixture
def graph() -> Any:
    torch.manual_seed(0)
    return top.capture(Shuffled(), (torch.randn(3, 4),))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    follow = axes._follow

    def counted(graph_module: Any) -> Any:
        found.append(graph_module)
        return follow(graph_module)

    monkeypatch.setattr(axes, "_follow", counted)
    return found


def test_a_pass_analyses_once(graph: Any, made: list[Any]) -> None:
    top.PruneChannels(ratio=0.5)(graph)
    assert len(made) == 1


def test_locked_outputs_of_one_question_are_free_in_the_next(graph: Any, made: list[Any]) -> None:
    locked = {group.name for group in top.find_channel_groups(graph) if group.locked}
    free = {group.name for group in top.find_channel_groups(graph, free_outputs=("*",)) if group.locked}
    assert locked - free == {"second.weight:0"}
    assert {group.name for group in top.find_channel_groups(graph) if group.locked} == locked
    assert len(made) == 1


def test_it_is_made_anew_when_the_graph_is_another(graph: Any, made: list[Any]) -> None:
    analyse_axes(graph)
    graph.get_buffer("order").copy_(torch.tensor([0, 1, 2, 3, 4, 5]))
    analyse_axes(graph)
    assert len(made) == 2
    relu = next(node for node in graph.graph.nodes if "relu" in str(node.target))
    relu.replace_all_uses_with(relu.args[0])
    analyse_axes(graph)
    assert len(made) == 3
    graph.get_submodule("second").weight = nn.Parameter(torch.randn(2, 6))  # the same shape: the same analysis
    analyse_axes(graph)
    assert len(made) == 3
    graph.meta["example_inputs"] = ((torch.randn(5, 4),), {})
    analyse_axes(graph)
    assert len(made) == 4


def test_a_removal_leaves_no_analysis_behind(graph: Any) -> None:
    twin = copy.deepcopy(graph)
    top.PruneChannels(ratio=0.5)(graph)
    assert axes._KNOWN not in graph.__dict__
    top.PruneChannels(ratio=0.5)(twin)
    assert torch.equal(graph.get_parameter("second.weight"), twin.get_parameter("second.weight"))
