"""AdaRound: learn for each weight whether it is rounded down or up."""

from __future__ import annotations

import math

import torch
from torch import nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import along

__all__ = ["GAMMA", "ZETA", "SoftRounding", "beta_at", "rectified_sigmoid", "rounding_loss"]

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched past 1 and 0, so that it reaches them."""


def rectified_sigmoid(v: torch.Tensor) -> torch.Tensor:
    """Return h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1.

    Source:
        Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equation 23.

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rounding_loss(h: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the regularizer that draws h to 0 or 1: sum 1 - |2 h - 1|^beta.

    Source:
        Nagel et al. 2020, equation 24.

    Example:
        >>> float(rounding_loss(torch.tensor([0.0, 0.5, 1.0]), beta=2.0))
        1.0
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int, *, warmup: float = 0.2, first: float = 20.0, last: float = 2.0) -> float | None:
    """Return the exponent of the regularizer at a step, annealed from soft to hard; None while it is off.

    Formula: None for t < warmup; else last + (first - last) (1 + cos(pi r)) / 2, r the share of the rest done.

    Args:
        step: steps completed.
        steps: steps in all.
        warmup: the share of steps without the regularizer.
        first: exponent at its start.
        last: exponent at the end.

    Source:
        Nagel et al. 2020, section 3.2: beta is annealed so that h may move first and must decide at last.

    Example:
        >>> beta_at(0, 100), beta_at(20, 100), beta_at(100, 100)
        (None, 20.0, 2.0)
    """
    start = warmup * steps
    if step < start:
        return None
    share = (step - start) / max(steps - start, 1)
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


class SoftRounding(nn.Module):
    """A weight whose rounding is learned: W~ = s clip(floor(W / s) + h(V), n, p) on a symmetric grid.

    It starts at the weight itself: h(V) = W / s - floor(W / s). Only V is a parameter.

    Args:
        weight: the weight to round (folded with its batch norm, if any), any shape.
        scale: the grid's step, shape [1] or [C].
        quant_min: n, smallest integer.
        quant_max: p, largest integer.
        dim: the dimension that scales vary along, None for one scale.

    Source:
        Nagel et al. 2020, equation 22.

    Example:
        >>> soft = SoftRounding(torch.tensor([0.14, 0.31]), torch.tensor([0.2]), -7, 7)
        >>> soft().detach(), soft.integers()
        (tensor([0.1400, 0.3100]), tensor([1., 2.]))
    """

    floor: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, quant_min: int, quant_max: int, dim: int | None = None
    ) -> None:
        super().__init__()
        if quant_min >= quant_max:
            raise ConfigError(f"SoftRounding: quant_min {quant_min} is not below quant_max {quant_max}")
        self.quant_min, self.quant_max = quant_min, quant_max
        self.register_buffer("scale", along(scale.detach().float(), weight.ndim, dim))
        steps = weight.detach().float() / self.scale
        self.register_buffer("floor", torch.floor(steps))
        # h = 0 and h = 1 are reached at finite V, where the sigmoid is stretched past them
        share = (steps - self.floor).clamp(0, 1)
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1))

    def h(self) -> torch.Tensor:
        """Return the share of a step that each weight is rounded up, 0 to 1."""
        return rectified_sigmoid(self.v)

    def forward(self) -> torch.Tensor:
        """Return the soft weight W~."""
        return (self.floor + self.h()).clamp(self.quant_min, self.quant_max) * self.scale

    @torch.no_grad()
    def integers(self) -> torch.Tensor:
        """Return the integers, each rounded up where h >= 1/2, as floats."""
        return (self.floor + (self.h() >= 0.5)).clamp(self.quant_min, self.quant_max)

    @torch.no_grad()
    def hard(self) -> torch.Tensor:
        """Return the rounded weight, s times `integers`."""
        return self.integers() * self.scale
