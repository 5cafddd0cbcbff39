"""Affine grids against torchao's observers and against slow references from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import (
    affine_qparams,
    along,
    batch_norm_scale,
    dequantize,
    fake_quantize,
    fold_batch_norm,
    integer_range,
    min_max,
    min_max_quantize,
    quantize,
)

FLOATS = st.floats(-1e3, 1e3, width=32)


@pytest.mark.parametrize("bits", range(2, 17))
def test_integer_range(bits: int) -> None:
    assert integer_range(bits, signed=False) == (0, 2**bits - 1)
    low, high = integer_range(bits, signed=True)
    assert low == -high and high == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [1, 0, 17])
def test_integer_range_refuses(bits: int) -> None:
    with pytest.raises(ConfigError, match="2 to 16"):
        integer_range(bits, signed=True)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.booleans(), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_qparams_are_those_of_torchao(values: list[float], symmetric: bool, bits: int) -> None:
    from torchao.quantization.pt2e import MinMaxObserver

    x = torch.tensor(values)
    low, high = integer_range(bits, signed=symmetric)
    observer = MinMaxObserver(
        dtype=torch.int8 if symmetric else torch.uint8,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        quant_min=low,
        quant_max=high,
    )
    observer(x)
    scale, zero_point = affine_qparams(*min_max(x), low, high, symmetric=symmetric)
    expected_scale, expected_zero = observer.calculate_qparams()
    torch.testing.assert_close(scale, expected_scale.reshape(1), rtol=1e-6, atol=0)
    assert int(zero_point) == int(expected_zero)


@given(st.lists(FLOATS, min_size=2, max_size=30), st.integers(2, 8), st.booleans())
@settings(max_examples=80, deadline=None)
def test_rounding_error_is_at_most_half_a_step(values: list[float], bits: int, symmetric: bool) -> None:
    x = torch.tensor(values)
    low, high = integer_range(bits, signed=symmetric)
    scale, zero_point = affine_qparams(*min_max(x), low, high, symmetric=symmetric)
    q = quantize(x, scale, zero_point, low, high)
    assert int(q.min()) >= low and int(q.max()) <= high
    error = (dequantize(q, scale, zero_point) - x).abs().max()
    # the zero point is rounded too: an end of an affine range may lie another half step outside
    assert float(error) <= float(scale) * (0.5 if symmetric else 1.0) * (1 + 1e-4) + 1e-30
    assert float(dequantize(zero_point, scale, zero_point)) == 0.0, "zero is exact"


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_fake_quantize_is_quantize_then_dequantize_bit_for_bit(dim: int | None) -> None:
    x = torch.randn(5, 6, 7) * 3
    for signed in (True, False):
        low, high = integer_range(8, signed=signed)
        scale, zero_point = affine_qparams(*min_max(x, dim), low, high, symmetric=signed)
        rounded = fake_quantize(x, scale, zero_point, low, high, dim)
        q = quantize(x, scale, zero_point, low, high, dim)
        assert torch.equal(rounded, dequantize(q, scale, zero_point, dim))
        slow = torch.empty_like(x)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
            c = 0 if dim is None else index[dim]
            s, z = float(scale[c]), int(zero_point[c])
            inverse = float(torch.tensor(1.0) / scale[c])
            steps = round(float(torch.tensor(float(x[tuple(index)])) * inverse)) + z
            slow[tuple(index)] = (min(max(steps, low), high) - z) * s
        torch.testing.assert_close(rounded, slow, rtol=1e-6, atol=1e-6)


def test_straight_through_gradient_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([-9.0, -0.4, 0.0, 0.33, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), -7, 7).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fake_quantize_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([0.12, 0.5], dtype=dtype)
    out = fake_quantize(x, torch.tensor([0.125]), torch.tensor([0], dtype=torch.int32), -7, 7)
    assert out.dtype is dtype and out.tolist() == [0.125, 0.5]


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20), st.integers(2, 16))
@settings(max_examples=80, deadline=None)
def test_min_max_quantize_is_its_formula(values: list[float], bits: int) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    low, high = min(values), max(values)
    got = min_max_quantize(w, bits)
    if not high > low:
        assert torch.equal(got, w)
        return
    steps = 2**bits - 1
    expected = [round((v - low) / (high - low) * steps) * (high - low) / steps + low for v in values]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert len(got.unique()) <= 2**bits


def test_min_max_by_channel() -> None:
    x = torch.randn(3, 4, 5)
    for dim in range(3):
        low, high = min_max(x, dim)
        others = [d for d in range(3) if d != dim]
        assert torch.equal(low, x.amin(others)) and torch.equal(high, x.amax(others))
    low, high = min_max(torch.tensor([1.0, -2.0]), 0)
    assert low.tolist() == high.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_fold_batch_norm_equals_the_two_operations(bias: bool, affine: bool, eps: float) -> None:
    cases = [
        (nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6, eps=eps, affine=affine), (2, 4, 5, 5), 0),
        (nn.ConvTranspose2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, eps=eps, affine=affine), (2, 4, 5, 5), 1),
        (nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, eps=eps, affine=affine), (3, 4), 0),
    ]
    for layer, norm, shape, dim in cases:
        layer, norm = layer.double().eval(), norm.double().eval()
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 1e-4, 2)
        if affine:
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.uniform_(norm.bias, -1, 1)
        x = torch.randn(shape, dtype=torch.float64)
        expected = norm(layer(x))
        weight, shift = fold_batch_norm(
            layer.weight,
            layer.bias,
            gamma=norm.weight,
            beta=norm.bias,
            mean=norm.running_mean,
            var=norm.running_var,
            eps=eps,
            dim=dim,
        )
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(shift.detach())
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_batch_norm_scale_and_along() -> None:
    assert float(batch_norm_scale(torch.tensor([3.0]), torch.tensor([3.0]), 1.0)) == pytest.approx(3 / math.sqrt(4))
    assert float(batch_norm_scale(None, torch.tensor([0.25]), 0.0)) == pytest.approx(2.0)
    assert along(torch.arange(3), 4, 1).shape == (1, 3, 1, 1)
