"""Rounding whose grid is trained or fixed by a paper: LSQ, LSQ+, PACT, DoReFa, WRPN; pure, with their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchopt_passes.functional.affine import along, fake_quantize, straight_through

__all__ = [
    "dorefa_activations",
    "dorefa_weights",
    "lsq",
    "lsq_gradient_scale",
    "lsq_initial_step",
    "lsq_plus_initial_step",
    "pact",
    "wrpn_activations",
    "wrpn_weights",
]


def lsq(
    x: torch.Tensor,
    step: torch.Tensor,
    quant_min: int,
    quant_max: int,
    *,
    dim: int | None = None,
    zero_point: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    gradient_scale: float = 1.0,
) -> torch.Tensor:
    """Round to a grid whose step, and for LSQ+ whose offset, is trained.

    Formula, with v = x / s, Q_N = z - q_min, Q_P = q_max - z:
        LSQ: x_q = s round(clip(v, -Q_N, Q_P))
        dx_q/ds = g (round(v) - v) where -Q_N < v < Q_P, else g (-Q_N or Q_P)
        dx_q/dx = 1 where -Q_N < v < Q_P, else 0
        LSQ+: x_q = s round(clip((x - o) / s, q_min, q_max)) + o with the same two, v = (x - o) / s, and
        dx_q/do = 0 where q_min < v < q_max, else g

    Integer arithmetic needs the offset on the grid: x_q is computed with the zero point z = round(-o / s), and o is
    -s z in the formulas above.

    Args:
        x: weight or activation; float32 inside.
        step: s > 0, shape [1], or [C] along `dim`.
        quant_min: smallest integer.
        quant_max: largest integer.
        dim: the dimension that steps vary along, None for one step.
        zero_point: z, int32, shaped as `step`; None for 0. Ignored when there is an offset.
        offset: o of LSQ+, the value of integer 0, shaped as `step`; None for LSQ.
        gradient_scale: g, see `lsq_gradient_scale`.

    Source:
        Esser et al. 2020, "Learned step size quantization", equations 1-3 and 5; Bhalgat et al. 2020, "LSQ+: Improving
        low-bit quantization through learnable offsets and better initialization", equations 3-7.

    Example:
        >>> step = torch.tensor([0.5], requires_grad=True)
        >>> lsq(torch.tensor([0.3, 9.0]), step, -3, 3).tolist()
        [0.5, 1.5]
        >>> lsq(torch.tensor([0.3, 9.0]), step, -3, 3).sum().backward()
        >>> step.grad  # (1 - 0.6) + 3
        tensor([3.4000])
    """
    if offset is not None:
        zero_point = torch.round(-offset.detach() / step.detach()).clamp(quant_min, quant_max).to(torch.int32)
    elif zero_point is None:
        zero_point = torch.zeros_like(step, dtype=torch.int32)
    return _Learned.apply(x, step, offset, zero_point, (quant_min, quant_max), dim, gradient_scale)  # pyright: ignore


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        step: torch.Tensor,
        offset: torch.Tensor | None,
        zero_point: torch.Tensor,
        grid: tuple[int, int],
        dim: int | None,
        gradient_scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.grid, ctx.dim, ctx.gradient_scale, ctx.with_offset = grid, dim, gradient_scale, offset is not None
        return fake_quantize(x, step, zero_point, *grid, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, step, zero_point = ctx.saved_tensors
        (low, high), dim, grad = ctx.grid, ctx.dim, grads[0]
        zero = along(zero_point, x.ndim, dim)
        v = x.float() * (1.0 / along(step, x.ndim, dim))
        inside = (v > low - zero) & (v < high - zero)
        of_x = grad * inside
        # with an offset, x_q = s q + o: where it clips, q is the end itself; without, it is q - z
        ends = (v + zero).clamp(low, high) if ctx.with_offset else torch.clamp(v, low - zero, high - zero)
        of_step = _sum(grad * torch.where(inside, torch.round(v) - v, ends), step, dim) * ctx.gradient_scale
        of_offset = _sum(grad * ~inside, step, dim) * ctx.gradient_scale if ctx.with_offset else None
        return of_x, of_step, of_offset, None, None, None, None


def _sum(values: torch.Tensor, like: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Add up what belongs to each step."""
    if dim is None:
        return values.sum().reshape(like.shape).to(like.dtype)
    others = [d for d in range(values.ndim) if d != dim % values.ndim]
    return (values.sum(others) if others else values).to(like.dtype)


