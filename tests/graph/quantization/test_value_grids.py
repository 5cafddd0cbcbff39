"""Grids that are fitted to each value: weights by group, activations at run time, narrow floats."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import output, quantizers, relative
from tests.models import build
from torchopt_passes.functional.float_casts import float_scale
from torchopt_passes.graph.quantization import InsertFakeQuant
from torchopt_passes.graph.quantization.targets import TARGETS

X = torch.linspace(-2, 3, 3 * 4 * 8).reshape(3, 4, 8) ** 3


def rounded_row(row: list[float], bits: int, *, symmetric: bool) -> list[float]:
    """Round one row by the formula, in Python: symmetric about zero, or affine with a zero point."""
    if symmetric:
        top_level = 2 ** (bits - 1) - 1
        step = max(abs(v) for v in row) / top_level
        return [step * max(-top_level, min(top_level, round(v / step))) for v in row]
    low, high = min(0.0, *row), max(0.0, *row)
    levels = 2**bits - 1
    step = (high - low) / levels
    zero = max(0, min(levels, -round(low / step)))
    return [step * (max(0, min(levels, round(v / step) + zero)) - zero) for v in row]


def rows_rounded(x: torch.Tensor, size: int, bits: int, *, symmetric: bool) -> torch.Tensor:
    """Round each `size` consecutive values on a grid of their own."""
    flat = x.detach().double().flatten().tolist()
    parts = [rounded_row(flat[at : at + size], bits, symmetric=symmetric) for at in range(0, len(flat), size)]
    return torch.tensor([v for part in parts for v in part]).reshape(x.shape)


def grouped(w: torch.Tensor) -> torch.Tensor:
    return rows_rounded(w, 4, 4, symmetric=True)


def by_token(x: torch.Tensor) -> torch.Tensor:
    return rows_rounded(x, x.shape[-1], 8, symmetric=False)


def whole(x: torch.Tensor) -> torch.Tensor:
    return rows_rounded(x, x.numel(), 8, symmetric=False)


def significant(v: float, bits: int, lowest: int) -> float:
    """Round to a float of so many bits of significand, whose smallest normal exponent is `lowest`, ties to even."""
    if v == 0.0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(v))), lowest) - bits + 1)
    return round(v / step) * step


def cast(t: torch.Tensor, bits: int, lowest: int) -> torch.Tensor:
    return torch.tensor([significant(v, bits, lowest) for v in t.double().flatten().tolist()]).reshape(t.shape)


def bfloat16(t: torch.Tensor) -> torch.Tensor:
    return cast(t, 8, -126)


def half(t: torch.Tensor) -> torch.Tensor:
    return cast(t, 11, -14)


def fp8_e4m3(t: torch.Tensor) -> torch.Tensor:
    """Each row scaled so that its largest value is 448, the format's; 4 bits of significand, exponents from -6."""
    scale = t.double().abs().amax(-1, keepdim=True) / 448
    return (cast(t / scale, 4, -6) * scale).float()


GRIDS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"weight_bits": 4, "group_size": 4, "activation_range": "dynamic"}, grouped, whole),
    ({"weight_bits": 4, "group_size": 4, "activation_range": "token"}, grouped, by_token),
    ({"weight_format": "bf16", "activation_format": "bf16"}, bfloat16, bfloat16),
    ({"weight_format": "fp16", "activation_range": "token"}, half, by_token),
    (
        {"weight_format": "fp8_e4m3", "activation_format": "fp8_e4m3", "activation_range": "token"},
        fp8_e4m3,
        fp8_e4m3,
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
        InsertFakeQuant(target=target, **options)


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
    for pass_ in (top.Calibrate(), top.LearnSteps(), top.RoundWeights()):
        report = pass_(graph_module, context).report
        assert not report.changed and any("fitted to each value" in row.reason for row in report.skipped)
    assert torch.equal(output(graph_module, (X,)), before)


STORED = {"group": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}


@pytest.mark.parametrize("options", [options for options, _, _ in GRIDS])
@pytest.mark.parametrize("fold", [True, False])
def test_converted_graphs_compute_the_same_in_plain_operations(
    options: dict[str, Any], fold: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, eps=1e-3)
    nn.init.uniform_(norm.running_var, 0.2, 2.0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.Flatten(), nn.Linear(24, 4), norm)
    graph_module, _ = made(model.eval(), (X,), **options)
    expected = output(graph_module, (X,))
    result = top.ConvertQuantized(fold_weights=fold)(graph_module)
    assert result.report.proof.status == "proven" and not result.report.skipped
    assert not list(graph_module.graph.find_nodes(op="call_module"))
    torch.testing.assert_close(output(graph_module, (X,)), expected, rtol=1e-5, atol=1e-5)
    assert output(graph_module, (X[:1],)).shape == (1, 4)
    state = graph_module.state_dict()
    dtype = STORED["group" if "group_size" in options else str(options["weight_format"])]
    assert (state["0.weight"].dtype is dtype) == fold and state["0.weight"].shape == (16, 8)
    loaded = top.load_captured(top.save_captured(graph_module, tmp_path / "graph")).eval()
    assert torch.equal(output(loaded, (X,)), output(graph_module, (X,)))


def test_a_transposed_weight_and_a_convolution_are_converted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    cases: list[tuple[nn.Module, Any, Any]] = [
        (GPT2LMHeadModel(config).eval(), (), {"input_ids": torch.randint(0, 99, (2, 7))}),
        (build("conv_residual")[0].eval(), build("conv_residual")[1], {}),
    ]
    float8: dict[str, Any] = {"weight_format": "fp8_e4m3", "activation_format": "fp8_e4m3"}
    for model, args, kwargs in cases:
        for options in ({"group_size": 8}, float8):
            graph_module = top.capture(model, args, kwargs or None).eval()
            InsertFakeQuant(target="reference", qat=False, activation_range="token", **options)(graph_module)
            context = top.PassContext(calibration=[kwargs or args])
            top.Calibrate(method="minmax")(graph_module, context)  # the convolutions' grids have a range
            expected = output(graph_module, kwargs or args)
            result = top.ConvertQuantized()(graph_module)
            assert result.report.proof.status == "proven"
            torch.testing.assert_close(output(graph_module, kwargs or args), expected, rtol=1e-4, atol=1e-4)


def test_it_trains_narrows_saves_and_folds_batch_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, eps=1e-3), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(16, 8)
    graph_module, _ = made(copy.deepcopy(model), (x,), weight_bits=4, group_size=2, activation_range="dynamic")
    top.set_fake_quant(graph_module, False)
    torch.testing.assert_close(output(graph_module, (x,)), output(model, (x,)))
    top.set_fake_quant(graph_module, True)
    scale = (model[1].weight / torch.sqrt(model[1].running_var + 1e-3)).detach()[:, None]
    folded = rows_rounded(model[0].weight.detach() * scale, 2, 4, symmetric=True)
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
