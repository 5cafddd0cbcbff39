"""The guard finds the layer that was made fragile, undoes what was not needed, resumes, and says when it failed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

import torchopt_passes as top
from tests.search.models import bert, fragile
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers
from torchopt_passes.search.accuracy_guard import keep_accuracy
from torchopt_passes.search.mixed_precision import choose_bits
from torchopt_passes.search.sensitivity import Sensitivity, SensitivityRow, measure_sensitivity

Metric = Callable[[fx.GraphModule], float]


@torch.no_grad()
def agreement(graph_module: fx.GraphModule, context: top.PassContext) -> Metric:
    """Return a metric: 1 minus the relative error of the outputs."""
    batches = list(context.calibration or ())
    exact = [graph_module(batch) for batch in batches]

    @torch.no_grad()
    def metric(graph: fx.GraphModule) -> float:
        assert not graph.training
        errors = [float((graph(x) - y).norm() / y.norm()) for x, y in zip(batches, exact, strict=True)]
        return 1.0 - sum(errors) / len(errors)

    return metric


def table(costs: dict[str, float]) -> Sensitivity:
    """Return a table with made-up costs at 8 bits, ten times as much at 4."""
    rows = [
        SensitivityRow(layer=layer, weight_bits=bits, activation_bits=8, cost=cost * (10 if bits == 4 else 1))
        for layer, cost in costs.items()
        for bits in (4, 8)
    ]
    return Sensitivity(by="made up", rows=tuple(rows))


def test_finds_the_fragile_layer() -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)
    result = keep_accuracy(graph_module, metric, context, drop=0.05)
    assert result.met and result.float_metric == 1.0 and result.metric >= 0.95
    start, step = result.steps
    assert start.layer == "" and start.metric < 0.9 and not start.met
    assert (step.layer, step.before, step.after, step.kept) == ("layers.2.weight", "8 bits, inputs 8", "float", True)
    bits = {row.layer: (row.weight_bits, row.activation_bits) for row in result.choice.layers}
    assert bits == {f"layers.{i}.weight": (32, 32) if i == 2 else (8, 8) for i in range(4)}
    reasons = {row.layer: row.reason for row in result.choice.layers}
    assert reasons["layers.0.weight"] == "the metric allows it"
    assert reasons["layers.2.weight"].startswith("8 bits, inputs 8 -> float: the largest cost")
    prepared = copy.deepcopy(graph_module)
    result.choice.insert_fake_quant(qat=False)(prepared, context)
    Calibrate(method="minmax")(prepared, context)
    assert metric(prepared.eval()) == result.metric
    assert len(list(fake_quantizers(prepared))) == 6
    assert "accuracy kept" in str(result) and "layers.2.weight: 8 bits, inputs 8 -> float" in str(result)


def test_takes_back_what_a_wrong_order_backed_off() -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)
    wrong = table({"layers.0.weight": 4.0, "layers.1.weight": 3.0, "layers.2.weight": 2.0, "layers.3.weight": 1.0})
    result = keep_accuracy(graph_module, metric, context, drop=0.05, sensitivity=wrong)
    assert result.met
    floats = [row.layer for row in result.choice.layers if row.weight_bits == 32]
    assert floats == ["layers.2.weight"]
    tried = [(step.layer, step.after, step.kept) for step in result.steps[1:]]
    assert tried == [
        ("layers.0.weight", "float", True),
        ("layers.1.weight", "float", True),
        ("layers.2.weight", "float", True),
        ("layers.1.weight", "8 bits, inputs 8", True),
        ("layers.0.weight", "8 bits, inputs 8", True),
    ]
    reasons = {row.layer: row.reason for row in result.choice.layers}
    assert reasons["layers.2.weight"].startswith("8 bits, inputs 8 -> float")
    assert "back to 8 bits" in reasons["layers.0.weight"]


def test_what_cannot_be_taken_back_says_so() -> None:
    """Two fragile layers and one that is not: taking back is tried and refused."""
    graph_module, context = fragile()
    bad = {"layers.1.weight", "layers.2.weight"}

    def metric(graph: fx.GraphModule) -> float:
        rounded = {
            name.split("_weight")[0].removeprefix("fake_quant.").replace("_", ".") + ".weight"
            for name, q in fake_quantizers(graph)
            if q.exact
        }
        return 1.0 - 0.2 * len(bad & rounded)

    wrong = table({"layers.0.weight": 3.0, "layers.1.weight": 2.0, "layers.2.weight": 4.0, "layers.3.weight": 1.0})
    result = keep_accuracy(graph_module, metric, context, drop=0.1, sensitivity=wrong)
    assert [row.layer for row in result.choice.layers if row.weight_bits == 32] == sorted(bad)
    tried = [(step.layer, step.kept) for step in result.steps[4:]]
    assert tried == [("layers.0.weight", True), ("layers.2.weight", False)]
    assert "8 bits, inputs 8 again would give 0.8, below 0.9" in result.choice.layers[2].reason
    assert result.metric == 1.0


def test_first_to_8_bits_then_to_float() -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)
    order = table({f"layers.{i}.weight": 8.0 if i == 2 else 1.0 for i in range(4)})
    result = keep_accuracy(graph_module, metric, context, drop=0.3, start=4, sensitivity=order)
    assert result.met
    assert [(s.before, s.after) for s in result.steps if s.layer == "layers.2.weight"][:2] == [
        ("4 bits, inputs 8", "8 bits, inputs 8"),
        ("8 bits, inputs 8", "float"),
    ]


def test_starts_from_a_choice() -> None:
    graph_module, context = fragile()
    choice = choose_bits(graph_module, context, bits=(4, 8), size=0.29)
    metric = agreement(graph_module, context)
    result = keep_accuracy(graph_module, metric, context, drop=1.0, start=choice)
    assert result.met and len(result.steps) == 1
    same = [(row.layer, row.weight_bits) for row in choice.layers]
    assert [(row.layer, row.weight_bits) for row in result.choice.layers] == same
    other = top.PassContext(calibration=context.calibration, skip=("layers.0.*",))
    with pytest.raises(ConfigError, match="another graph or context"):
        keep_accuracy(graph_module, metric, other, start=choice)


def test_says_when_the_goal_is_not_met() -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)
    wrong = table({"layers.0.weight": 4.0, "layers.1.weight": 3.0, "layers.2.weight": 2.0, "layers.3.weight": 1.0})
    result = keep_accuracy(graph_module, metric, context, drop=0.05, sensitivity=wrong, max_evaluations=2)
    assert not result.met
    assert len(result.steps) == 2
    assert result.metric == max(step.metric for step in result.steps) < 0.95
    assert "NOT kept" in str(result)
    # a quantized graph that is no better in float than the goal: everything was tried
    result = keep_accuracy(graph_module, metric, context, drop=0.0, make_quantized=lambda _: _half(graph_module))
    assert not result.met and len(result.steps) == 5
    # no step was better than the first: everything keeps its 8 bits
    assert {row.weight_bits for row in result.choice.layers} == {8}
    assert {row.reason for row in result.choice.layers} == {"others have a larger cost"}


def _half(graph_module: fx.GraphModule) -> fx.GraphModule:
    other = copy.deepcopy(graph_module)
    with torch.no_grad():
        other.get_parameter("layers.0.weight").mul_(0.5)
    return other


def test_an_interrupted_run_goes_on_and_evaluates_nothing_twice(tmp_path: Path) -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)
    wrong = table({"layers.0.weight": 4.0, "layers.1.weight": 3.0, "layers.2.weight": 2.0, "layers.3.weight": 1.0})
    calls: list[float] = []
    stop_at = 4

    def counted(graph: fx.GraphModule) -> float:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(metric(graph))
        return calls[-1]

    whole = keep_accuracy(graph_module, metric, context, drop=0.05, sensitivity=wrong)
    file = tmp_path / "guard.json"
    with pytest.raises(KeyboardInterrupt):
        keep_accuracy(graph_module, counted, context, drop=0.05, sensitivity=wrong, state=file)
    assert len(json.loads(file.read_text())["measured"]) == 4
    stop_at = -1
    resumed = keep_accuracy(graph_module, counted, context, drop=0.05, sensitivity=wrong, state=file)
    assert resumed == whole
    assert len(calls) == 1 + len(whole.steps) == 7  # float, and each step once
    looser = keep_accuracy(graph_module, counted, context, drop=0.9, sensitivity=wrong, state=file)
    assert looser.met and len(looser.steps) == 1  # another goal, the same metrics
    with pytest.raises(ConfigError, match=r"another run \(start differ\)"):
        keep_accuracy(graph_module, counted, context, start=4, sensitivity=wrong, state=file)


def test_bert_keeps_its_logits(tmp_path: Path) -> None:
    graph_module, context = bert()
    batches = list(context.calibration or ())
    with torch.no_grad():
        exact = [graph_module(**batch).logits for batch in batches]

    @torch.no_grad()
    def metric(graph: fx.GraphModule) -> float:
        return -sum(float((graph(**b).logits - y).abs().mean()) for b, y in zip(batches, exact, strict=True))

    order = measure_sensitivity(graph_module, context, bits=(2, 8))
    everything = keep_accuracy(graph_module, metric, context, drop=9.0, start=2, sensitivity=order)
    assert everything.met and len(everything.steps) == 1
    assert {row.weight_bits for row in everything.choice.layers} == {2}
    drop = -everything.metric * 0.8
    result = keep_accuracy(graph_module, metric, context, drop=drop, start=2, sensitivity=order, max_evaluations=4)
    assert result.metric >= everything.metric
    assert result.met == (result.metric >= -drop)
    first = max(order.rows, key=lambda row: row.cost)
    assert result.steps[1].layer == first.layer


def test_converted_graphs_can_be_evaluated() -> None:
    graph_module, context = fragile()
    metric = agreement(graph_module, context)

    def make(insert: InsertFakeQuant) -> fx.GraphModule:
        other = copy.deepcopy(graph_module)
        for item in (insert, Calibrate(), ConvertQuantized()):
            item(other, context)
        return other

    result = keep_accuracy(graph_module, metric, context, drop=0.05, make_quantized=make)
    assert result.met
    assert [row.layer for row in result.choice.layers if row.weight_bits == 32] == ["layers.2.weight"]


def test_bad_options() -> None:
    graph_module, context = fragile()
    for options, match in (
        ({"drop": -0.1}, "drop must be"),
        ({"start": 9}, "must be 2 to 8"),
        ({"max_evaluations": 0}, "max_evaluations"),
    ):
        with pytest.raises(ConfigError, match=match):
            keep_accuracy(graph_module, lambda graph: 1.0, context, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="finite"):
        keep_accuracy(graph_module, lambda graph: float("nan"), context)