def lsq_gradient_scale(count: int, quant_max: int) -> float:
    """Return g = 1 / sqrt(N Q_P), which makes steps move about as much, relative to their size, as weights do.

    Args:
        count: N, the values that share a step: weights, or features (activations of one example).
        quant_max: Q_P, the largest integer.

    Source:
        Esser et al. 2020, section 2.2.

    Example:
        >>> lsq_gradient_scale(100, 4)
        0.05
    """
    return 1.0 / math.sqrt(count * quant_max)


def lsq_initial_step(x: torch.Tensor, quant_max: int, dim: int | None = None) -> torch.Tensor:
    """Return the step that LSQ starts from, s = 2 mean|x| / sqrt(Q_P); shape [1], or [C] along `dim`.

    Source:
        Esser et al. 2020, section 2.1.

    Example:
        >>> lsq_initial_step(torch.tensor([1.0, -3.0]), 4)
        tensor([2.])
    """
    return 2.0 * _rows(x, dim).abs().mean(1) / math.sqrt(quant_max)


def lsq_plus_initial_step(x: torch.Tensor, bits: int, dim: int | None = None) -> torch.Tensor:
    """Return the step that LSQ+ starts weights from, s = max(|m - 3 d|, |m + 3 d|) / 2^(b-1); m, d mean and deviation.

    Source:
        Bhalgat et al. 2020, section 3.2.

    Example:
        >>> lsq_plus_initial_step(torch.tensor([1.0, -1.0]), 2)
        tensor([1.5000])
    """
    rows = _rows(x, dim)
    mean, deviation = rows.mean(1), rows.std(1, correction=0)
    return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (bits - 1)


