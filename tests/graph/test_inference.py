"""The deployed graph is the eval graph without its loss, and the graph it was made of is untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from tests.models import ZOO, build
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.inference import leaf_names, named_outputs, to_inference


class Head(nn.Module):
    """A classifier with a loss, batch norm, dropout, and an output that only labels give."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, unused: torch.Tensor | None = None) -> dict[str, Any]:
        hidden = torch.relu_(self.bn(self.fc1(x)))
        logits = self.fc2(self.dropout(hidden))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits, "states": (hidden, x * 2)}


X, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def captured() -> tuple[Head, fx.GraphModule]:
    torch.manual_seed(0)
    head = Head()
    for _ in range(3):
        head(torch.randn(6, 4), LABELS)
    return head, capture(head, (X, LABELS))


def test_loss_and_labels_go() -> None:
    head, graph = captured()
    inference = to_inference(graph)
    assert inference.meta["input_names"] == ("x",)
    assert inference.meta["output_names"] == ("logits", "states_0", "states_1")
    assert "labels" in inference.meta["dropped_inputs"]
    assert inference.meta["dropped_outputs"] == ("loss",)
    want = head.eval()(X, LABELS)
    for got, expected in zip(inference(X), (want["logits"], *want["states"]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    ops = {str(node.target) for node in inference.graph.nodes}
    assert not [op for op in ops if "cross_entropy" in op or "log_softmax" in op or "add_" in op]


def test_the_graph_given_is_untouched() -> None:
    _, graph = captured()
    graph.train()
    code = graph.code
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    random = torch.random.get_rng_state()
    inference = to_inference(graph)
    inference(X)
    assert graph.training
    assert graph.code == code
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in graph.state_dict().items())
    graph.train()(X, LABELS)["loss"].backward()


def test_parameters_are_shared_not_copied() -> None:
    head, graph = captured()
    mine = dict(to_inference(graph).named_parameters())
    assert set(mine) == set(dict(head.named_parameters()))
    assert all(value is mine[name] for name, value in graph.named_parameters())


@pytest.mark.parametrize(
    ("outputs", "names"),
    [(["loss"], ("loss",)), (["states"], ("states_0", "states_1")), (["states_1"], ("states_1",))],
)
def test_outputs_are_chosen_by_name(outputs: list[str], names: tuple[str, ...]) -> None:
    _, graph = captured()
    inference = to_inference(graph, outputs)
    assert inference.meta["output_names"] == names
    if outputs == ["states_1"]:  # nothing of the network is left
        assert not list(inference.parameters())
    if outputs == ["loss"]:
        assert inference.meta["input_names"] == ("x", "labels")


def test_unknown_or_no_outputs_are_errors() -> None:
    _, graph = captured()
    with pytest.raises(ConfigError, match=r"no output \['logit'\]; the model has \['loss', 'logits', 'states_0'"):
        to_inference(graph, ["logit"])

    class OnlyLoss(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": x.sum()}

    with pytest.raises(ConfigError, match="nothing to deploy"):
        to_inference(torch.export.export(OnlyLoss(), (X,)).module())


def test_in_place_writes_that_matter_stay() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = x + 0
            kept[0].view(-1).add_(y.sum())  # through a view of a view, and its result is not used
            other = y + 0
            other.mul_(2)
            return kept, other

    graph = torch.export.export(Writes(), (X.clone(), X.clone()), strict=False).module()
    for names in (None, ["output_0"]):
        got = to_inference(graph, names)(X, LABELS * 1.0)
        torch.testing.assert_close(got[0], Writes()(X, LABELS * 1.0)[0])
    assert "mul_" not in to_inference(graph, ["output_0"]).code


class Trains(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Attends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), Attends()])
def test_a_graph_stuck_in_training_mode_is_refused(layer: nn.Module) -> None:
    x = X[None] if isinstance(layer, Attends) else X
    graph = torch.export.export(Trains(layer).train(), (x,), strict=False).module()
    with pytest.raises(ConfigError, match="is in training mode and the graph cannot be switched"):
        to_inference(graph)


def test_observers_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("observer", (x,)))
    root = nn.Module()
    root.observer = nn.Identity()
    with pytest.raises(ConfigError, match=r"observer \(Identity\).*ConvertQuantized"):
        to_inference(fx.GraphModule(root, graph))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_whole_zoo(name: str) -> None:
    model, args = build(name)
    inference = to_inference(capture(model, args).train())
    assert not inference.meta["dropped_inputs"]
    (got,) = inference(*args)
    torch.testing.assert_close(got, model.eval()(*args), rtol=0, atol=1e-6)


def test_names_of_leaves() -> None:
    tree = {"a": 1, "b": (2, {"c": 3}), "d": None}
    assert leaf_names(tree) == [("a", 1), ("b_0", 2), ("b_1_c", 3), ("d", None)]
    assert named_outputs((1, [2, 3])) == [("output_0", 1), ("output_1_0", 2), ("output_1_1", 3)]
