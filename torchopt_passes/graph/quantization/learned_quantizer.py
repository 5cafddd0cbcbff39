"""The learned quantizer: a fake-quantizer whose grid is trained by gradient, or fixed by a method of the literature."""

from __future__ import annotations

import torch
from torch import nn

from torchopt_passes.functional.affine import SMALLEST_SCALE, next_power_of_two, straight_through
from torchopt_passes.functional.learned_steps import (
    dorefa_activations,
    dorefa_weights,
    lsq,
    lsq_gradient_scale,
    pact,
    wrpn_weights,
)
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer

__all__ = ["METHODS", "LearnedQuantizer"]

METHODS = ("lsq", "lsq+", "pact", "dorefa", "wrpn")


class LearnedQuantizer(FakeQuantizer):
    """Round as `FakeQuantizer` does, on a grid that no observer moves.

    ``lsq``: the step is a parameter, the zero point stays. ``lsq+``: the offset of an affine grid is one too, rounded
    to an integer zero point. ``pact``: the upper end ``alpha`` of an activation's range is a parameter. ``dorefa``,
    ``wrpn``: the range stays. Scale, zero point and range are computed from these whenever they are read, so what
    `ConvertQuantized` stores is what was trained last.

    Args:
        like: the fake-quantizer it takes the place of: width, grid, dimension, batch norm, switches.
        method: one of `METHODS`.
        step: the first step, shape [1] or [channels].
        zero_point: the first zero point, same shape.

    Source:
        See `torchopt_passes.functional.learned_steps`.
    """

    step: torch.Tensor
    alpha: torch.Tensor
    offset: torch.Tensor
    fixed_zero_point: torch.Tensor

    def __init__(self, like: FakeQuantizer, method: str, step: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.method = method
        super().__init__(
            bits=like.bits,
            signed=like.signed,
            channel_dim=like.channel_dim,
            channels=len(step),
            momentum=like.momentum,
            bn_eps=like.bn_eps,
            bias_apart=like.bias_apart,
            power_of_two=like.power_of_two,
            observe=False,
            enabled=like.enabled,
        )
        step, zero_point = step.detach().float().clone(), zero_point.detach().to(torch.int32).clone()
        self.with_offset = method == "lsq+" and not like.signed
        if method == "pact":
            self.alpha = nn.Parameter(step * self.quant_max)
        elif method in ("lsq", "lsq+"):
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)
        if self.with_offset:
            self.offset = nn.Parameter(-step * zero_point)
        else:
            self.register_buffer("fixed_zero_point", zero_point)
        self.train(like.training)

    def _register_range(self, channels: int) -> None:
        """Scale, zero point and range are no buffers here."""

    def grid(self, bits: int) -> tuple[int, int]:
        """Return the integers of the grid; the levels of DoReFa weights are the odd ones of +-(2^bits - 1)."""
        return (1 - 2**bits, 2**bits - 1) if self.method == "dorefa" and self.signed else super().grid(bits)

    @property
    def scale(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The step now, without a gradient."""
        step = (self.alpha / self.quant_max if self.method == "pact" else self.step).detach()
        step = step.clamp(min=SMALLEST_SCALE)
        return next_power_of_two(step) if self.power_of_two else step

    @property
    def zero_point(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The zero point now."""
        if not self.with_offset:
            return self.fixed_zero_point
        return torch.round(-self.offset.detach() / self.scale).clamp(self.quant_min, self.quant_max).to(torch.int32)

    @property
    def min_val(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The lower end of the grid."""
        return (self.quant_min - self.zero_point) * self.scale

    @property
    def max_val(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The upper end of the grid."""
        return (self.quant_max - self.zero_point) * self.scale

    @property
    def has_range(self) -> bool:
        """Always: it was given one."""
        return True

    def observe(self, enabled: bool = True) -> None:
        """Leave the switch off: this range is not watched."""

    @torch.no_grad()
    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Start again from a range; both of shape [1] or [channels]."""
        scale, zero_point = self.qparams(low, high)
        if self.method == "pact":
            self.alpha.copy_(scale * self.quant_max)
        else:
            self.step.copy_(scale)
        if self.with_offset:
            self.offset.copy_(-scale * zero_point)
        elif not self.signed and self.method == "lsq":
            self.fixed_zero_point.copy_(zero_point)

    def on_grid(self, weight: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Return the values that a weight's integers are taken from: DoReFa's squashed ones, else the weight itself."""
        if self.method != "dorefa":
            return weight
        return dorefa_weights(weight.detach(), self.bits, dim=dim, unit=self.scale * self.quant_max)

    def _quantize(self, x: torch.Tensor, observe: bool) -> torch.Tensor:
        if not self.enabled:
            return x
        if self.method in ("lsq", "lsq+"):
            return self._lsq(x)
        unit = self.scale * self.quant_max
        if self.method == "pact":
            return pact(x, straight_through(self.alpha, unit), self.bits)
        if not self.exact:  # WRPN rounds activations as DoReFa does
            return dorefa_activations(x, self.bits, unit=unit)
        rounding = dorefa_weights if self.method == "dorefa" else wrpn_weights
        return rounding(x, self.bits, dim=self.channel_dim, unit=unit)

    def _lsq(self, x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // len(self.step) if self.exact else x[:1].numel()
        return lsq(
            x,
            # a step that training made negative rounds with the smallest one, and its gradient leads it back
            straight_through(self.step, self.scale),
            self.quant_min,
            self.quant_max,
            dim=self.channel_dim,
            zero_point=None if self.with_offset else self.fixed_zero_point,
            offset=self.offset if self.with_offset else None,
            gradient_scale=lsq_gradient_scale(count, self.quant_max),
        )

    def extra_repr(self) -> str:
        """Return method, width, grid and switches."""
        return f"{self.method}, {super().extra_repr()}"
