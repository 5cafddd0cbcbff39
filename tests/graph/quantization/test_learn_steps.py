"""LearnSteps: learned grids start where the paper says, train, are saved, and convert to exactly what was trained."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import fx, nn

import torchopt_passes as top
from tests.graph.quantization.helpers import output, prepare, quantizers
from tests.models import ZOO, ConvResidual, build, images
from torchopt_passes.graph.quantization import ConvertQuantized, InsertFakeQuant, set_fake_quant, set_observers
from torchopt_passes.graph.quantization.learn_steps import LearnStep, LearnSteps
from torchopt_passes.graph.quantization.learned_quantizer import LearnedQuantizer

Method = Literal["lsq", "lsq+", "pact", "dorefa", "wrpn"]
METHODS: list[Method] = ["lsq", "lsq+", "pact", "dorefa", "wrpn"]


def residual() -> ConvResidual:
    model, _ = build("conv_residual")
    assert isinstance(model, ConvResidual)
    return model


def learned(name: str, method: Method, *, bits: int = 4, target: str = "onnx", **options: Any) -> fx.GraphModule:
    model, inputs = build(name)
    graph_module = prepare(
        model, [inputs, ZOO[name][1](3)], target=target, weight_bits=bits, activation_bits=bits, **options
    )
    LearnSteps(method=method)(graph_module)
    return graph_module


def train(graph_module: fx.GraphModule, name: str, steps: int = 4) -> list[float]:
    graph_module.train()
    target = torch.randn(output(graph_module, ZOO[name][1](4)).shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.01)
    losses: list[float] = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (graph_module(*ZOO[name][1](4)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "method"), [*(("conv_residual", m) for m in METHODS), ("attention", "lsq+"), ("tied_twice", "lsq")]
)
def test_trained_grids_convert_to_themselves(name: str, method: Method) -> None:
    graph_module = learned(name, method)
    found = {n: q for n, q in quantizers(graph_module).items() if isinstance(q, LearnedQuantizer)}
    assert found, "the method finds something to do"
    before = {n: q.scale.clone() for n, q in found.items()}
    train(graph_module, name)
    trained = {n for n, q in found.items() if any(True for _ in q.parameters())}
    moved = {n for n, q in found.items() if not torch.equal(q.scale, before[n])}
    assert moved <= trained and (moved or method in ("dorefa", "wrpn") or not trained)
    graph_module.eval()
    inputs = ZOO[name][1](5)
    expected = output(graph_module, inputs)
    result = top.on_copy(ConvertQuantized())(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-6
    torch.testing.assert_close(output(result.graph_module, inputs), expected, rtol=1e-3, atol=1e-3)
    assert not [n for n in result.graph_module.state_dict() if "fake_quant" in n]


@pytest.mark.parametrize("method", ["lsq", "lsq+"])
def test_steps_are_parameters_of_the_graph_and_all_get_a_gradient(method: Method) -> None:
    graph_module = learned("conv_residual", method).train()
    graph_module(*ZOO["conv_residual"][1](4)).square().sum().backward()
    steps = {n: p for n, p in graph_module.named_parameters() if n.startswith("fake_quant.")}
    count = len(quantizers(graph_module))
    offsets = sum(n.startswith("act_") for n in quantizers(graph_module)) if method == "lsq+" else 0
    assert len(steps) == count + offsets
    for name, step in steps.items():
        assert step.grad is not None and bool(torch.isfinite(step.grad).all()), name
        assert float(step.grad.abs().sum()) > 0 or name.endswith(".offset"), name


def test_where_lsq_starts() -> None:
    model, inputs = residual(), images()
    for bits in (2, 4, 8):
        graph_module = prepare(model, [inputs], weight_bits=bits)
        ranges = {n: q.scale.clone() for n, q in quantizers(graph_module).items()}
        LearnSteps()(graph_module)
        found = quantizers(graph_module)
        top_level = 2 ** (bits - 1) - 1
        folded = (
            model.stem.weight
            * (model.bn1.weight / (model.bn1.get_buffer("running_var") + 1e-3).sqrt())[:, None, None, None]
        )
        for weight, name in ((folded, "stem_weight"), (model.fc.weight, "fc_weight")):
            for row, step in zip(weight.detach().flatten(1).tolist(), found[name].scale.tolist(), strict=True):
                paper = 2 * sum(map(abs, row)) / len(row) / math.sqrt(top_level)
                assert step == pytest.approx(min(paper, max(map(abs, row)) / top_level), rel=1e-4)
        activations = [n for n in found if n.startswith("act_")]
        assert activations and all(torch.equal(found[n].scale, ranges[n]) for n in activations)


def test_where_lsq_plus_starts() -> None:
    model = nn.Linear(6, 3)
    graph_module = prepare(model, [(torch.randn(4, 6) + 0.5,)], weight_bits=2)
    before = quantizers(graph_module)
    LearnSteps(method="lsq+")(graph_module)
    found = quantizers(graph_module)
    for row, step in zip(model.weight.detach(), found["weight"].scale.tolist(), strict=True):
        mean, deviation = float(row.mean()), float(row.std(correction=0))
        paper = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2
        assert step == pytest.approx(min(paper, float(row.abs().max())), rel=1e-4)
    (name,) = [n for n in found if n.startswith("act_")]
    assert torch.equal(found[name].scale, before[name].scale)
    assert torch.equal(found[name].zero_point, before[name].zero_point)


@pytest.mark.parametrize("unit", ["range", "one"])
@pytest.mark.parametrize("method", ["dorefa", "wrpn"])
def test_units(method: Method, unit: Literal["range", "one"]) -> None:
    model = nn.Linear(6, 3)
    graph_module = prepare(model, [(torch.rand(4, 6) * 3,)], weight_bits=3, activation_bits=3)
    (activation,) = [n for n in quantizers(graph_module) if n.startswith("act_")]
    high = quantizers(graph_module)[activation].max_val.clone()
    LearnSteps(method=method, unit=unit)(graph_module)
    found = quantizers(graph_module)
    limit = torch.ones(1) if unit == "one" else high
    torch.testing.assert_close(found[activation].max_val, limit)
    weights = found["weight"].max_val
    torch.testing.assert_close(weights, torch.ones(3) if unit == "one" else model.weight.detach().abs().amax(1))
    if method == "dorefa":
        rounded = found["weight"](model.weight) / weights[:, None] * 7
        torch.testing.assert_close(rounded, rounded.round(), rtol=0, atol=1e-4)
        assert set(rounded.round().flatten().tolist()) <= {-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0}


def test_what_a_method_does_not_fit_is_kept_and_reported() -> None:
    model, inputs = build("conv_residual")
    graph_module = prepare(model, [inputs], weight_bits_of={"stem": 8, "*": 4})
    report = LearnSteps(method="pact")(graph_module).report
    reasons = {row.target: row.reason for row in report.skipped}
    assert "256 levels of 8-bit dorefa" in reasons["stem.weight"]
    assert reasons["x"].startswith("kept: pact clips at zero, its values go down to -")
    kinds = {n: getattr(q, "method", "") for n, q in quantizers(graph_module).items()}
    assert (
        kinds["stem_weight"] == kinds["act_x"] == "" and kinds["fc_weight"] == "dorefa" and kinds["act_relu"] == "pact"
    )
    report = LearnSteps(method="lsq", weights=False)(graph_module).report
    assert {row.reason for row in report.skipped} == {
        "nothing to do: pact has it already",
        "nothing to do: dorefa has it already",
        "kept: weights=False",
    }
    assert [row.target for row in report.changed] == ["x"]


def test_uncalibrated_activations_are_refused() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    InsertFakeQuant()(graph_module)
    with pytest.raises(top.PassError, match=r"seen no data.*Calibrate"):
        LearnSteps()(graph_module)
    LearnSteps(activations=False)(graph_module)
    assert all(isinstance(q, LearnedQuantizer) == n.endswith("weight") for n, q in quantizers(graph_module).items())


@pytest.mark.parametrize("method", ["lsq+", "pact"])
def test_state_is_saved_copied_and_switched(method: Method) -> None:
    first = learned("conv_residual", method)
    train(first, "conv_residual", 2)
    second = learned("conv_residual", method)
    second.load_state_dict(first.state_dict())
    inputs = ZOO["conv_residual"][1](5)
    expected = output(first.eval(), inputs)
    assert torch.equal(output(second.eval(), inputs), expected)
    assert torch.equal(output(copy.deepcopy(first), inputs), expected)
    set_observers(first, True)
    first.train()(*inputs)
    assert all(
        torch.equal(q.scale, quantizers(second)[n].scale) for n, q in quantizers(first).items() if hasattr(q, "method")
    )
    set_fake_quant(second, False)
    # the float model that the graph was trained to be
    source, _ = build("conv_residual")
    source.load_state_dict({n: t for n, t in second.state_dict().items() if "fake_quant" not in n})
    torch.testing.assert_close(output(second, inputs), output(source.eval(), inputs), rtol=1e-5, atol=1e-5)


def test_a_step_that_becomes_negative_comes_back() -> None:
    graph_module = prepare(nn.Linear(6, 3), [(torch.randn(4, 6),)])
    LearnSteps()(graph_module)
    quantizer = quantizers(graph_module)["weight"]
    assert isinstance(quantizer, LearnedQuantizer)
    with torch.no_grad():
        quantizer.step[1] = -0.5
    out = graph_module.train()(torch.randn(4, 6))
    assert bool(torch.isfinite(out).all()) and bool((quantizer.scale > 0).all())
    w = torch.randn(3, 6)
    (quantizer(w) - w).square().sum().backward()
    # the error is the clipping: a longer step makes it less
    assert quantizer.step.grad is not None and float(quantizer.step.grad[1]) < 0


def test_power_of_two_steps_are_trained_as_such() -> None:
    graph_module = learned("conv_residual", "lsq", power_of_two=True)
    train(graph_module, "conv_residual")
    for quantizer in quantizers(graph_module).values():
        exponent = torch.log2(quantizer.scale)
        assert torch.equal(exponent, exponent.round())
    assert ConvertQuantized()(graph_module).report.proof.status == "proven"


def test_pruned_weights_stay_zero() -> None:
    for method in ("lsq", "lsq+", "wrpn"):
        model, inputs = residual(), images()
        graph_module = top.capture(model, inputs)
        top.PruneWeights(sparsity=0.5)(graph_module)
        InsertFakeQuant(qat=True)(graph_module)
        graph_module.train()(*inputs)
        LearnSteps(method=method)(graph_module)
        for name in ("conv.weight", "fc.weight"):
            weight = graph_module.get_parameter(name).detach()
            rounded = quantizers(graph_module.eval())[name.replace(".", "_")](
                weight, *([model.bn2.weight, model.bn2.running_var] if name == "conv.weight" else [])
            )
            assert bool((rounded[weight == 0] == 0).all()) and int((weight == 0).sum()) > 0


def test_wrong_edits_are_refused() -> None:
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    options: dict[str, Any] = {"target": "x", "reason": "r", "quantizer": "fake_quant.act_x"}
    with pytest.raises(top.PlanError, match="no method"):
        LearnStep(**options, method="lsq-", step=one, zero_point=zero)
    with pytest.raises(top.PlanError, match="positive"):
        LearnStep(**options, method="lsq", step=-one, zero_point=zero)
    model, inputs = build("conv_residual")
    graph_module = prepare(model, [inputs])
    with pytest.raises(top.PlanError, match="has 1 steps, not 3"):
        top.Plan((LearnStep(**options, method="lsq", step=one.repeat(3), zero_point=zero.repeat(3)),)).apply(
            graph_module
        )
    options["quantizer"] = "fake_quant.nothing"
    with pytest.raises(top.PlanError, match="no fake-quantizer"):
        top.Plan((LearnStep(**options, method="lsq", step=one, zero_point=zero),)).apply(graph_module)
