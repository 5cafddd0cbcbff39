"""The battery: every registered pass goes through every check, on every model of its case."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import torchopt_passes as top
from tests.graph.cases import CASES
from tests.models import NoMatch, build
from torchopt_passes.graph.snapshot import Snapshot

RUNS = [(name, model) for name, case in CASES.items() for model in case.models]
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_every_registered_pass_has_a_case() -> None:
    assert set(top.pass_types()) == {name.partition(":")[0] for name in CASES}


@pytest.fixture(params=RUNS, ids=lambda r: f"{r[0]}-{r[1]}")
def run(request: pytest.FixtureRequest):
    name, model = request.param
    case = CASES[name]
    graph_module, context = case.start(model)
    return case, model, graph_module, context


def test_plan_touches_nothing_and_apply_equals_plan(run) -> None:
    case, _, graph_module, context = run
    pass_ = case.make()
    snapshot, before = Snapshot(graph_module), values(graph_module)
    training = graph_module.training
    plan = pass_.plan(graph_module, context)
    assert plan.edits, "the case has nothing to do on its model"
    assert snapshot.changes() == [] and same(values(graph_module), before) and graph_module.training == training
    by_plan = plan.apply(copy.deepcopy(graph_module))
    result = pass_(graph_module, context)
    assert result.graph_module is graph_module and result.modified and snapshot.changes()
    assert result.plan.edits == plan.edits
    assert same(values(by_plan), values(graph_module))
    assert by_plan.graph.python_code("self").src == graph_module.graph.python_code("self").src


def test_plan_json_round_trip_applies_to_a_fresh_source(run, tmp_path: Path) -> None:
    case, model, graph_module, context = run
    plan = case.make().plan(graph_module, context)
    loaded = top.Plan.load(plan.save(tmp_path))
    assert loaded == plan
    assert top.Plan.from_json(plan.to_json(), plan.tensors()) == plan
    fresh, inputs = build(model)
    on_source = all(edit.on_source for edit in plan.edits) and not case.before
    target = fresh if on_source else case.start(model)[0]
    loaded.apply(target)
    result = case.make()(graph_module, context)
    expected = values(result.graph_module)
    got = values(target)
    assert expected.keys() <= got.keys() and all(torch.equal(got[k], v) for k, v in expected.items())
    if on_source:
        with torch.no_grad():
            torch.testing.assert_close(fresh.eval()(*inputs), graph_module.eval()(*inputs), rtol=1e-5, atol=1e-6)


def test_second_run_finds_nothing_to_do(run) -> None:
    case, _, graph_module, context = run
    case.make()(graph_module, context)
    before = values(graph_module)
    second = case.make()(graph_module, context)
    assert not second.modified and not second.plan.edits and same(values(graph_module), before)
    assert "nothing" in str(second.report)


def test_everything_considered_is_in_the_report_with_a_reason(run) -> None:
    case, _, graph_module, context = run
    report = case.make()(graph_module, context).report
    assert report.changed and all(row.reason and row.target for row in report.rows)
    assert report.proof.status == "proven" and report.proof.error <= report.proof.tolerance


@pytest.mark.parametrize("name", CASES)
def test_no_match_changes_nothing_and_says_so(name: str) -> None:
    case = CASES[name]
    graph_module = top.capture(NoMatch(), (torch.randn(2, 3),))
    snapshot = Snapshot(graph_module)
    result = case.make()(graph_module, top.PassContext(calibration=[(torch.randn(2, 3),)]))
    assert not result.modified and not result.plan and snapshot.changes() == []
    assert "nothing changed" in str(result.report)


def test_failure_half_way_leaves_the_module_as_it_was(run, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _, graph_module, context = run
    pass_ = case.make()
    plan = pass_.plan(graph_module, context)
    kind = type(plan.edits[-1])
    original = kind.apply_all.__func__

    def half_way(cls, module, edits):
        original(cls, module, edits)  # everything is changed, then it breaks
        raise RuntimeError("half-way")

    monkeypatch.setattr(kind, "apply_all", classmethod(half_way))
    snapshot, before, identity = Snapshot(graph_module), values(graph_module), dict(graph_module.named_parameters())
    with pytest.raises(top.PassError, match="half-way"):
        pass_(graph_module, context)
    assert snapshot.changes() == [] and same(values(graph_module), before)
    assert all(p is identity[n] for n, p in graph_module.named_parameters())
    monkeypatch.undo()
    assert pass_(graph_module, context).modified


def test_failed_proof_is_rolled_back_and_names_a_node(run, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _, graph_module, context = run
    if isinstance(case.make(), top.Pipeline):
        pytest.skip("a pipeline's passes prove themselves")
    kind = type(case.make().plan(graph_module, context).edits[-1])
    original = kind.apply_all.__func__

    def wrong(cls, module, edits):
        original(cls, module, edits)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1.5)

    monkeypatch.setattr(kind, "apply_all", classmethod(wrong))
    snapshot = Snapshot(graph_module)
    if not any(p.is_floating_point() for p in graph_module.parameters()):
        pytest.skip("no float parameter left to break")
    with pytest.raises(top.ProofError, match=r"first node that differs|only the outputs differ"):
        case.make()(graph_module, context)
    assert snapshot.changes() == []


def test_skip_pattern_is_obeyed_and_a_dead_one_refused(run) -> None:
    case, _, graph_module, context = run
    everything = top.PassContext(calibration=context.calibration, skip=("*",))
    assert not case.make()(graph_module, everything).modified
    with pytest.raises(top.ConfigError, match="matches no"):
        case.make()(graph_module, top.PassContext(skip=("no.such.layer",)))


def test_identity_ties_frozen_and_buffers_survive(run) -> None:
    case, _, graph_module, context = run
    parameters = {n: (p, p.requires_grad) for n, p in graph_module.named_parameters(remove_duplicate=False)}
    case.make()(graph_module, context)
    now = dict(graph_module.named_parameters(remove_duplicate=False))
    for name, (parameter, trainable) in parameters.items():
        if name in now and case.keeps_objects:
            assert now[name] is parameter and parameter.requires_grad == trainable


def test_deepcopy_and_another_batch_size(run) -> None:
    case, model, graph_module, context = run
    from tests.models import OTHERS, ZOO

    case.make()(graph_module, context)
    twin = copy.deepcopy(graph_module).eval()
    inputs = (ZOO | OTHERS)[model][1](5)
    with torch.no_grad():
        out = graph_module.eval()(*inputs)
        torch.testing.assert_close(twin(*inputs), out, rtol=0, atol=0)
    assert out.shape[0] == 5
    assert graph_module.train() is graph_module


def test_torch_fx_pass_manager_runs_it(run) -> None:
    case, _, graph_module, context = run
    pass_ = case.make()
    result = PassManager(passes=[lambda gm: pass_(gm, context)])(graph_module)
    assert result.modified and isinstance(result.graph_module, fx.GraphModule)


@pytest.mark.parametrize("name", CASES)
def test_recipe_round_trip_and_bad_options(name: str) -> None:
    case = CASES[name]
    pass_ = case.make()
    assert top.make_pass(pass_.recipe()) == pass_
    for bad in case.bad:
        with pytest.raises(top.ConfigError):
            top.make_pass({name.partition(":")[0]: bad})
    with pytest.raises(top.ConfigError, match="capture"):
        pass_(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
