"""Affine quantization: integer grids, their scale and zero point, and batch-norm folding; pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch

from torchopt_passes.errors import ConfigError

__all__ = [
    "SMALLEST_SCALE",
    "affine_qparams",
    "along",
    "batch_norm_scale",
    "dequantize",
    "fake_quantize",
    "fold_batch_norm",
    "integer_range",
    "min_max",
    "min_max_quantize",
    "minimum_qparams",
    "next_power_of_two",
    "quantize",
    "straight_through",
]

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""The smallest step of a grid, as in torch's own observers: a constant-zero tensor has no range to divide by."""


def integer_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest integer of a grid.

    Signed grids leave the most negative integer out, so that they are symmetric about zero.

    Args:
        bits: 2 to 16.
        signed: whether the integers are signed.

    Raises:
        ConfigError: `bits` is out of range.

    Example:
        >>> integer_range(8, signed=True), integer_range(8, signed=False), integer_range(4, signed=True)
        ((-127, 127), (0, 255), (-7, 7))
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"bits must be 2 to 16, not {bits}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def min_max(x: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest value, of the whole tensor (shape [1]) or for each index of `dim` (shape [C]).

    Example:
        >>> min_max(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), dim=0)
        (tensor([-2.,  3.]), tensor([1., 4.]))
    """
    if dim is None:
        low, high = x.aminmax()
        return low.reshape(1), high.reshape(1)
    rows = x.movedim(dim, 0).flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    low, high = rows.aminmax(dim=1)
    return low, high


def next_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that is not below each (positive) scale: rounding up, nothing clips.

    Formula: 2^ceil(log2 s), exactly, from the exponent of the float.

    Source:
        Jain et al. 2020, "Trained quantization thresholds for accurate and efficient fixed-point inference", section 3.

    Example:
        >>> next_power_of_two(torch.tensor([0.3, 0.5, 1.01]))
        tensor([0.5000, 0.5000, 2.0000])
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def affine_qparams(
    low: torch.Tensor,
    high: torch.Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of the grid that covers [low, high] and holds zero exactly.

    Formula, with a = min(low, 0), b = max(high, 0):
        symmetric: s = max(-a, b) / ((q_max - q_min) / 2), z = 0
        affine:    s = (b - a) / (q_max - q_min), z = clamp(q_min - round(a / s), q_min, q_max)

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        quant_min: smallest integer.
        quant_max: largest integer.
        symmetric: whether the grid is symmetric about zero (a signed grid).
        power_of_two: round s up to a power of two, so that multiplying by it is a shift; z follows from that s.

    Returns:
        Scale (float32) and zero point (int32), shaped as `low`.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", equations 1-6.

    Example:
        >>> affine_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), 0, 255, symmetric=False)
        (tensor([0.0157]), tensor([64], dtype=torch.int32))
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
    else:
        scale = (high - low) / (quant_max - quant_min)
    scale = scale.clamp(min=SMALLEST_SCALE)
    scale = next_power_of_two(scale) if power_of_two else scale
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def minimum_qparams(
    low: torch.Tensor, high: torch.Tensor, bits: int, *, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum of the grid x = s q + m, q = 0 .. 2^b - 1: a zero point that is no integer, -m / s.

    Formula: s = (high - low) / (2^b - 1), m = low. Both ends are levels; zero need not be one.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        bits: 2 to 16.
        power_of_two: round s up to a power of two.

    Example:
        >>> minimum_qparams(torch.tensor([1.0]), torch.tensor([2.5]), bits=2)
        (tensor([0.5000]), tensor([1.]))
    """
    levels = integer_range(bits, signed=False)[1]
    scale = ((high - low) / levels).clamp(min=torch.finfo(low.dtype).tiny)
    return (next_power_of_two(scale) if power_of_two else scale), low


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dim: int | None = None,
) -> torch.Tensor:
    """Return the nearest integers of the grid, as int32: q = clamp(round(x * (1/s)) + z, q_min, q_max).

    The reciprocal is what the kernels of torch use; halves round to even.

    Args:
        x: floating values.
        scale: shape [1], or [C] along `dim`.
        zero_point: as `scale`.
        quant_min: smallest integer.
        quant_max: largest integer.
        dim: the dimension that scales vary along, None for one scale.
    """
    scale, zero_point = along(scale, x.ndim, dim), along(zero_point, x.ndim, dim)
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(quant_min, quant_max).to(torch.int32)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Return the values of integers of a grid: x = s (q - z); shapes as in `quantize`."""
    return (q - along(zero_point, q.ndim, dim)) * along(scale, q.ndim, dim)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dim: int | None = None,
) -> torch.Tensor:
    """Round to the grid and back, with the straight-through gradient: 1 inside [q_min, q_max], 0 where it clips.

    Values are float32 inside; other floating dtypes are cast there and back.

    Source:
        Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons"; Jacob et al. 2018,
        "Quantization and training of neural networks for efficient integer-arithmetic-only inference", equation 12.

    Example:
        >>> fake_quantize(torch.tensor([0.12, 9.0]), torch.tensor([0.1]), torch.tensor([0]), -7, 7)
        tensor([0.1000, 0.7000])
    """
    value = x.float()
    if dim is None:
        value = torch.fake_quantize_per_tensor_affine(value, scale, zero_point, quant_min, quant_max)
    else:
        value = torch.fake_quantize_per_channel_affine(value, scale, zero_point, dim, quant_min, quant_max)
    return value.to(x.dtype)


def straight_through(x: torch.Tensor, value: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Return `value`, exactly, with the gradient of `x` where `inside` holds (everywhere when None), and 0 elsewhere.

    Source:
        Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".

    Example:
        >>> x = torch.tensor([0.4, 1.7], requires_grad=True)
        >>> straight_through(x, torch.round(x).clamp(max=1), x <= 1).sum().backward()
        >>> x.grad
        tensor([1., 0.])
    """
    return _StraightThrough.apply(x, value.detach(), inside)  # pyright: ignore


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        del x
        ctx.save_for_backward(inside)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return (grads[0] if inside is None else grads[0] * inside), None, None


