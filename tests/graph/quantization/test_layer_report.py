"""The report by layer against the formulas, by the passes alone; histograms against counting by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import torchopt_passes as top
from tests.hf_models import MODELS
from tests.models import ConvResidual, build
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.compare import layer_sqnr
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.graph.quantization.layer_histograms import layer_histograms
from torchopt_passes.graph.quantization.layer_report import LayerReport, layer_report
from torchopt_passes.graph.verify import sqnr


def prepared_of(reference: fx.GraphModule, batch: Any, **options: Any) -> tuple[fx.GraphModule, top.Plan]:
    context = top.PassContext(calibration=[batch])
    other = copy.deepcopy(reference)
    plan = InsertFakeQuant(qat=False, **options)(other, context).plan
    Calibrate(method="minmax")(other, context)
    return other, plan


def conv_net() -> tuple[ConvResidual, fx.GraphModule, torch.Tensor]:
    model, (x,) = build("conv_residual")
    reference = top.capture(model.eval(), (x,)).eval()
    assert isinstance(model, ConvResidual)
    return model, reference, x


def test_figures_of_a_residual_conv_net() -> None:
    model, reference, x = conv_net()
    prepared, plan = prepared_of(reference, x, weight_bits=4, weight_bits_of={"fc": 3, "depthwise": 32})
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    rows = layer_report(reference, prepared, x, plan=plan)
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    assert [(r.layer, r.kind, r.weight_bits, r.activation_bits) for r in rows] == [
        ("stem.weight", "conv2d", 4, 8),
        ("conv.weight", "conv2d", 4, 8),
        ("depthwise.weight", "conv2d", None, None),
        ("fc.weight", "linear", 3, 8),
        ("0", "output", None, None),
    ]
    assert rows[2].why_float == "float: weight_bits_of gives 'depthwise' 32 bits"
    compared = {row.layer: row.sqnr for row in layer_sqnr(reference, prepared, x)}
    assert [r.sqnr for r in rows] == [compared[name] for name in ("stem", "conv", "depthwise", "fc", "")]
    # the stem's weight is rounded as it is behind the fold of its batch norm: q = clamp(round(w s / step), -7, 7)
    norm = model.bn1
    assert norm.running_var is not None
    s = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    folded = model.stem.weight.detach() * s[:, None, None, None]
    step = folded.abs().amax((1, 2, 3), keepdim=True) / 7
    expected = sqnr((folded / step).round().clamp(-7, 7) * step, folded)
    assert rows[0].weight_sqnr == pytest.approx(expected, abs=1e-3)
    assert rows[0].weight_range == pytest.approx((-float(folded.abs().max()), float(folded.abs().max())), rel=1e-5)
    low, high = float(x.min()), float(x.max())
    assert rows[0].activation_range == pytest.approx((low, high), abs=(high - low) / 255)
    # at the output: with that layer alone rounded by the passes
    for name, index, bits in (("stem", 0, 4), ("fc", 3, 3)):
        alone, _ = prepared_of(reference, x, weight_bits_of={name: bits, "*": 32})
        with torch.no_grad():
            assert rows[index].output_sqnr == pytest.approx(sqnr(alone(x), reference(x)), abs=1e-3)
    assert rows[-1].sqnr == rows[-1].output_sqnr == compared[""]


@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_every_matrix_operation_of_bert_has_bits_or_a_reason(target: str) -> None:
    torch.manual_seed(0)
    batch = MODELS["bert"].case(2)[1]
    reference = top.capture(MODELS["bert"].build().eval(), (), batch).eval()
    prepared, plan = prepared_of(reference, batch, target=target)
    rows = layer_report(reference, prepared, batch, plan=plan)
    layers = [row for row in rows if row.kind != "output"]
    assert all((row.weight_bits == row.activation_bits == 8) != bool(row.why_float) for row in layers)
    assert {row.layer for row in layers if row.kind == "linear"} >= {"classifier.weight", "bert.pooler.dense.weight"}
    attention = [row for row in layers if row.kind == "attention"]
    assert attention and all("one float kernel" in row.why_float for row in attention)
    # what a key or query loses is nothing at the output of a random network, whose attention is flat
    assert all(30 < (row.output_sqnr or 0) < 170 for row in layers if not row.why_float)
    found = {row.layer: row.output_sqnr for row in layers}
    alone, _ = prepared_of(reference, batch, target=target, weight_bits_of={"classifier": 8, "*": 32})
    with torch.no_grad():
        expected = sqnr(alone(**batch).logits, reference(**batch).logits)
    assert found["classifier.weight"] == pytest.approx(expected, abs=1e-2)


def test_products_and_missing_plans() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b.transpose(0, 1)

    a, b = torch.randn(3, 8), torch.randn(4, 8) * 2
    reference = top.capture(Product().eval(), (a, b), dynamic=False).eval()
    prepared, _ = prepared_of(reference, (a, b), target="onnx", activation_bits=6)
    row, output = layer_report(reference, prepared, (a, b))
    assert (row.kind, row.weight_bits, row.activation_bits, row.weight_sqnr) == ("matmul", 6, 6, None)
    assert row.weight_range is not None and row.activation_range is not None
    assert row.weight_range[1] - row.weight_range[0] == pytest.approx(float(b.max() - b.min()), rel=1e-5)
    assert row.output_sqnr == pytest.approx(output.sqnr or math.nan, abs=1e-6)
    histograms = layer_histograms(reference, prepared, [(a, b)])
    assert [(item.operand, sum(item.counts)) for item in histograms] == [("input", 24), ("input 2", 32)]
    model, reference, x = conv_net()
    prepared, _ = prepared_of(reference, x, weight_bits_of={"fc": 32})
    assert "plan=, says why" in layer_report(reference, prepared, x)[3].why_float
    del model


def test_graphs_without_fake_quantizers_are_refused() -> None:
    _, reference, x = conv_net()
    prepared, _ = prepared_of(reference, x)
    ConvertQuantized()(prepared)
    with pytest.raises(ConfigError, match="before ConvertQuantized"):
        layer_report(reference, prepared, x)
    prepared, _ = prepared_of(reference, x)
    del reference.meta["example_inputs"]
    with pytest.raises(ConfigError, match="needs inputs"):
        layer_report(reference, prepared)


def test_histograms_are_counted_in_steps_of_the_grid() -> None:
    model, reference, x = conv_net()
    prepared, _ = prepared_of(reference, x, weight_bits=3)
    wide = x * 3  # beyond what was calibrated on
    found = {(h.layer, h.operand): h for h in layer_histograms(reference, prepared, [x, wide], bins=32)}
    assert list(found)[:2] == [("stem.weight", "weight"), ("stem.weight", "input")]
    assert len(found) == 8
    weight = model.fc.weight.detach()
    steps = (weight / (weight.abs().amax(1, keepdim=True) / 3)).double()
    histogram = found["fc.weight", "weight"]
    assert (histogram.bits, histogram.low, histogram.high, histogram.clipped) == (3, -3, 3, 0.0)
    assert histogram.edges[0] == -4.5 and histogram.edges[-1] == 4.5 and len(histogram.edges) == 33
    counts = torch.histogram(steps.flatten(), torch.tensor(histogram.edges, dtype=torch.float64))[0]
    assert sum(abs(int(a) - b) for a, b in zip(counts, histogram.counts, strict=True)) <= 2  # ties at an edge
    taken = found["stem.weight", "input"]
    assert sum(taken.counts) == 2 * x.numel()
    step = float(x.max() - x.min()) / 255
    both = torch.cat([x, wide])
    beyond = (both < x.min() - step / 2) | (both > x.max() + step / 2)
    assert taken.clipped == pytest.approx(float(beyond.float().mean()), abs=2e-3)
    assert taken.step == pytest.approx(step, rel=1e-4)
    (only,) = layer_histograms(reference, prepared, [x], layers=("fc",))[:1]
    assert (only.layer, only.operand) == ("fc.weight", "weight")
    with pytest.raises(ConfigError, match="match no rounded layer"):
        layer_histograms(reference, prepared, [x], layers=("nothing",))
    with pytest.raises(ConfigError, match="no batch"):
        layer_histograms(reference, prepared, [])


def test_rows_are_plain_data() -> None:
    row = LayerReport(layer="fc.weight", kind="linear")
    assert row == LayerReport(layer="fc.weight", kind="linear")
