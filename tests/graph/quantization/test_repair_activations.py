"""SmoothActivations and ScaleWeights: the papers' scales, the same outputs, and less noise in int8 and int4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchopt_passes as top
from tests.hf_models import MODELS
from torchopt_passes.functional.groupwise import fit_range
from torchopt_passes.graph.quantization import ScaleChannels, ScaleWeights, SmoothActivations
from torchopt_passes.graph.verify import evaluate, sqnr

WIDTH, OUTLIERS = 32, [2, 11, 19]


class Block(nn.Module):
    """A decoder block: RMS norm, attention, RMS norm, gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.norm1(x)
        q, k, v = (part(h).view(batch, length, 4, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(batch, length, WIDTH))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def decoder(outliers: float = 20.0, weights: float = 0.2) -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    """Return two blocks whose norms make a few channels large, and batches.

    Args:
        outliers: how large.
        weights: how small the weights are that read them.
    """
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter[OUTLIERS] *= outliers
            if name.endswith(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")):
                parameter[:, OUTLIERS] *= weights
    return model, [(torch.randn(n, 12, WIDTH),) for n in (3, 5)]


def inputs_of(graph_module: Any, batches: list[Any], fqn: str) -> torch.Tensor:
    """Return everything that the linear of a weight reads, [positions, channels]."""
    linear = next(n for n in graph_module.graph.nodes if fqn in [str(getattr(a, "target", "")) for a in n.args])
    found: list[torch.Tensor] = []
    for batch in batches:
        record: dict[str, Any] = {}
        evaluate(graph_module, (batch, {}), dtype=None, record=record)
        found.append(record[str(linear.args[0])].flatten(0, -2))
    return torch.cat(found)


def nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    return fit_range(weight, bits, group_size, symmetric=True).round(weight)


def by_target(plan: top.Plan, *, divide: bool) -> dict[str, torch.Tensor]:
    edits = [edit for edit in plan.edits if isinstance(edit, ScaleChannels)]
    return {edit.target: edit.scale for edit in edits if edit.divide is divide}


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_scales_are_equation_4(alpha: float) -> None:
    model, batches = decoder()
    graph_module = top.capture(model, batches[0]).eval()
    plan = SmoothActivations(alpha=alpha).plan(graph_module, top.PassContext(calibration=iter(batches)))
    made, read = by_target(plan, divide=True), by_target(plan, divide=False)
    x = inputs_of(graph_module, batches, "0.q.weight")
    # the rows of v are divided by the scale in front of the output projection before its columns are looked at
    v = model.get_parameter("0.v.weight").detach() / made["0.v.weight"][:, None]
    weights = [model.get_parameter("0.q.weight").detach(), model.get_parameter("0.k.weight").detach(), v]
    expected: list[float] = []
    for j in range(WIDTH):
        largest = max(float(w[:, j].abs().max()) for w in weights)
        expected.append(float(x[:, j].abs().max()) ** alpha / largest ** (1 - alpha))
    for scale in (read["0.q.weight"], read["0.k.weight"], read["0.v.weight"], made["0.norm1.weight"]):
        assert scale.tolist() == pytest.approx(expected, rel=1e-5)
    o, y = model.get_parameter("0.o.weight").detach(), inputs_of(graph_module, batches, "0.o.weight")
    expected = [float(y[:, j].abs().max()) ** alpha / float(o[:, j].abs().max()) ** (1 - alpha) for j in range(WIDTH)]
    assert read["0.o.weight"].tolist() == made["0.v.weight"].tolist() == pytest.approx(expected, rel=1e-5)
    assert {"0.up.weight", "0.up.bias"} <= made.keys() and "0.down.weight" in read


def int8_noise(model: nn.Module, batches: list[Any], *passes: top.GraphPass) -> float:
    """Return the SQNR in dB of the model with weights and activations in int8, after some passes."""
    args, kwargs = ((), batches[0]) if isinstance(batches[0], dict) else (batches[0], {})
    graph_module = top.capture(model, args, kwargs).eval()
    context = top.PassContext(calibration=batches)
    (expected,) = evaluate(graph_module, (args, kwargs), dtype=None)
    for pass_ in passes:
        result = pass_(graph_module, context)
        assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
        assert not pass_(graph_module, context).modified
    top.Pipeline(top.InsertFakeQuant(qat=False), top.Calibrate(method="minmax"))(graph_module, context)
    return sqnr(evaluate(graph_module, (args, kwargs), dtype=None)[0], expected)


def test_int8_with_outliers_gains() -> None:
    model, batches = decoder(outliers=50.0, weights=0.02)
    before, after = int8_noise(model, batches), int8_noise(model, batches, SmoothActivations())
    assert after > before + 6


def test_int8_of_a_vision_transformer_gains() -> None:
    torch.manual_seed(0)
    model = MODELS["vit"].build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            if "layernorm_" in name and name.endswith("weight"):
                parameter[[2, 11]] *= 30.0
            if any(part in name for part in ("q_proj.w", "k_proj.w", "v_proj.w", "fc1.w")):
                parameter[:, [2, 11]] /= 30.0
    batches = [{"pixel_values": torch.randn(n, 3, 32, 32)} for n in (3, 5)]
    before, after = int8_noise(model, batches), int8_noise(model, batches, SmoothActivations())
    assert after > before + 6


def test_the_plan_goes_to_the_source() -> None:
    model, batches = decoder()
    graph_module = top.capture(model, batches[0]).eval()
    plan = SmoothActivations()(graph_module, top.PassContext(calibration=batches)).plan
    with torch.no_grad():
        expected = model(*batches[0])
        plan.apply(model)
        torch.testing.assert_close(model(*batches[0]), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(graph_module(*batches[0]), model(*batches[0]), rtol=0, atol=1e-6)
    with pytest.raises(top.ConfigError, match="needs data"):
        SmoothActivations()(graph_module)


def test_the_exponent_is_the_best_of_the_grid_by_the_outputs_themselves() -> None:
    model, batches = decoder()
    graph_module = top.capture(model, batches[0]).eval()
    plan = ScaleWeights(bits=3, group_size=8, grid=10).plan(graph_module, top.PassContext(calibration=iter(batches)))
    names, made = [f"0.{part}.weight" for part in "qkv"], by_target(plan, divide=True)
    x = inputs_of(graph_module, batches, names[0])
    mean = x.abs().mean(0)
    weights = [model.get_parameter(name).detach() for name in names]
    weights[2] = weights[2] / made.get("0.v.weight", torch.ones(WIDTH))[:, None]
    total = sum(float((x @ w.T).double().square().sum()) for w in weights)
    errors: list[float] = []
    for step in range(11):
        s = mean ** (step / 10)
        s = s / (s.max() * s.min()).sqrt()
        rounded = [nearest(w * s, 3, 8) for w in weights]
        outputs = [((x / s) @ q.T - x @ w.T).double().square().sum() for q, w in zip(rounded, weights, strict=True)]
        errors.append(float(sum(outputs)) / total)
    numbers = next(edit.numbers for edit in plan.edits if edit.target == "0.q.weight")
    # the largest weight of a group lies on the border of two integers, so that the last bit of a scale decides
    assert numbers["error_before"] == pytest.approx(errors[0], rel=0.02)
    assert numbers["error_after"] == pytest.approx(min(errors), rel=0.02)
    assert numbers["alpha"] == errors.index(min(errors)) / 10
    assert min(errors) < 0.2 * errors[0]


def test_int4_weights_with_salient_channels_gain() -> None:
    def noise(scale: bool) -> float:
        model, batches = decoder(outliers=8.0, weights=0.5)
        graph_module = top.capture(model, batches[0]).eval()
        (expected,) = evaluate(graph_module, (batches[1], {}), dtype=None)
        if scale:
            result = ScaleWeights(bits=4)(graph_module, top.PassContext(calibration=batches))
            assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
            assert not ScaleWeights(bits=4)(graph_module, top.PassContext(calibration=batches)).modified
        with torch.no_grad():
            for parameter in graph_module.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(nearest(parameter, 4, parameter.shape[1]))
        return sqnr(evaluate(graph_module, (batches[1], {}), dtype=None)[0], expected)

    before, after = noise(False), noise(True)
    assert after > before + 1


def test_groups_must_fit_and_convolutions_are_left() -> None:
    model, batches = decoder()
    report = ScaleWeights(group_size=12)(top.capture(model, batches[0]), top.PassContext(calibration=batches)).report
    assert {row.reason for row in report.skipped if row.target == "0.norm1.weight"} == {
        "32 input channels of 0.q.weight are no groups of 12"
    }
    assert {row.target for row in report.changed} <= {
        f"{i}.{n}" for i in (0, 1) for n in ("up.weight", "up.bias", "down.weight")
    }
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = (torch.randn(2, 3, 4, 4),)
    assert "convolution" in str(ScaleWeights()(top.capture(conv, x), top.PassContext(calibration=[x])).report)


def test_inputs_that_feed_a_residual_are_divided_explicitly() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return x + self.one(x) * torch.sigmoid(self.two(x))

    torch.manual_seed(0)
    model, batches = PostNorm(), [(torch.randn(n, 6, WIDTH),) for n in (3, 5)]
    with torch.no_grad():
        model.norm.weight[OUTLIERS] *= 40.0
        for linear in (model.one, model.two):
            linear.weight[:, OUTLIERS] *= 0.1
    graph_module = top.capture(model, batches[0]).eval()
    plan = SmoothActivations(insert=True).plan(graph_module, top.PassContext(calibration=batches))
    (divided,) = [edit for edit in plan.edits if edit.kind == "scale_value"]
    x = torch.cat([model.norm(batch[0]).detach().flatten(0, 1) for batch in batches]).abs().amax(0)
    w = torch.stack([model.one.weight, model.two.weight]).detach().abs().amax((0, 1))
    torch.testing.assert_close(divided.scale, (x / w).sqrt())  # pyright: ignore[reportAttributeAccessIssue]
    assert not SmoothActivations()(top.capture(model, batches[0]), top.PassContext(calibration=batches)).modified
    before = int8_noise(model, batches)
    after = int8_noise(model, batches, SmoothActivations(insert=True))
    assert after > before + 6.0
