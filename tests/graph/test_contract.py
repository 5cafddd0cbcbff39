"""Records, snapshots, the oracle and the base of passes, each against what it promises."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchopt_passes as top
from tests.models import build
from torchopt_passes.graph.record import Record, snake_case
from torchopt_passes.graph.snapshot import Snapshot
from torchopt_passes.graph.tensors import aliases, get_tensor, matching_pattern
from torchopt_passes.graph.verify import evaluate, in_eval_mode, relative_error, sqnr


class Options(Record):
    count: int
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


def test_a_record_is_its_options() -> None:
    options = Options(count=3, names=("x",))
    assert options == Options.from_dict({"count": 3, "names": ["x"]}) and hash(options) == hash(copy.copy(options))
    assert options != Options(count=4, names=("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.count = 4  # pyright: ignore
    with pytest.raises(TypeError):
        Options(3)  # pyright: ignore


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"count": "3"}, "count"),
        ({"count": 3.5}, "count"),
        ({"count": True}, "count"),
        ({"count": 3, "share": "x"}, "share"),
        ({"count": 3, "share": math.nan}, "NaN"),
        ({"count": 3, "mode": "c"}, "'a' or 'b'"),
        ({"count": 3, "names": "x"}, "names"),
        ({"count": 3, "names": [1]}, "names"),
        ({}, "missing"),
        ({"count": 3, "cuont": 1}, "unknown"),
    ],
)
def test_a_bad_option_is_named(bad: dict[str, object], says: str) -> None:
    with pytest.raises(top.ConfigError, match=says):
        Options.from_dict(bad)


def test_snake_case() -> None:
    names = {
        "PruneWeights": "prune_weights",
        "InsertFakeQuant": "insert_fake_quant",
        "FuseBatchNorm": "fuse_batch_norm",
    }
    assert {n: snake_case(n) for n in names} == names


def test_snapshot_sees_and_undoes_everything() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    snapshot = Snapshot(graph_module)
    code, parameter = graph_module.code, graph_module.get_parameter("fc.weight")
    before = parameter.detach().clone()
    assert snapshot.changes() == []
    with torch.no_grad():
        parameter[0, 0] += 1
    parameter.requires_grad_(False)
    graph_module.get_buffer("bn1.running_mean").add_(1)
    graph_module.get_submodule("fc").register_buffer("extra", torch.ones(1))
    relu = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.sigmoid.default
    graph_module.get_submodule("fc").register_parameter("bias", nn.Parameter(torch.zeros(9)))
    assert set(snapshot.changes()) == {"fc.weight", "fc.bias", "bn1.running_mean", "fc.extra (added)", "graph"}
    snapshot.restore()
    assert snapshot.changes() == [] and graph_module.code == code
    assert graph_module.get_parameter("fc.weight") is parameter and parameter.requires_grad
    assert torch.equal(parameter, before) and graph_module.get_parameter("fc.bias").shape == (5,)
    graph_module.get_buffer("bn1.running_mean").add_(1)
    snapshot.restore()  # twice
    assert snapshot.changes() == []


def test_snapshot_undoes_a_resized_parameter() -> None:
    model = nn.Linear(4, 4)
    snapshot, weight = Snapshot(model), model.weight
    before = weight.detach().clone()
    weight.data = weight.data[:2]
    model.out_features = 2
    snapshot.restore()
    assert model.weight is weight and torch.equal(weight, before) and model.out_features == 4


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.floats(1e-6, 1.0))
def test_relative_error_is_the_formula(values: list[float], shift: float) -> None:
    b = torch.tensor(values, dtype=torch.float64)
    a = b + shift
    expected = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
    assert relative_error((a,), (b,)) == pytest.approx(expected, rel=1e-12)
    assert relative_error((b,), (b,)) == 0.0


def test_relative_error_of_what_does_not_match() -> None:
    one = torch.ones(2)
    assert relative_error((one,), (one, one)) == math.inf
    assert relative_error(one, torch.ones(3)) == math.inf
    assert relative_error(torch.tensor([1]), torch.tensor([2])) == math.inf
    assert relative_error(torch.tensor([math.nan, 1]), torch.tensor([math.nan, 1])) == 0.0
    assert relative_error(torch.tensor([math.nan, 1]), torch.tensor([0.0, 1])) == math.inf
    assert relative_error({"a": 1}, {"a": 1}) == 0.0 and relative_error(3, 4) == math.inf


def test_sqnr_is_the_formula() -> None:
    a, b = torch.randn(50), torch.randn(50)
    assert sqnr(a, b) == pytest.approx(10 * math.log10(float(b.square().sum() / (a - b).square().sum())), abs=1e-4)
    assert sqnr(b, b) == math.inf


@pytest.mark.parametrize("name", ["conv_residual", "tied_twice", "attention"])
def test_evaluate_equals_the_source_in_float64_and_touches_nothing(name: str) -> None:
    model, inputs = build(name)
    graph_module = top.capture(model, inputs)
    graph_module.train()
    snapshot = Snapshot(graph_module)
    rng = torch.get_rng_state()
    (out,) = evaluate(graph_module, (inputs, {}))
    assert snapshot.changes() == [] and graph_module.training and torch.equal(torch.get_rng_state(), rng)
    reference = copy.deepcopy(model).double().eval()
    doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        assert relative_error(out, reference(*doubled)) < 1e-12


def test_in_eval_mode_restores_each_submodule() -> None:
    model, _ = build("conv_residual")
    model.train()
    model.get_submodule("bn1").eval()
    with in_eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert model.training and not model.get_submodule("bn1").training and model.get_submodule("bn2").training


def test_globs() -> None:
    assert matching_pattern("a.b.weight", ["a.*.weight"]) and matching_pattern("a.b.weight", ["a"])
    assert matching_pattern("a.b.weight", ["b", "a.c", "a.b.weigh"]) is None
    model, _ = build("tied_twice")
    assert aliases(model)["head.weight"] == "embed.weight"
    with pytest.raises(top.PlanError, match=r"close names.*block.weight"):
        get_tensor(model, "blok.weight")


@pytest.fixture
def own_passes():
    """Passes made here leave the registry again."""
    from torchopt_passes.graph import registry

    before = registry.pass_types()

    class NoPlan(top.GraphPass):
        def plan(self, graph_module, context=None):
            return None

    class Breaks(top.GraphPass):
        def plan(self, graph_module, context=None):
            raise KeyError("oops")

    class Late(top.GraphPass):
        """Plans nothing and yet changes the module once its snapshot is taken."""

        def plan(self, graph_module, context=None):
            return top.Plan()

        def _rewrite(self, graph_module, plan, context, snapshot):
            with torch.no_grad():
                next(graph_module.parameters()).add_(1)
            return super()._rewrite(graph_module, plan, context, snapshot)

    yield NoPlan, Breaks, Late
    registry._PASSES.clear()
    registry._PASSES.update(before)


def test_passes_that_break_the_contract_are_refused(own_passes) -> None:
    no_plan, breaks, late = own_passes
    model, inputs = build("attention")
    graph_module = top.capture(model, inputs)
    snapshot = Snapshot(graph_module)
    with pytest.raises(top.PassError, match="must return a Plan"):
        no_plan()(graph_module)
    with pytest.raises(top.PassError, match=r"planning failed.*oops"):
        breaks()(graph_module)
    with pytest.raises(top.PassError, match="though its plan is empty"):
        late()(graph_module)
    assert snapshot.changes() == []


def test_a_failure_while_proving_is_rolled_back_too(own_passes, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("attention")
    graph_module = top.capture(model, inputs)
    snapshot = Snapshot(graph_module)

    def fails(self, graph_module):
        raise RuntimeError("no memory")

    monkeypatch.setattr(top.PruneWeights, "proving", fails)
    with pytest.raises(top.PassError, match="no memory"):
        top.PruneWeights(sparsity=0.5)(graph_module)
    assert snapshot.changes() == []


def test_proof_can_be_switched_off_and_says_so() -> None:
    model, inputs = build("attention")
    graph_module = top.capture(model, inputs)
    proof = top.PruneWeights(sparsity=0.5)(graph_module, top.PassContext(prove=False)).report.proof
    assert (proof.status, proof.detail) == ("unproven", "switched off")


def test_on_copy_leaves_its_input() -> None:
    model, inputs = build("attention")
    graph_module = top.capture(model, inputs)
    snapshot = Snapshot(graph_module)
    result = top.on_copy(top.PruneWeights(sparsity=0.5))(graph_module)
    assert result.graph_module is not graph_module and result.modified and snapshot.changes() == []


def test_pipeline_is_all_or_nothing_and_nests(own_passes) -> None:
    model, inputs = build("attention")
    graph_module = top.capture(model, inputs)
    snapshot = Snapshot(graph_module)
    with pytest.raises(top.PassError):
        top.Pipeline(top.PruneWeights(sparsity=0.3), own_passes[1]())(graph_module)
    assert snapshot.changes() == []
    nested = top.Pipeline(top.PruneWeights(sparsity=0.3), top.Pipeline(top.PruneWeights(sparsity=0.6)))
    report = nested(graph_module).report
    assert [r.name for r in report.children] == ["prune_weights", "pipeline"] and report.proof.status == "proven"
    assert top.make_pass(nested.recipe()) == nested
    with pytest.raises(top.ConfigError, match="made of passes"):
        top.Pipeline("prune_weights")  # pyright: ignore
