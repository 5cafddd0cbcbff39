"""Grids that are fitted to each value: weights by group, activations at run time, narrow floats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import output, quantizers, relative
from tests.models import build
from torchopt_passes.functional.float_casts import float_cast, float_scale
from torchopt_passes.functional.granularity import uniform_quantize
from torchopt_passes.graph.quantization import InsertFakeQuant
from torchopt_passes.graph.quantization.targets import TARGETS

X = torch.linspace(-2, 3, 3 * 4 * 8).reshape(3, 4, 8) ** 3


def grouped(w: torch.Tensor) -> torch.Tensor:
    return uniform_quantize(w, 4, granularity="group", group_size=4)


def by_token(x: torch.Tensor) -> torch.Tensor:
    return uniform_quantize(x, 8, symmetric=False, granularity="token")


def whole(x: torch.Tensor) -> torch.Tensor:
    return uniform_quantize(x, 8, symmetric=False)


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def fp8(t: torch.Tensor, kind: str) -> torch.Tensor:
    """Each row scaled so that its largest value is the format's."""
    size = t.abs().amax(-1, keepdim=True)
    return (
        float_cast(t / size * torch.finfo(torch.float8_e4m3fn).max, kind) / torch.finfo(torch.float8_e4m3fn).max * size
    )


GRIDS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"weight_bits": 4, "group_size": 4, "activation_range": "dynamic"}, grouped, whole),
    ({"weight_bits": 4, "group_size": 4, "activation_range": "token"}, grouped, by_token),
    ({"weight_format": "bf16", "activation_format": "bf16"}, bfloat16, bfloat16),
    ({"weight_format": "fp16", "activation_range": "token"}, lambda w: w.half().float(), by_token),
    (
        {"weight_format": "fp8_e4m3", "activation_format": "fp8_e4m3", "activation_range": "token"},
        lambda w: fp8(w, "fp8_e4m3"),
        lambda x: fp8(x, "fp8_e4m3"),
    ),
]  # fmt: skip


def made(model: nn.Module, inputs: Any, **options: Any) -> Any:
    graph_module = top.capture(model, inputs).eval()
    result = InsertFakeQuant(**({"target": "reference", "qat": False} | options))(graph_module)
    return graph_module, result


@pytest.mark.parametrize(("options", "round_weight", "round_input"), GRIDS)
def test_a_linear_rounds_as_the_formula(options: dict[str, Any], round_weight: Any, round_input: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    graph_module, result = made(model, (X,), **options)
    expected = nn.functional.linear(round_input(X), round_weight(weight), bias)
    torch.testing.assert_close(output(graph_module, (X,)), expected, rtol=1e-5, atol=1e-5)
    assert relative(expected, nn.functional.linear(X, weight, bias)) > 1e-4, "rounding is seen"
    assert all("fitted to each" in row.reason for row in result.report.changed)
    # a token's grid is its own: what else is in the batch does not matter
    if options.get("activation_range") == "token":
        torch.testing.assert_close(output(graph_module, (X[:1],)), expected[:1], rtol=1e-5, atol=1e-5)


def test_what_cannot_have_it_keeps_its_grid_and_says_why() -> None:
    model, inputs = build("conv_residual")
    graph_module, result = made(model, inputs, group_size=7, activation_range="token")
    reasons = {row.target: row.reason for row in result.report.changed}
    assert "no groups: the weight of a convolution" in reasons["stem.weight"]
    assert "7 does not divide" in reasons["fc.weight"]
    assert "no tokens: a convolution reads it" in reasons["x"]
    assert "fitted to each token" in reasons["mean"]
    assert not quantizers(graph_module)["stem_weight"].fitted_to_value


def test_the_right_side_of_a_product_has_no_tokens() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    _, result = made(Product(), (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), activation_range="token")
    reasons = {row.target: row.reason for row in result.report.changed}
    assert "fitted to each token" in reasons["a"] and "right side of a product" in reasons["b"]


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"reference"}))
@pytest.mark.parametrize("options", [{"group_size": 4}, {"activation_range": "token"}, {"weight_format": "bf16"}])
def test_targets_without_such_kernels_refuse(target: str, options: dict[str, Any]) -> None:
    with pytest.raises(top.ConfigError, match=f"target '{target}' cannot run .*: its .*kernels"):
        InsertFakeQuant(target=target, activation_symmetric=target == "tensorrt", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_format": "fp8_e4m3"}, "take their scale at run time"),
        ({"group_size": -1}, "group_size must be >= 0"),
        ({"group_size": 4, "per_channel": False}, "per_channel=True"),
        ({"group_size": 4, "power_of_two": True}, "power_of_two is for grids with a range"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(top.ConfigError, match=message):
        InsertFakeQuant(target="reference", **options)


def test_the_other_passes_leave_them_alone_and_say_so() -> None:
    graph_module, _ = made(nn.Sequential(nn.Linear(8, 6)), (X,), group_size=4, activation_range="token")
    context = top.PassContext(calibration=[(X,)])
    before = output(graph_module, (X,))
    for pass_ in (top.Calibrate(), top.LearnSteps(), top.RoundWeights(), top.ConvertQuantized()):
        report = pass_(graph_module, context).report
        assert not report.changed and any("fitted to each value" in row.reason for row in report.skipped)
    assert torch.equal(output(graph_module, (X,)), before)


def test_it_trains_narrows_saves_and_folds_batch_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, eps=1e-3), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(16, 8)
    graph_module, _ = made(copy.deepcopy(model), (x,), weight_bits=4, group_size=2, activation_range="dynamic")
    top.set_fake_quant(graph_module, False)
    torch.testing.assert_close(output(graph_module, (x,)), output(model, (x,)))
    top.set_fake_quant(graph_module, True)
    scale = (model[1].weight / torch.sqrt(model[1].running_var + 1e-3)).detach()[:, None]
    folded = uniform_quantize(model[0].weight.detach() * scale, 4, granularity="group", group_size=2)
    rounded = quantizers(graph_module)["_0_weight"](model[0].weight, model[1].weight, model[1].running_var)
    torch.testing.assert_close(rounded * scale, folded)
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.1)
    first = graph_module.train()(x).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = graph_module(x).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float(first.detach())  # pyright: ignore
    for quantizer in quantizers(graph_module).values():
        quantizer.set_bits(3)
    other, _ = made(copy.deepcopy(model), (x,), weight_bits=4, group_size=2, activation_range="dynamic")
    other.load_state_dict(graph_module.state_dict())
    assert torch.equal(output(other.eval(), (x,)), output(graph_module.eval(), (x,)))


def test_float8_rows_use_the_whole_format() -> None:
    low, high = torch.tensor([-3.0]), torch.tensor([1.0])
    assert float(float_scale(low, high, "fp8_e4m3")) == pytest.approx(3.0 / 448)
