"""Uniform grids of 2 to 16 bits through the graph passes, against the formula; above 8 bits for the reference alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.affine import min_max_quantize
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, FakeQuantize, InsertFakeQuant, LearnSteps
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer
from torchopt_passes.graph.quantization.observers import METHODS
from torchopt_passes.graph.quantization.targets import TARGETS

BITS = range(2, 17)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.fc = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 8, 8)
    model(x)  # statistics that are not those of a new model
    return top.capture(model.eval(), (x,)), x


@pytest.fixture(scope="module")
def linear() -> Any:
    torch.manual_seed(0)
    return top.capture(nn.Sequential(nn.Linear(24, 40)).eval(), (torch.randn(4, 24),))


def prepare(graph: Any, x: torch.Tensor, *, method: Any = "minmax", **options: Any) -> Any:
    graph = copy.deepcopy(graph)
    every: dict[str, Any] = {"target": "reference", "qat": False} | options
    context = top.PassContext(calibration=[(x,)])
    top.Pipeline(InsertFakeQuant(**every), Calibrate(method=method))(graph, context)
    return graph


def formula(w: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    """w_q = round((w - w_min) / (w_max - w_min) (2^b - 1)) (w_max - w_min) / (2^b - 1) + w_min, value by value."""
    steps, span = 2**bits - 1, high - low
    return torch.tensor([round((v - low) / span * steps) * span / steps + low for v in w.double().flatten().tolist()])


@pytest.mark.parametrize("bits", BITS)
def test_every_width_rounds_as_the_formula(linear: Any, bits: int) -> None:
    """A weight whose ends are levels of an affine grid: there the grid with an integer zero point is the formula's."""
    graph = copy.deepcopy(linear)
    torch.manual_seed(bits)
    zero, step = 2**bits // 3, 2.0**-bits
    integers = torch.randint(0, 2**bits, (40, 24)).double()
    integers.view(-1)[:2] = torch.tensor([0.0, 2.0**bits - 1])
    inside = (torch.rand(40, 24) * 0.8 - 0.4).double()
    inside.view(-1)[:2] = 0.0
    weight = ((integers - zero + inside) * step).clamp(-zero * step, (2**bits - 1 - zero) * step).float()
    with torch.no_grad():
        graph.get_parameter("0.weight").copy_(weight)
    x = torch.randn(32, 24)
    ready = prepare(graph, x, weight_bits=bits, activation_bits=bits, weight_symmetric=False, per_channel=False)
    expected = formula(weight, float(weight.min()), float(weight.max()), bits).view(weight.shape).float()
    by_name = {name: q for name, q in ready.named_modules() if isinstance(q, FakeQuantizer)}
    quantizer = next(q for q in by_name.values() if q.exact)
    assert torch.equal(quantizer(weight), expected)
    torch.testing.assert_close(min_max_quantize(weight, bits), expected, rtol=1e-6, atol=1e-7)
    assert len(expected.unique()) <= 2**bits

    activation = next(q for q in by_name.values() if not q.exact)
    ends = [float((q - activation.zero_point) * activation.scale) for q in (activation.quant_min, activation.quant_max)]
    steps = (x.double() - ends[0]) / (ends[1] - ends[0]) * (2**bits - 1)
    clear = (steps - steps.floor() - 0.5).abs() > 0.02  # not within float32's error of the middle of two levels
    rounded, wanted = activation(x), formula(x.clamp(*ends), ends[0], ends[1], bits).view(x.shape)
    torch.testing.assert_close(rounded[clear], wanted[clear].float(), rtol=1e-5, atol=1e-6)
    assert float((rounded - x).abs().max()) <= (ends[1] - ends[0]) / (2**bits - 1)  # half a step, one at the ends

    result = ConvertQuantized()(ready, top.PassContext())
    assert result.report.proof.status == "proven"
    stored = ready.state_dict()["0.weight"]
    assert stored.dtype == (torch.uint8 if bits <= 8 else torch.int16)
    assert torch.equal((stored.int() - quantizer.zero_point) * quantizer.scale, expected)


