"""HQQ: fit zero point or scale of a weight's grids to a sparse error, without data, by half-quadratic splitting."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.groupwise import GroupGrid, fit_range

__all__ = ["fit_hqq", "shrink"]


def shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """Return the generalized soft threshold: the minimizer of |y|^p + beta / 2 (y - x)^2, in closed approximation.

    Formula: sign(x) relu(|x| - |x|^(p - 1) / beta); for p = 1 the soft threshold.

    Args:
        x: any shape.
        beta: weight of the quadratic term.
        p: 0 < p <= 1.

    Source:
        Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equation of sub-problem 1.

    Example:
        >>> shrink(torch.tensor([-2.0, 0.1, 1.0]), beta=2.0, p=1.0)
        tensor([-1.5000,  0.0000,  0.5000])
    """
    size = x.abs()
    power = torch.where(size > 0, size, torch.ones_like(size)).pow(p - 1)
    return x.sign() * torch.relu(size - power / beta)


def fit_hqq(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
) -> GroupGrid:
    """Fit each group's zero point (affine) or scale (symmetric) to the error ||W - s (q - z)||_p^p, p < 1.

    Formula, from the range's grid, in turn until no group's mean error falls, beta <- kappa beta:
        q = round(w / s + z),  e = shrink(w - s (q - z), beta, p)
        affine:    z = mean(q - (w - e) / s) over the group, a real number
        symmetric: s = sum (w - e) q / sum q^2 over the group

    A norm below 2 lets few large errors be, so outliers do not stretch the grid of all others.

    Args:
        weight: shape [out, in].
        bits: 2 to 8.
        group_size: columns in a group.
        symmetric: whether the zero point stays 0 and the scale is fitted.
        p: of the norm.
        beta: first weight of the quadratic term; relative to a group whose steps are 1 for the scale.
        kappa: its growth a step.
        steps: at most so many.

    Returns:
        For each group the grid of the step with the smallest mean absolute error.

    Raises:
        ConfigError: an option is out of range.

    Source:
        Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """
    if not 0 < p <= 1 or beta <= 0 or kappa < 1 or steps < 1:
        raise ConfigError("fit_hqq: 0 < p <= 1, beta > 0, kappa >= 1, steps >= 1")
    grid = fit_range(weight, bits, group_size, symmetric=symmetric)
    groups = weight.float().unflatten(1, (-1, group_size))
    best, least = grid, torch.full_like(grid.scale, float("inf"))
    for _ in range(steps):
        scale, zero_point = grid.scale.unsqueeze(-1), grid.zero_point.unsqueeze(-1)
        integers = torch.round(groups / scale + zero_point).clamp(grid.quant_min, grid.quant_max)
        residual = groups - (integers - zero_point) * scale
        error = residual.abs().mean(-1)
        wins = error < least
        if not bool(wins.any()):
            break
        least = torch.minimum(error, least)
        best = GroupGrid(
            torch.where(wins, grid.scale, best.scale),
            torch.where(wins, grid.zero_point, best.zero_point),
            grid.quant_min,
            grid.quant_max,
            group_size,
        )
        sparse = shrink(residual, beta, p)
        if symmetric:
            bottom = integers.square().sum(-1)
            fitted = ((groups - sparse) * integers).sum(-1) / bottom
            fitted = torch.where((bottom > 0) & (fitted > 0), fitted, grid.scale)
            grid = GroupGrid(fitted, grid.zero_point, grid.quant_min, grid.quant_max, group_size)
        else:
            fitted = (integers - (groups - sparse) / scale).mean(-1)
            grid = GroupGrid(grid.scale, fitted, grid.quant_min, grid.quant_max, group_size)
        beta *= kappa
    return best