def min_max_quantize(w: torch.Tensor, bits: int) -> torch.Tensor:
    """Snap to 2^b evenly spaced levels between the smallest and the largest value.

    Formula:
        w_q = round((w - w_min) / (w_max - w_min) (2^b - 1)) (w_max - w_min) / (2^b - 1) + w_min

    Zero need not be a level: this is the form for compressing a tensor, not for integer arithmetic.

    Args:
        w: any shape; a constant tensor is returned as it is.
        bits: 2 to 16.

    Example:
        >>> min_max_quantize(torch.tensor([0.0, 0.4, 1.0]), bits=2)
        tensor([0.0000, 0.3333, 1.0000])
    """
    steps = integer_range(bits, signed=False)[1]
    low, high = w.aminmax()
    span = high - low
    if not bool(span > 0):
        return w.clone()
    return torch.round((w - low) / span * steps) * span / steps + low


def batch_norm_scale(gamma: torch.Tensor | None, var: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what a batch norm in eval mode multiplies each channel by: gamma / sqrt(var + eps), shape [C]."""
    scale = torch.rsqrt(var + eps)
    return scale if gamma is None else gamma * scale


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    dim: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the one operation that equals a convolution or linear and its batch norm in eval mode.

    Formula:
        W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta

    Args:
        weight: of the convolution or linear; its output channels are along `dim`.
        bias: shape [C], or None.
        gamma: weight of the batch norm, shape [C], or None.
        beta: bias of the batch norm, shape [C], or None.
        mean: running mean, shape [C].
        var: running variance, shape [C].
        eps: of the batch norm.
        dim: 0 for convolutions and linear, 1 for transposed convolutions.

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks ...", equation 14.
    """
    scale = batch_norm_scale(gamma, var, eps)
    start = -mean if bias is None else bias - mean
    shift = start * scale if beta is None else start * scale + beta
    return weight * along(scale, weight.ndim, dim), shift


def along(values: torch.Tensor, ndim: int, dim: int | None) -> torch.Tensor:
    """Return a vector shaped to multiply dimension `dim` of `ndim` dimensions (as it is when dim is None)."""
    if dim is None:
        return values
    shape = [1] * ndim
    shape[dim] = -1
    return values.reshape(shape)