def pact(x: torch.Tensor, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """Clip to [0, alpha], alpha trained, and round to 2^k - 1 steps.

    Formula: y = (|x| - |x - a| + a) / 2 = clip(x, 0, a), y_q = round(y (2^k - 1) / a) a / (2^k - 1);
    dy_q/da = 1 where x >= a, else 0; dy_q/dx = 1 where 0 <= x < a, else 0.

    Args:
        x: activation.
        alpha: shape [1], positive.
        bits: k.

    Source:
        Choi et al. 2018, "PACT: Parameterized clipping activation for quantized neural networks", equations 1-3.

    Example:
        >>> alpha = torch.tensor([3.0], requires_grad=True)
        >>> pact(torch.tensor([-1.0, 1.2, 7.0]), alpha, 2).tolist()
        [0.0, 1.0, 3.0]
    """
    levels = 2**bits - 1
    clipped = torch.where(x >= alpha, alpha.to(x.dtype), x.clamp(min=0))
    zero = torch.zeros_like(alpha, dtype=torch.int32)
    return straight_through(clipped, fake_quantize(x.detach(), alpha.detach() / levels, zero, 0, levels))


def dorefa_weights(
    w: torch.Tensor, bits: int, *, dim: int | None = None, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """Squash weights to [-1, 1] and round them to 2^k levels, of which zero is none.

    Formula: r = tanh(w) / (2 max|tanh(w)|) + 1/2, w_q = 2 round((2^k - 1) r) / (2^k - 1) - 1; rounding passes the
    gradient, the rest is differentiated.

    Args:
        w: weight.
        bits: k >= 2.
        dim: the dimension whose indices have a maximum each, None for one (the paper's).
        unit: what w_q is multiplied by, shape [1], or [C] along `dim`; None for 1 (the paper's).

    Source:
        Zhou et al. 2016, "DoReFa-Net: Training low bitwidth convolutional neural networks with low bitwidth
        gradients", equations 5 and 9.

    Example:
        >>> dorefa_weights(torch.tensor([-0.5, 0.1, 0.5]), 2)
        tensor([-1.0000,  0.3333,  1.0000])
    """
    levels = 2**bits - 1
    squashed = torch.tanh(w.float())
    largest = along(_rows(squashed, dim).abs().amax(1), w.ndim, dim).clamp(min=torch.finfo(torch.float32).tiny)
    r = squashed / (2 * largest) + 0.5
    # w_q is an odd multiple of 1 / levels: written so that an integer grid of that step holds it exactly
    integers = 2 * torch.round(r.detach() * levels) - levels
    one = torch.ones(1, device=w.device) if unit is None else unit
    factor = along(one, w.ndim, dim if len(one) > 1 else None)
    return straight_through((2 * r - 1) * factor, integers * (factor / levels)).to(w.dtype)


def dorefa_activations(x: torch.Tensor, bits: int, *, unit: torch.Tensor | None = None) -> torch.Tensor:
    """Clip to [0, 1] and round to 2^k - 1 steps: x_q = round((2^k - 1) clip(x, 0, 1)) / (2^k - 1).

    Args:
        x: activation.
        bits: k.
        unit: what stands for 1, shape [1]; None for 1 (the paper's).

    Source:
        Zhou et al. 2016, equations 5 and 11.

    Example:
        >>> dorefa_activations(torch.tensor([-1.0, 0.4, 2.0]), 2)
        tensor([0.0000, 0.3333, 1.0000])
    """
    levels = 2**bits - 1
    step = (torch.ones(1, device=x.device) if unit is None else unit) / levels
    return _clipped(x, step, 0, levels, None)


def wrpn_weights(
    w: torch.Tensor, bits: int, *, dim: int | None = None, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """Clip to [-1, 1] and round to 2^(k-1) - 1 steps on either side: k - 1 bits and the sign.

    Formula: w_q = round((2^(k-1) - 1) clip(w, -1, 1)) / (2^(k-1) - 1); the gradient is 1 in [-1, 1], 0 outside.

    Args:
        w: weight.
        bits: k >= 2.
        dim: the dimension that `unit` varies along, None for one.
        unit: what stands for 1 (the paper's), shape [1], or [C] along `dim`.

    Source:
        Mishra et al. 2018, "WRPN: Wide reduced-precision networks", section 3.

    Example:
        >>> wrpn_weights(torch.tensor([-2.0, 0.4, 0.2]), 3)
        tensor([-1.0000,  0.3333,  0.3333])
    """
    top = 2 ** (bits - 1) - 1
    step = (torch.ones(1, device=w.device) if unit is None else unit) / top
    return _clipped(w, step, -top, top, dim)


def wrpn_activations(x: torch.Tensor, bits: int, *, unit: torch.Tensor | None = None) -> torch.Tensor:
    """Clip to [0, 1] and round to 2^k - 1 steps, as DoReFa does; see `dorefa_activations`.

    Source:
        Mishra et al. 2018, section 3.
    """
    return dorefa_activations(x, bits, unit=unit)


def _clipped(x: torch.Tensor, step: torch.Tensor, low: int, high: int, dim: int | None) -> torch.Tensor:
    """Round to a fixed grid; the gradient ends where its range ends."""
    zero = torch.zeros_like(step, dtype=torch.int32)
    scale = along(step, x.ndim, dim)
    inside = (x.detach() >= low * scale) & (x.detach() <= high * scale)
    return straight_through(x, fake_quantize(x.detach(), step, zero, low, high, dim), inside)


def _rows(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    return x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.shape[dim], -1)