@pytest.mark.parametrize("bits", range(9, 17))
def test_symmetric_weights_by_channel_with_a_batch_norm_convert(net: tuple[Any, torch.Tensor], bits: int) -> None:
    graph, x = net
    ready = prepare(graph, x, weight_bits=bits, activation_bits=bits)
    with torch.no_grad():
        exact, rounded = graph(x), ready.eval()(x)
        steps = {name: m.scale for name, m in ready.named_modules() if isinstance(m, FakeQuantizer) and m.exact}
        weight = graph.get_parameter("conv.weight").double()
        norm = graph.get_parameter("norm.weight") / (graph.get_buffer("norm.running_var") + 1e-3).sqrt()
        folded = weight * norm.double()[:, None, None, None]
        for channel, step in enumerate(steps["fake_quant.conv_weight"].tolist()):
            assert step == pytest.approx(float(folded[channel].abs().max()) / (2 ** (bits - 1) - 1), rel=1e-5)
        assert ConvertQuantized()(ready, top.PassContext()).report.proof.status == "proven"
        torch.testing.assert_close(ready(x), rounded, rtol=1e-5, atol=1e-6)
    state = ready.state_dict()
    assert state["conv.weight"].dtype == state["fc.weight"].dtype == torch.int16
    assert int(state["conv.weight"].abs().amax()) == 2 ** (bits - 1) - 1
    error = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error < 4 * 2.0**-bits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [10, 16])
def test_every_calibration_method_takes_them(linear: Any, method: Any, bits: int) -> None:
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(1))
    ready = prepare(linear, x, method=method, activation_bits=bits, weight_bits=bits)
    activation = next(m for m in ready.modules() if isinstance(m, FakeQuantizer) and not m.exact)
    assert float(activation.max_val) <= float(x.max()) + 2 * float(activation.scale)
    error = float((activation(x) - x).square().sum() / x.square().sum())
    clips = method in ("percentile", "gaussian", "laplace", "entropy") and (bits == 10 or method != "entropy")
    assert error < (1e-3 if clips else 1e-5 if bits == 10 else 1e-8)


def test_groups_and_tokens_take_them(linear: Any) -> None:
    x = torch.randn(32, 24)
    options: dict[str, Any] = {"group_size": 8, "activation_range": "token", "weight_symmetric": False}
    graph = copy.deepcopy(linear)
    InsertFakeQuant(target="reference", qat=False, weight_bits=12, activation_bits=14, **options)(graph)
    for module in graph.modules():
        if isinstance(module, FakeQuantizer):
            module.enable()
    with torch.no_grad():
        expected = graph(x)
        assert ConvertQuantized()(graph, top.PassContext()).report.proof.status == "proven"
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-6)
        assert graph.state_dict()["0.weight"].dtype is torch.int16
        torch.testing.assert_close(expected, linear(x), rtol=0, atol=2e-3)


def test_training_rounds_and_a_checkpoint_comes_back(linear: Any) -> None:
    graph, x = copy.deepcopy(linear), torch.randn(32, 24)
    InsertFakeQuant(target="reference", weight_bits=12, activation_bits=12)(graph)
    fresh = copy.deepcopy(graph)
    graph.train()(x).square().sum().backward()
    gradient = graph.get_parameter("0.weight").grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    fresh.load_state_dict(graph.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), graph.eval()(x)) and not torch.equal(graph(x), linear(x))
    assert not LearnSteps().plan(graph).edits
    assert {"too fine to learn" in skip.reason for skip in LearnSteps().plan(graph).skips} == {True}


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"reference"}))
def test_int8_targets_refuse_them_and_say_what_takes_them(target: str) -> None:
    way_out = "LiteRtTarget" if target == "litert" else "'reference' rounds to 16 bits"
    for options in ({"weight_bits": 9}, {"activation_bits": 16}, {"weight_bits_of": {"fc": 12}}):
        with pytest.raises(ConfigError, match=rf"must be 2 to 8.*target '{target}': .*{way_out}"):
            InsertFakeQuant(target=target, **options)


def test_what_is_no_width_is_refused() -> None:
    for options in ({"weight_bits": 17}, {"activation_bits": 1}, {"activation_bits_of": {"fc": 24}}):
        with pytest.raises(ConfigError, match="must be 2 to 16"):
            InsertFakeQuant(target="reference", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="bits 2 to 16"):
        FakeQuantize(target="x", reason="", quantizer="x", node="x", users=("y",), bits=17, signed=True)
    one = InsertFakeQuant(target="reference", weight_bits=12, reduce_range=True, weight_bits_of={"fc": 10, "head": 32})
    weights = one._bits_of()[0]
    assert weights.default == 7 and weights.bits == {"fc": 7, "head": 32}
