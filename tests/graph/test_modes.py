"""Train and eval mode in one graph: arguments, structure, outputs and state that differ by mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.capture import CapturedModule, capture
from torchopt_passes.graph.inference import to_inference
from torchopt_passes.graph.modes import FROZEN, MODE_ARGS, ONLY, in_one_mode, select, set_mode
from torchopt_passes.graph.quantization import InsertFakeQuant, set_fake_quant, set_observers
from torchopt_passes.graph.verify import evaluate


class Forked(nn.Module):
    """Training alone keeps an average, drops whole samples in place, and returns an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.fc(x)
        if self.training:
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
            y = y * torch.rand(len(x), 1)
            y.relu_()
            return y, {"aux": self.aux(x)}
        return y - self.average


class EveryOp(nn.Module):
    """Each op that torch switches by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=0.3, eps=1e-2)
        self.drops = nn.Sequential(nn.Dropout(0.2), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.1), nn.RReLU())
        self.channels = nn.Dropout1d(0.25)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drops(self.norm(x))
        x = self.channels(x.unsqueeze(1)).repeat(1, 3, 1)
        p = 0.35 if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)
        return self.lstm(x)[0]


class InPlaceOnShared(nn.Module):
    """Training masks a value in place that eval mode reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.training:
            y.mul_(torch.rand(4) > 0.5)
        return y.sum(-1)


def both(model: nn.Module, x: torch.Tensor) -> tuple[CapturedModule, nn.Module]:
    source = copy.deepcopy(model)
    return capture(model, (x,)), source


def seeded(module: nn.Module, x: torch.Tensor, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return module(x)


@pytest.mark.parametrize("make", [Forked, EveryOp, InPlaceOnShared])
def test_both_modes_are_the_source_s(make: type[nn.Module]) -> None:
    x, other = torch.randn(6, 4 if make is not Forked else 3), torch.randn(5, 4 if make is not Forked else 3)
    graph, source = both(make(), x)
    for training in (True, False, True, False):
        graph.train(training)
        source.train(training)
        for inputs in (x, other):
            torch.testing.assert_close(seeded(graph, inputs), seeded(source, inputs), rtol=0, atol=0)
            for (name, ours), theirs in zip(graph.named_buffers(), source.buffers(), strict=True):
                assert torch.equal(ours, theirs), name


def test_eval_draws_no_random_numbers_and_train_does() -> None:
    x = torch.randn(6, 3)
    graph, _ = both(Forked(), x)
    state = torch.get_rng_state()
    graph.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)
    graph.train()(x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_outputs_that_differ_by_mode() -> None:
    x = torch.randn(6, 3)
    graph, _ = both(Forked(), x)
    trained = graph.train()(x)
    assert isinstance(trained, tuple)
    assert trained[1]["aux"].shape == (6, 2)
    assert isinstance(graph.eval()(x), torch.Tensor)
    twin = copy.deepcopy(graph)
    assert not twin.training
    assert torch.equal(twin(x), graph(x))
    assert isinstance(twin.train()(x), tuple)
    assert isinstance(graph(x), torch.Tensor), "the copy's mode is its own"


def test_every_op_is_switched_by_its_own_argument() -> None:
    graph, _ = both(EveryOp(), torch.randn(6, 4))
    found = {str(n.target): n.meta[MODE_ARGS] for n in graph.graph.nodes if MODE_ARGS in n.meta}
    assert found["aten.batch_norm.default"] == {5: (True, False)}
    assert found["aten.dropout.default"] == {2: (True, False)}
    assert list(found["aten.scaled_dot_product_attention.default"].values()) == [(0.35, 0.0)]
    assert {"aten.alpha_dropout.default", "aten.feature_alpha_dropout.default", "aten.rrelu.default"} <= found.keys()
    assert {"aten.feature_dropout.default", "aten.lstm.input"} <= found.keys()
    norm = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default)
    assert norm.args[6:8] == (0.3, 1e-2), "momentum and eps are the source's in both modes"
    graph.eval()
    assert norm.args[5:8] == (False, 0.3, 1e-2)


