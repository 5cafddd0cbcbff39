"""Each sensitivity against its formula, by an own way to it; interruption and resumption; the table."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from tests.search.models import bert, conv_net, fragile
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.compare import layer_sqnr
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.search import measured as measured_module
from torchopt_passes.search.sensitivity import FLOAT, Sensitivity, measure_sensitivity, widths_of


def alone(graph_module: fx.GraphModule, context: PassContext, layer: str, bits: int) -> fx.GraphModule:
    """Round one layer by the passes alone."""
    other = copy.deepcopy(graph_module)
    InsertFakeQuant(qat=False, weight_bits=bits, weight_bits_of={layer: bits, "*": FLOAT})(other, context)
    Calibrate(method="minmax")(other, context)
    return other


@torch.no_grad()
def output(graph_module: fx.GraphModule, batch: Any) -> torch.Tensor:
    result = graph_module(**batch) if isinstance(batch, dict) else graph_module(batch)
    return (result if isinstance(result, torch.Tensor) else result.logits).double()


def test_sqnr_of_the_layer_itself() -> None:
    graph_module, context = conv_net()
    context = PassContext(calibration=[torch.cat(list(context.calibration or ()))])  # one batch: as `layer_sqnr` takes
    batch = next(iter(context.calibration or ()))
    table = measure_sensitivity(graph_module, context, bits=(3, 8))
    assert [row.layer for row in table.rows[::3]] == ["stem.weight", "conv.weight", "depthwise.weight", "fc.weight"]
    assert [(row.weight_bits, row.activation_bits) for row in table.rows[:3]] == [(3, 8), (8, 8), (32, 32)]
    for layer in ("stem", "fc"):
        for bits in (3, 8):
            other = alone(graph_module, context, f"{layer}.weight", bits)
            (expected,) = [row.sqnr for row in layer_sqnr(graph_module, other, batch) if row.layer == layer]
            (row,) = [r for r in table.rows if (r.layer, r.weight_bits) == (f"{layer}.weight", bits)]
            assert row.numbers["sqnr"] == pytest.approx(expected, abs=1e-4)
            assert row.cost == pytest.approx(10 ** (-row.numbers["sqnr"] / 10), rel=1e-9)
            assert table.cost(row.layer, (bits, 8)) == row.cost
    assert all(table.cost(row.layer, (3, 8)) > 10 * table.cost(row.layer, (8, 8)) for row in table.rows)
    assert table.cost("fc.weight", (FLOAT, FLOAT)) == 0.0
    with pytest.raises(ConfigError, match=r"no row of fc\.weight at 4 x 8 bits"):
        table.cost("fc.weight", (4, 8))


@pytest.mark.parametrize("make", [conv_net, bert])
def test_leaving_one_out(make: Any) -> None:
    graph_module, context = make()
    batches = list(context.calibration)
    table = measure_sensitivity(graph_module, context, by="leave_one_out", bits=(4,))
    kl = measure_sensitivity(graph_module, context, by="leave_one_out", bits=(4,), distance="kl")
    exact = [output(graph_module, batch) for batch in batches]
    # a convolution in front of a residual sum has the sum's other operand rounded too by the passes
    rows = [row for row in table.rows if row.weight_bits == 4 and row.layer != "conv.weight"]
    assert len(rows) in (3, 14)
    for row in {row.layer: row for row in [*rows[:3], *rows[-3:]]}.values():
        other = alone(graph_module, context, row.layer, 4)
        rounded = [output(other, batch) for batch in batches]
        noise = sum(float((b - a).square().sum()) for a, b in zip(exact, rounded, strict=True))
        assert row.cost == pytest.approx(noise / sum(float(a.square().sum()) for a in exact), rel=1e-3, abs=1e-12)
        # KL(p || q) = sum p log(p / q), mean over samples
        p, q = (torch.cat(x).softmax(-1) for x in (exact, rounded))
        expected = float((p * (p / q).log()).sum(-1).mean())
        assert kl.cost(row.layer, (4, 8)) == pytest.approx(expected, rel=2e-2, abs=1e-10)


def test_by_a_metric() -> None:
    graph_module, context = fragile()
    (first, _) = list(context.calibration or ())
    exact = output(graph_module, first)

    def metric(graph: fx.GraphModule) -> float:
        return -float((output(graph, first) - exact).norm() / exact.norm())

    table = measure_sensitivity(graph_module, context, by="leave_one_out", bits=(4,), metric=metric)
    for row in table.rows[::2]:
        assert row.numbers["metric"] == pytest.approx(metric(alone(graph_module, context, row.layer, 4)))
        assert row.cost == pytest.approx(-row.numbers["metric"])
    worst = max(table.rows, key=lambda row: row.cost)
    assert worst.layer == "layers.2.weight"


def test_gradient_and_fisher() -> None:
    """With inputs left exact (they are on the grid already), |sum g d| is |g_w . dw|."""
    graph_module, context = fragile()
    batches = [(x > 0).float() for x in context.calibration or ()]  # 0 and 1 are points of the grid 0, 1/255 .. 1
    context = PassContext(calibration=batches)
    target = torch.randn(64, 16)

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        del batch
        return (output - target).square().mean()

    tables = {
        by: measure_sensitivity(graph_module, context, by=by, bits=(3,), loss=loss)  # pyright: ignore[reportArgumentType]
        for by in ("gradient", "fisher")
    }
    weight = graph_module.get_parameter("layers.0.weight")
    step = weight.detach().abs().amax(1, keepdim=True) / 3
    change = (weight.detach() / step).round().clamp(-3, 3) * step - weight.detach()
    first = second = 0.0
    for batch in batches:
        hidden = torch.nn.functional.linear(batch, weight, graph_module.get_parameter("layers.0.bias"))
        hidden.retain_grad()
        x = hidden
        for index in (1, 2, 3):
            x = torch.nn.functional.linear(
                x, *(graph_module.get_parameter(f"layers.{index}.{n}") for n in ("weight", "bias"))
            )
        value = loss(x, batch)
        (slope_w, slope) = torch.autograd.grad(value, (weight, hidden))
        first += float((slope_w * change).sum())
        second += 0.5 * float((slope * (batch @ change.T)).double().square().sum())
    row = next(r for r in tables["gradient"].rows if r.layer == "layers.0.weight")
    assert row.cost == pytest.approx(abs(first) / 2, rel=1e-4)
    assert row.cost == row.numbers["gradient"]
    row = next(r for r in tables["fisher"].rows if r.layer == "layers.0.weight")
    assert row.cost == pytest.approx(second / 2, rel=1e-4)
    assert graph_module.get_parameter("layers.0.weight").grad is None


def test_gradients_of_a_model_that_returns_its_loss() -> None:
    graph_module, context = bert()
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    table = measure_sensitivity(graph_module, context, by="fisher", bits=(2, 8))
    names = {row.layer for row in table.rows}
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"} <= names
    for name in names:
        assert table.cost(name, (2, 8)) > table.cost(name, (8, 8)) >= 0.0
    assert all(torch.equal(value, before[name]) for name, value in graph_module.state_dict().items())
    assert all(p.grad is None for p in graph_module.parameters())
    graph_module, context = conv_net()
    with pytest.raises(ConfigError, match="needs a loss"):
        measure_sensitivity(graph_module, context, by="gradient")


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, context = fragile()
    whole = measure_sensitivity(graph_module, context, by="leave_one_out", bits=(2, 4))
    file = tmp_path / "state.json"
    calls = 0
    put = measured_module.Measured.put

    def stop_after_three(self: Any, figures: dict[str, dict[str, float]]) -> None:
        nonlocal calls
        calls += 1
        put(self, figures)
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(measured_module.Measured, "put", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(graph_module, context, by="leave_one_out", bits=(2, 4), state=file)
    assert len(json.loads(file.read_text())["measured"]) == 3
    resumed = measure_sensitivity(graph_module, context, by="leave_one_out", bits=(2, 4), state=file)
    assert resumed == whole
    assert calls == 8  # four layers, two widths: nothing was measured twice
    monkeypatch.undo()
    assert measure_sensitivity(graph_module, context, by="leave_one_out", bits=(2, 4), state=file) == whole
    assert not [p for p in tmp_path.iterdir() if p != file]


def test_a_state_file_of_something_else_is_refused(tmp_path: Path) -> None:
    graph_module, context = fragile()
    file = tmp_path / "state.json"
    measure_sensitivity(graph_module, context, bits=(4,), state=file)
    with pytest.raises(ConfigError, match=r"another run \(by, distance differ\)|another run \(by differ\)"):
        measure_sensitivity(graph_module, context, bits=(4,), by="leave_one_out", state=file)
    with torch.no_grad():
        graph_module.get_parameter("layers.0.weight").mul_(2)
    with pytest.raises(ConfigError, match=r"another run \(weights differ\)"):
        measure_sensitivity(graph_module, context, bits=(4,), state=file)
    document = json.loads(file.read_text())
    for broken in ("{", "[]", json.dumps({**document, "more": 1}), json.dumps({**document, "version": 2})):
        file.write_text(broken)
        with pytest.raises(ConfigError, match="state file"):
            measure_sensitivity(graph_module, context, bits=(4,), state=file)
    file.write_text(json.dumps({**document, "measured": {"a": {"cost": math.nan}}}))
    with pytest.raises(ConfigError, match="corrupted"):
        measure_sensitivity(graph_module, context, bits=(4,), state=file)
    with pytest.raises(ConfigError, match="does not exist"):
        measure_sensitivity(graph_module, context, bits=(4,), state=tmp_path / "no" / "state.json")


def test_the_table_goes_to_json_and_back() -> None:
    graph_module, context = fragile()
    table = measure_sensitivity(graph_module, context, bits=(4,), activation_bits=None)
    assert [(r.weight_bits, r.activation_bits) for r in table.rows[:2]] == [(4, 4), (32, 32)]
    assert Sensitivity.from_json(table.to_json()) == table
    for text in ("{", "{}", '{"by": "sqnr", "rows": [{"layer": "a"}]}', '{"by": "sqnr", "rows": 1}'):
        with pytest.raises(ConfigError):
            Sensitivity.from_json(text)


def test_bad_options() -> None:
    graph_module, context = fragile()
    with pytest.raises(ConfigError, match="needs data"):
        measure_sensitivity(graph_module, PassContext())
    with pytest.raises(ConfigError, match="several times"):
        measure_sensitivity(graph_module, PassContext(calibration=iter([torch.randn(2, 16)])))
    with pytest.raises(ConfigError, match="goes with by='leave_one_out'"):
        measure_sensitivity(graph_module, context, metric=lambda graph: 0.0)
    with pytest.raises(ConfigError, match="must leave the bits"):
        measure_sensitivity(graph_module, context, insert=InsertFakeQuant(weight_bits_of={"*": 4}))
    with pytest.raises(ConfigError, match="2 to 8"):
        widths_of((9,), 8)
    with pytest.raises(ConfigError, match="finite"):
        measure_sensitivity(graph_module, context, by="leave_one_out", bits=(4,), metric=lambda graph: math.nan)


def test_products_of_two_activations_are_layers_too() -> None:
    graph_module, context = bert()
    insert = InsertFakeQuant(target="onnx")
    products = [
        op for op in insert.annotate(graph_module, context).operations if op.weight is None and not op.why_float
    ]
    table = measure_sensitivity(graph_module, context, bits=(2, 4, 8), insert=insert)
    rows = [row for row in table.rows if row.layer in {op.node.name for op in products}]
    assert {(r.weight_bits, r.activation_bits) for r in rows} == ({(8, 8), (32, 32)} if products else set())
