"""Which range a grid should cover: clipping rules on a histogram, and the rounding error they lead to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import affine_qparams, along, min_max

__all__ = [
    "Grid",
    "Range",
    "channel_mse_range",
    "entropy_range",
    "minmax_range",
    "mse_range",
    "percentile_range",
    "rounding_error",
    "signal_energy",
    "sqnr_db",
]

# A histogram is `counts` [n] of non-zero values and `edges` [n + 1], float64 and evenly spaced; mass is taken as spread
# evenly within a bin. Exact zeros are left out: every grid holds zero. A range is (low, high) and always holds zero.
Range = tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """The integers of a quantizer.

    Args:
        quant_min: smallest integer.
        quant_max: largest integer.
        symmetric: whether the range is symmetric about zero and the zero point 0 (signed grids).
    """

    quant_min: int
    quant_max: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """How many values there are, 2^b: 256 for uint8, 255 for int8 without its most negative value."""
        return self.quant_max - self.quant_min + 1


def signal_energy(counts: torch.Tensor, edges: torch.Tensor) -> float:
    """Return sum x^2 of a histogram: sum_i c_i (e_{i+1}^3 - e_i^3) / (3 (e_{i+1} - e_i))."""
    left, right = edges[:-1], edges[1:]
    return float((counts * (left * left + left * right + right * right) / 3).sum())


def rounding_error(
    counts: torch.Tensor, edges: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the squared error that rounding and clipping make, summed over a histogram, for each of k ranges.

    Formula, with s and z of the range, u = x / s + z, r(u) = clamp(round(u), q_min, q_max):
        E = sum_i c_i / (e_{i+1} - e_i) s^3 (G(u_{i+1}) - G(u_i)),  G(u) = r / 12 + (u - r)^3 / 3
        G' = (u - r(u))^2, so that the integral over a bin is exact, whether it spans many steps or a part of one.

    Args:
        counts: shape [n].
        edges: shape [n + 1].
        low: smallest value of each range, shape [k].
        high: largest value of each range, shape [k].
        grid: the integers.

    Returns:
        Shape [k], float64.
    """
    density = counts / edges.diff()
    errors: list[torch.Tensor] = []
    for some_low, some_high in zip(low.split(16), high.split(16), strict=True):  # 16 ranges at once stay in the cache
        scale, zero = affine_qparams(some_low, some_high, grid.quant_min, grid.quant_max, symmetric=grid.symmetric)
        scale = scale.double().unsqueeze(1)
        u = edges / scale + zero.unsqueeze(1)
        r = u.round().clamp_(grid.quant_min, grid.quant_max)
        u.sub_(r)
        integral = r.div_(12).add_(u * u * u, alpha=1 / 3)
        # a sum, not a matrix product: the same bits however many ranges there are
        errors.append(integral.diff(dim=1).mul_(density).sum(1) * scale.squeeze(1) ** 3)
    return torch.cat(errors)


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB, 10 log10(signal / noise); infinite without noise.

    Example:
        >>> sqnr_db(100.0, 1.0)
        20.0
    """
    if noise <= 0.0:
        return math.inf
    return 10.0 * math.log10(max(signal, 1e-300) / noise)


def minmax_range(counts: torch.Tensor, edges: torch.Tensor, grid: Grid) -> Range:
    """Return the range that clips nothing."""
    del counts
    low, high = min(float(edges[0]), 0.0), max(float(edges[-1]), 0.0)
    if grid.symmetric:
        return -max(-low, high), max(-low, high)
    return low, high


def percentile_range(
    counts: torch.Tensor, edges: torch.Tensor, grid: Grid, percentile: float = 99.99, zeros: float = 0.0
) -> Range:
    """Return the range that clips a share of 1 - percentile / 100 of all values.

    On a symmetric grid, and for data of one sign, the largest magnitudes are clipped. On an affine grid with data of
    both signs, one half of the share at each end. Values are interpolated within a bin.

    Args:
        counts: shape [n].
        edges: shape [n + 1].
        grid: the integers.
        percentile: above 0, at most 100.
        zeros: how many exact zeros there are beside the histogram.

    Source:
        McKinstry et al. 2018, "Discovering low-precision networks close to full-precision networks for efficient
        embedded inference"; Wu et al. 2020, "Integer quantization for deep learning inference: principles and
        empirical evaluation", on calibration.

    Raises:
        ConfigError: `percentile` is out of range.
    """
    if not 0.0 < percentile <= 100.0:
        raise ConfigError(f"percentile must be above 0 and at most 100, not {percentile}")
    low, high = minmax_range(counts, edges, grid)
    cut = (1.0 - percentile / 100.0) * (float(counts.sum()) + zeros)
    if grid.symmetric or low == 0.0 or high == 0.0:
        magnitudes, width = _magnitudes(counts, edges)
        top = _above(magnitudes, width * torch.arange(len(magnitudes) + 1, dtype=torch.float64), cut)
        return max(low, -top), min(high, top)
    top = max(_above(counts, edges, cut / 2), 0.0)
    bottom = max(_above(counts.flip(0), -edges.flip(0), cut / 2), 0.0)
    return -bottom, top


def mse_range(counts: torch.Tensor, edges: torch.Tensor, grid: Grid) -> Range:
    """Return the range whose grid has the least `rounding_error`.

    The ends that are free (both on an affine grid with data of both signs, else one) are shrunk from the extremes:
    first by powers of two (both ends) or of 2^(1/8) (one), then about the best so far in ever finer steps.

    Formula:
        argmin over (low, high) of sum (x - FQ(x; low, high))^2

    Source:
        Sung et al. 2015, "Resiliency of deep neural networks under quantization" (the step of least L2 error); both
        ends apart as in the initialization of Bhalgat et al. 2020, "LSQ+".
    """
    low, high = minmax_range(counts, edges, grid)
    two = not grid.symmetric and low < 0.0 < high
    ratio = 2.0 if two else 2.0**0.125
    start = ratio ** -torch.arange(0, 14 if two else 97, dtype=torch.float64)
    best = torch.ones(2, dtype=torch.float64)
    factors = start
    while True:
        pairs = torch.cartesian_prod(factors * best[0], factors * best[1]) if two else (factors * best[0])[:, None]
        pairs = pairs.expand(-1, 2).clamp(max=1.0)
        errors = rounding_error(counts, edges, low * pairs[:, 0], high * pairs[:, 1], grid)
        best = pairs[int(errors.argmin())]
        if ratio < 1.002:
            return low * float(best[0]), high * float(best[1])
        factors = ratio ** torch.tensor([0.0, -1.0, -0.5, 0.5, 1.0], dtype=torch.float64)  # a tie keeps the best
        ratio = ratio**0.5


def entropy_range(counts: torch.Tensor, edges: torch.Tensor, grid: Grid, candidates: int = 256) -> Range:
    """Return the range [-t, t] (within the extremes) whose coarse histogram diverges least from the fine one.

    For each t, on the histogram of |x|: P is the part below t with all that lies above added to its last bin; Q is that
    part (without what lies above) merged into the grid's positive levels, each level's mass spread evenly over those
    of its bins that are not empty. The t with the least KL(P || Q) is taken, the widest of equals. A grid has
    q_max + 1 positive levels when it is symmetric, all of them for data of one sign, and half of them when it is
    affine and the data has both signs.

    Formula:
        KL(P || Q) = sum_i p_i log(p_i / q_i), p and q normalized to 1

    Args:
        counts: shape [n].
        edges: shape [n + 1], with an edge at zero when the data has both signs.
        grid: the integers.
        candidates: at most so many t, evenly spaced from the number of levels to the number of bins.

    Source:
        Migacz 2017, "8-bit inference with TensorRT", GTC talk 7310, "Entropy calibration - pseudocode". There the zero
        bin takes the count of its neighbour; here exact zeros are not in the histogram.
    """
    import numpy as np

    low, high = minmax_range(counts, edges, grid)
    one_sided = low == 0.0 or high == 0.0
    levels = grid.quant_max + 1 if grid.symmetric else grid.levels if one_sided else grid.levels // 2
    folded, width = _magnitudes(counts, edges)
    magnitudes = folded.numpy()
    size, total = len(magnitudes), float(magnitudes.sum())
    best, best_divergence = size, math.inf
    for bins in range(size, levels - 1, -max(1, math.ceil((size - levels) / candidates))):
        inside = magnitudes[:bins]
        filled = inside > 0
        level = np.arange(bins) * levels // bins
        mass, members = np.bincount(level, inside), np.bincount(level, filled)
        kept = float(inside.sum())
        p, q = inside.copy(), np.divide(mass, members, out=mass, where=members > 0)[level] * filled
        p[-1] += total - kept
        if kept == 0.0 or (p[-1] > 0 and q[-1] == 0):
            continue  # what is clipped falls where Q has nothing: infinitely far
        p, q = p[filled] / total, q[filled] / kept
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best_divergence:
            best, best_divergence = bins, divergence
    top = best * width
    return max(low, -top), min(high, top)


def channel_mse_range(x: torch.Tensor, grid: Grid, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each channel of a tensor, the share of its own range whose grid has the least squared error.

    Both ends shrink by one factor t, from 1 down to 0.1 in steps of 0.02, then about the best in steps of 0.005; the
    error is that of the values themselves, not of a histogram. Memory is that of a few copies of the tensor.

    Formula:
        argmin over t of sum (x - FQ(x; t low, t high))^2, low and high the smallest and largest value of the channel

    Args:
        x: a weight, any shape.
        grid: the integers.
        dim: the dimension with a range for each index; None for one range.

    Returns:
        Smallest and largest values, float32, each of shape [channels], or [1].

    Source:
        As `mse_range`.
    """
    x = x.detach().float()
    dim = None if dim is None else dim % x.ndim
    low, high = min_max(x, dim)
    others = [d for d in range(x.ndim) if d != dim]

    def error(t: torch.Tensor) -> torch.Tensor:
        scale, zero = affine_qparams(low * t, high * t, grid.quant_min, grid.quant_max, symmetric=grid.symmetric)
        step, zero = along(scale, x.ndim, dim), along(zero, x.ndim, dim)
        # `fake_quantize` in place: five passes over the tensor
        wrong = (x * (1.0 / step)).round_().clamp_(grid.quant_min - zero, grid.quant_max - zero).mul_(step).sub_(x)
        return (wrong.square_().sum(others) if others else wrong.square_()).reshape(low.shape)

    best = torch.ones_like(low)
    least = error(best)
    for steps in ((-0.02 * i for i in range(1, 46)), (0.005 * i for i in (-3, -2, -1, 1, 2, 3))):
        start = best
        for step in steps:
            t = (start + step).clamp(max=1.0)
            now = error(t)
            best = torch.where(now < least, t, best)
            least = torch.minimum(now, least)
    return low * best, high * best


def _magnitudes(counts: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the histogram of |x| from zero on, and the width of its bins."""
    width = float(edges[-1] - edges[0]) / len(counts)
    first = round(float(edges[0]) / width)
    if abs(first * width - float(edges[0])) > 1e-6 * width:
        raise ConfigError("this needs a histogram with an edge at zero (or at a whole number of bins from it)")
    index = torch.arange(first, first + len(counts))
    index = torch.where(index < 0, -index - 1, index)
    folded = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    return folded.index_add_(0, index, counts.double()), width


def _above(counts: torch.Tensor, edges: torch.Tensor, cut: float) -> float:
    """Return the value above which `cut` of the mass lies, interpolated."""
    above = counts.flip(0).cumsum(0)
    bin_ = int(torch.searchsorted(above, torch.tensor(cut, dtype=above.dtype)))
    if bin_ >= len(counts):
        return float(edges[0])
    before = float(above[bin_ - 1]) if bin_ else 0.0
    index = len(counts) - 1 - bin_
    inside = float(counts[index])
    share = (cut - before) / inside if inside else 0.0
    return float(edges[index + 1] - share * (edges[index + 1] - edges[index]))