def test_frozen_nodes_stay_in_eval_mode() -> None:
    graph, _ = both(EveryOp(), torch.randn(6, 4))
    norm = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default)
    norm.meta[FROZEN] = True
    before = graph.get_buffer("norm.running_mean").clone()
    graph.train()(torch.randn(6, 4))
    assert norm.args[5] is False
    assert torch.equal(graph.get_buffer("norm.running_mean"), before)


def test_set_mode_tells_whether_it_changed_anything() -> None:
    graph, _ = both(EveryOp(), torch.randn(6, 4))
    graph.eval()
    assert not set_mode(graph.graph, False)
    assert set_mode(graph.graph, True)


def test_one_mode_s_graph_holds_nothing_of_the_other() -> None:
    graph, _ = both(Forked(), torch.randn(6, 3))
    assert {n.meta[ONLY] for n in graph.graph.nodes if ONLY in n.meta} == {"train", "eval", "pair"}
    before = [n.format_node() for n in graph.graph.nodes]
    train, evaluation = in_one_mode(graph.graph, True), in_one_mode(graph.graph, False)
    for one, other in ((train, "eval"), (evaluation, "train")):
        assert not [n for n in one.nodes if n.target is select or n.meta.get(ONLY) == other]
    assert not evaluation.find_nodes(op="call_function", target=torch.ops.aten.rand.default)
    assert [n.format_node() for n in graph.graph.nodes] == before
    plain = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    assert in_one_mode(plain.graph, True) is plain.graph


def test_proofs_and_inference_run_eval_mode_alone() -> None:
    x = torch.randn(6, 3)
    graph, source = both(Forked(), x)
    expected = source.eval()(x)
    assert torch.equal(evaluate(graph.train(), ((x,), {}), dtype=None)[0], expected)
    inference = to_inference(graph.train())
    assert torch.equal(inference(x)[0], expected)
    assert graph.training


def test_what_a_pass_puts_behind_a_node_of_training_alone_is_of_training_alone() -> None:
    """Fake quantizers of an auxiliary head, as GoogLeNet has one: in eval mode its statistics must not be taken."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux, self.norm, self.out = (
                nn.Linear(3, 3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> Any:
            x = self.fc(x)
            return (x, self.out(self.norm(self.aux(x)).relu())) if self.training else x

    x = torch.randn(6, 3)
    graph, source = both(Headed(), x)
    InsertFakeQuant(target="inductor")(graph)
    set_fake_quant(graph, False)
    set_observers(graph, False)
    before = copy.deepcopy(graph.state_dict())
    assert torch.equal(graph.eval()(x), source.eval()(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())
    found = seeded(graph.train(), x)
    assert all(torch.equal(a, b) for a, b in zip(found, seeded(source.train(), x), strict=True))
    assert not torch.equal(graph.state_dict()["norm.running_mean"], before["norm.running_mean"])


def test_modes_survive_a_rewrite() -> None:
    x = torch.randn(6, 4)
    graph, source = both(EveryOp(), x)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.dropout.default:
            with graph.graph.inserting_after(node):
                doubled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
            node.replace_all_uses_with(doubled, delete_user_cb=lambda user, new=doubled: user is not new)
    graph.recompile()
    source.drops[0].register_forward_hook(lambda m, i, o: o * 2)
    for training in (False, True):
        expected = seeded(source.train(training), x)
        torch.testing.assert_close(seeded(graph.train(training), x), expected, rtol=0, atol=0)


def test_a_graph_that_would_be_wrong_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(CaptureError, match="does not compute what the model does"):
        capture(Counting(), (torch.ones(2, 3),))


def test_a_submodule_the_user_froze_starts_frozen() -> None:
    x = torch.randn(6, 4)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[0].eval()
    source = copy.deepcopy(model)
    graph = capture(model, (x,))
    assert torch.equal(graph(x), source(x))
    assert not graph.get_submodule("0").training
    assert not model[0].training
    evaluate(graph, ((x,), {}))
    assert torch.equal(graph(x), source(x)), "a proof leaves it so"
    assert torch.equal(graph.train()(x), source.train()(x)), "train() thaws it, as on the source"


def test_a_bound_forward_follows_the_mode() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), (torch.ones(3, 4),))
    bound = graph.train().forward  # what Accelerate keeps under mixed precision
    graph.eval()
    x = torch.ones(5, 4)
    assert torch.equal(bound(x), graph(x)) and torch.equal(bound(x), bound(x))
