"""ACIQ: the clip that is best for a Gaussian or a Laplace distribution, solved from the formula of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from torchopt_passes.functional.ranges import Grid, Range, minmax_range, signal_energy

__all__ = ["gaussian_clip", "gaussian_range", "laplace_clip", "laplace_range"]


@cache
def laplace_clip(levels: int) -> float:
    """Return alpha / b of the least expected squared error for Laplace data with mean absolute deviation b.

    Formula, with 2^M levels:
        E = 2 b^2 exp(-alpha / b) + alpha^2 / (3 2^(2M)),  dE/dalpha = 0:  alpha / b = W(3 2^(2M)), W Lambert's function

    Source:
        Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment", the
        section on ACIQ.

    Example:
        >>> [round(laplace_clip(2**bits), 2) for bits in (2, 3, 4)]
        [2.83, 3.9, 5.03]
    """
    from scipy.special import lambertw

    return float(lambertw(3.0 * levels**2).real)


@cache
def gaussian_clip(levels: int) -> float:
    """Return alpha / sigma of the least expected squared error for Gaussian data.

    Formula, with 2^M levels, a = alpha / sigma:
        E / sigma^2 = (a^2 + 1) (1 - erf(a / sqrt 2)) - sqrt(2 / pi) a exp(-a^2 / 2) + a^2 / (3 2^(2M)),  dE/da = 0:
        a (1 - erf(a / sqrt 2)) - sqrt(2 / pi) exp(-a^2 / 2) + a / (3 2^(2M)) = 0

    Source:
        As `laplace_clip`.

    Example:
        >>> [round(gaussian_clip(2**bits), 2) for bits in (2, 3, 4)]
        [1.71, 2.15, 2.56]
    """
    from scipy.optimize import brentq

    def slope(a: float) -> float:
        tail = a * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return tail + a / (3 * levels**2)

    root: Any = brentq(slope, 1e-3, 30.0)
    return float(root)


def laplace_range(counts: torch.Tensor, edges: torch.Tensor, grid: Grid) -> Range:
    """Return the range of `laplace_clip`, b measured on the histogram; see `gaussian_range` for the cases."""

    def mean_deviation(counts: torch.Tensor, edges: torch.Tensor) -> float:
        return float((counts * ((edges[:-1] + edges[1:]) / 2).abs()).sum() / counts.sum())

    return _analytic(counts, edges, grid, laplace_clip, mean_deviation)


def gaussian_range(counts: torch.Tensor, edges: torch.Tensor, grid: Grid) -> Range:
    """Return the range of `gaussian_clip`, sigma measured on the histogram, within its extremes.

    On a symmetric grid: -alpha to alpha, the deviation taken about zero. On an affine grid: mean - alpha to mean +
    alpha. For data of one sign (half a Gaussian, as behind a ReLU): 0 to alpha, the deviation taken about zero; the
    2^M levels lie on one side, so alpha is that of 2^(M+1).

    Source:
        As `laplace_clip`; one more bit for one side as in Distiller's `AciqAsymmetricClipper`.
    """

    def deviation(counts: torch.Tensor, edges: torch.Tensor) -> float:
        return math.sqrt(signal_energy(counts, edges) / float(counts.sum()))

    return _analytic(counts, edges, grid, gaussian_clip, deviation)


def _analytic(
    counts: torch.Tensor,
    edges: torch.Tensor,
    grid: Grid,
    clip: Callable[[int], float],
    deviation: Callable[[torch.Tensor, torch.Tensor], float],
) -> Range:
    low, high = minmax_range(counts, edges, grid)
    if not float(counts.sum()):
        return low, high
    one_sided = not grid.symmetric and (low == 0.0 or high == 0.0)
    mean = 0.0
    if not (grid.symmetric or one_sided):
        mean = float((counts * (edges[:-1] + edges[1:]) / 2).sum() / counts.sum())
    alpha = clip(2 * grid.levels if one_sided else grid.levels) * deviation(counts, edges - mean)
    return max(low, min(mean - alpha, 0.0)), min(high, max(mean + alpha, 0.0))
