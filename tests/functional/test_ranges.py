"""Clipping rules against slow references written from their formulas, on the streaming histogram they read."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.aciq import gaussian_clip, gaussian_range, laplace_clip, laplace_range
from torchopt_passes.functional.affine import affine_qparams, fake_quantize
from torchopt_passes.functional.histogram import StreamingHistogram
from torchopt_passes.functional.ranges import (
    Grid,
    Range,
    channel_mse_range,
    entropy_range,
    minmax_range,
    mse_range,
    percentile_range,
    rounding_error,
    signal_energy,
    sqnr_db,
)

U8, U4, U2 = Grid(0, 255, False), Grid(0, 15, False), Grid(0, 3, False)
S8, S4 = Grid(-127, 127, True), Grid(-7, 7, True)
GRIDS = [U8, U4, U2, S8, S4]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplace(n: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(n, generator=rng(seed), dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def student(n: int) -> torch.Tensor:
    normal = torch.randn(4, n, generator=rng(3))
    return normal[0] / (normal[1:].square().mean(0)).sqrt()


DATA = {
    "laplace": laplace(50_000),
    "normal": torch.randn(50_000, generator=rng()),
    "relu": torch.randn(50_000, generator=rng(1)).relu(),
    "gelu": torch.nn.functional.gelu(2 * torch.randn(50_000, generator=rng(2))),
    "heavy": student(50_000),
    "negative": -laplace(50_000, 1).abs() - 0.2,
}


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    seen = StreamingHistogram()
    seen.add(x)
    return seen.bins()


def true_error(x: torch.Tensor, found: Range, grid: Grid) -> float:
    low, high = (torch.tensor([end]) for end in found)
    scale, zero = affine_qparams(low, high, grid.quant_min, grid.quant_max, symmetric=grid.symmetric)
    return float((fake_quantize(x, scale, zero, grid.quant_min, grid.quant_max) - x).double().square().sum())


def true_sqnr(x: torch.Tensor, found: Range, grid: Grid) -> float:
    return sqnr_db(float(x.double().square().sum()), true_error(x, found, grid))


# the histogram


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(-30, 30), st.integers(0, 99)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_counts_are_the_same_in_any_order_and_any_cut(parts: list[tuple[int, float, int]], random: object) -> None:
    batches = [torch.randn(n, generator=rng(seed)).relu() * 2.0**scale - 0.3 for n, scale, seed in parts]
    batches[0] = torch.cat([batches[0], torch.zeros(3)])
    first, second = StreamingHistogram(), StreamingHistogram()
    for batch in batches:
        first.add(batch)
    values = torch.cat(batches)
    order = torch.randperm(len(values), generator=rng(random.randint(0, 9)))  # pyright: ignore
    for batch in values[order].split(7):
        second.add(batch)
    assert torch.equal(first.counts, second.counts)
    assert (first.exponent, first.zeros, first.low, first.high) == (
        second.exponent,
        second.zeros,
        second.low,
        second.high,
    )
    assert first.total == len(values) and first.zeros == int((values == 0).sum())
    counts, edges = first.bins()
    slow = [int(((values != 0) & (values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
    assert counts.tolist() == slow
    assert (first.low, first.high) == (float(values.min()), float(values.max()))


def test_resolution_is_2048_bins_for_the_wider_side() -> None:
    for widest in (1.0, 1.001, 1.999, 2.0, 3.3e38, 1e-30):
        counts, edges = histogram(torch.tensor([widest, widest * 1e-4]))
        assert 2048 <= round(widest / float(edges[1] - edges[0])) <= 4096 and float(counts.sum()) == 2


def test_state_does_not_grow_with_batches() -> None:
    def size(seen: StreamingHistogram) -> int:
        return sum(v.nbytes if isinstance(v, torch.Tensor) else 1 for v in vars(seen).values())

    seen = StreamingHistogram()
    start = size(seen)
    for i in range(200):
        seen.add(torch.randn(64, generator=rng(i)) * 1.1**i)
    assert seen.total == 200 * 64 and size(seen) == start == 8192 * 8 + 4


def test_awkward_values() -> None:
    seen = StreamingHistogram()
    seen.add(torch.zeros(5))
    seen.add(torch.empty(0))
    assert seen.zeros == seen.total == 5 and seen.bins()[0].tolist() == [0.0]
    seen.add(torch.tensor([1e-44, -1e-44]))  # subnormal
    seen.add(torch.tensor([3.0, -3.4e38], dtype=torch.float64))
    assert seen.total == 9 and seen.bins()[0].sum() == 4
    seen.add(torch.ones(2, dtype=torch.bfloat16))
    assert seen.total == 11
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match="finite"):
            seen.add(torch.tensor([1.0, bad]))
    assert seen.total == 11


# the error of a range


def slow_error(counts: list[float], edges: list[float], low: float, high: float, grid: Grid) -> float:
    """Rounding error by the midpoint rule, 4000 points in a bin."""
    scale, zero = affine_qparams(
        torch.tensor([low]), torch.tensor([high]), grid.quant_min, grid.quant_max, symmetric=grid.symmetric
    )
    s, z, total = float(scale), int(zero), 0.0
    for count, (left, right) in zip(counts, pairwise(edges), strict=True):
        x = left + (right - left) * (np.arange(4000) + 0.5) / 4000
        q = np.clip(np.round(x / s) + z, grid.quant_min, grid.quant_max)
        total += count * float(np.mean((x - s * (q - z)) ** 2))
    return total


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.integers(-8, 4),
    st.floats(0.05, 2.0),
    st.floats(-6, 0),
    st.floats(0.1, 6),
    st.sampled_from(GRIDS),
)
@settings(max_examples=80, deadline=None)
def test_rounding_error_is_the_integral(
    counts: list[int], first: int, width: float, low: float, high: float, grid: Grid
) -> None:
    edges = [(first + i) * width for i in range(len(counts) + 1)]
    c, e = torch.tensor(counts, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64)
    got = rounding_error(c, e, torch.tensor([low, low / 2]), torch.tensor([high, high]), grid)
    for value, some_low in zip(got.tolist(), (low, low / 2), strict=True):
        expected = slow_error([float(n) for n in counts], edges, some_low, high, grid)
        assert value == pytest.approx(expected, rel=2e-3, abs=1e-9)
    mid = np.concatenate([a + (b - a) * (np.arange(4000) + 0.5) / 4000 for a, b in pairwise(edges)])
    assert signal_energy(c, e) == pytest.approx(
        float(np.mean(np.repeat(counts, 4000) * mid**2) * len(counts)), rel=1e-4
    )


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sqnr_of_the_histogram_is_that_of_the_data(name: str, grid: Grid) -> None:
    x = DATA[name]
    counts, edges = histogram(x)
    found = mse_range(counts, edges, grid)
    error = rounding_error(counts, edges, torch.tensor([found[0]]), torch.tensor([found[1]]), grid)
    assert sqnr_db(signal_energy(counts, edges), float(error)) == pytest.approx(true_sqnr(x, found, grid), abs=0.1)


def test_sqnr_db() -> None:
    assert sqnr_db(100.0, 1.0) == 20.0 and sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(3.0, 2.0) == pytest.approx(10 * math.log(1.5) / math.log(10))


# the rules


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_quantile_of_the_sorted_values(percentile: float) -> None:
    share = 1 - percentile / 100
    for name in DATA:
        x = DATA[name].double()
        seen = StreamingHistogram()
        seen.add(DATA[name])
        counts, edges = seen.bins()
        width = float(edges[1] - edges[0])
        near = 3 * width if percentile < 99.9 else 60 * width  # the tail is thin: several bins between two values
        top = float(x.abs().quantile(1 - share))
        low, high = percentile_range(counts, edges, S4, percentile, seen.zeros)
        assert -low == high == pytest.approx(top, abs=near)
        low, high = percentile_range(counts, edges, U8, percentile, seen.zeros)
        if name in {"relu", "negative"}:
            expected = (0.0, top) if name == "relu" else (-top, 0.0)
        else:
            expected = (float(x.quantile(share / 2)), float(x.quantile(1 - share / 2)))
        assert (low, high) == pytest.approx(expected, abs=near)


def test_percentile_counts_zeros_and_refuses_nonsense() -> None:
    counts, edges = torch.ones(100, dtype=torch.float64), torch.arange(101, dtype=torch.float64)
    assert percentile_range(counts, edges, U8, 90.0) == (0.0, pytest.approx(90.0))
    assert percentile_range(counts, edges, U8, 90.0, zeros=100) == (0.0, pytest.approx(80.0))
    for bad in (0.0, -1.0, 100.1):
        with pytest.raises(ConfigError, match="percentile"):
            percentile_range(counts, edges, U8, bad)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_is_as_good_as_an_exhaustive_search(name: str, grid: Grid) -> None:
    counts, edges = histogram(DATA[name])
    low, high = minmax_range(counts, edges, grid)
    t = torch.linspace(0.005, 1, 60 if low < 0 < high and not grid.symmetric else 600, dtype=torch.float64)
    pairs = torch.cartesian_prod(t, t) if len(t) == 60 else t[:, None].expand(-1, 2)
    exhaustive = float(rounding_error(counts, edges, low * pairs[:, 0], high * pairs[:, 1], grid).min())
    found = mse_range(counts, edges, grid)
    error = float(rounding_error(counts, edges, torch.tensor([found[0]]), torch.tensor([found[1]]), grid))
    assert error <= exhaustive * 1.005
    assert true_error(DATA[name], found, grid) <= 1.02 * true_error(DATA[name], (low, high), grid)


def slow_entropy(magnitudes: list[float], levels: int, step: int) -> int:
    """The pseudocode of Migacz 2017, bin by bin; returns how many bins are kept."""
    size, divergences = len(magnitudes), {}
    for i in range(size, levels - 1, -step):
        reference = list(magnitudes[:i])
        reference[-1] += sum(magnitudes[i:])
        candidate = [0.0] * i
        for level in range(levels):
            members = [j for j in range(i) if j * levels // i == level]
            filled = [j for j in members if magnitudes[j] > 0]
            for j in filled:
                candidate[j] = sum(magnitudes[k] for k in members) / len(filled)
        p, q = [v / sum(reference) for v in reference], sum(candidate)
        terms = [a * math.log(a / (b / q)) if b > 0 else math.inf for a, b in zip(p, candidate, strict=True) if a > 0]
        divergences[i] = sum(terms)
    return max(divergences, key=lambda i: (-divergences[i], i))


@given(st.lists(st.integers(0, 40), min_size=20, max_size=60), st.sampled_from([U2, U4, S4]))
@settings(max_examples=40, deadline=None)
def test_entropy_is_the_pseudocode(values: list[int], grid: Grid) -> None:
    values[-1] += 1
    counts = torch.tensor(values, dtype=torch.float64)
    edges = torch.arange(len(values) + 1, dtype=torch.float64) / 8
    levels = grid.quant_max + 1
    low, high = entropy_range(counts, edges, grid, candidates=10)
    step = max(1, math.ceil((len(values) - levels) / 10))
    assert high == slow_entropy([float(v) for v in values], levels, step) / 8
    assert low == (-high if grid.symmetric else 0.0)
    mirrored = entropy_range(counts.flip(0), -edges.flip(0), grid, candidates=10)
    assert mirrored == (-high, -low)


def test_entropy_of_both_signs_is_that_of_magnitudes() -> None:
    counts, edges = histogram(DATA["gelu"])
    low, high = entropy_range(counts, edges, U8)
    assert low == pytest.approx(-0.17, abs=0.005)
    assert entropy_range(counts, edges, S8) == (-high, high)  # 128 positive levels in both
    with pytest.raises(ConfigError, match="edge at zero"):
        entropy_range(counts, edges + 0.3 * (edges[1] - edges[0]), U8)


def expected_error(clip: float, levels: int, density: str) -> float:
    """E[(X - Q(X))^2] of Banner et al.: both tails by integration, and noise of a uniform density within a step."""

    def weight(x: float) -> float:
        return math.exp(-x) / 2 if density == "laplace" else math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    tail = quad(lambda x: (x - clip) ** 2 * weight(x), clip, clip + 60, epsabs=1e-16, limit=200)[0]
    return 2 * tail + clip**2 / (3 * levels**2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("density", ["laplace", "gaussian"])
def test_aciq_clip_has_the_least_expected_error(bits: int, density: str) -> None:
    clip = (laplace_clip if density == "laplace" else gaussian_clip)(2**bits)
    slow: Any = minimize_scalar(
        lambda a: expected_error(a, 2**bits, density), bounds=(0.5, 15), method="bounded", options={"xatol": 1e-7}
    )
    assert clip == pytest.approx(slow.x, rel=2e-3)
    assert expected_error(clip, 2**bits, density) <= slow.fun * (1 + 1e-7)


def test_aciq_ranges_measure_the_deviation() -> None:
    counts, edges = histogram(DATA["laplace"])
    assert laplace_range(counts, edges, U4)[1] == pytest.approx(laplace_clip(16), rel=0.02)
    assert gaussian_range(*histogram(3 * DATA["normal"] + 0.5), U4) == pytest.approx(
        (0.5 - 3 * gaussian_clip(16), 0.5 + 3 * gaussian_clip(16)), rel=0.03
    )
    # half a Gaussian: all 16 levels on one side, as 32 on both; half of the values are zero, and count for nothing
    assert gaussian_range(*histogram(DATA["relu"]), U4) == (0.0, pytest.approx(gaussian_clip(32), rel=0.02))
    low, high = laplace_range(counts, edges, S4)
    assert -low == high == pytest.approx(laplace_clip(15), rel=0.02)


# what they are worth


def test_decibels_on_heavy_tails_at_four_bits() -> None:
    x = DATA["laplace"]
    counts, edges = histogram(x)
    for grid in (U4, S4):
        base = true_sqnr(x, minmax_range(counts, edges, grid), grid)
        assert true_sqnr(x, mse_range(counts, edges, grid), grid) > base + 4.0
        assert true_sqnr(x, laplace_range(counts, edges, grid), grid) > base + 4.0
        best = true_sqnr(x, mse_range(counts, edges, grid), grid)
        assert true_sqnr(x, laplace_range(counts, edges, grid), grid) > best - 0.1  # the data is what it assumes
    heavy = DATA["heavy"]
    counts, edges = histogram(heavy)
    base = true_sqnr(heavy, minmax_range(counts, edges, U4), U4)
    assert true_sqnr(heavy, mse_range(counts, edges, U4), U4) > base + 5.0
    normal = DATA["normal"]
    counts, edges = histogram(normal)
    gauss = true_sqnr(normal, gaussian_range(counts, edges, U4), U4)
    assert gauss > true_sqnr(normal, mse_range(counts, edges, U4), U4) - 0.1
    assert gauss > true_sqnr(normal, laplace_range(counts, edges, U4), U4) + 1.0


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_range_lies_within_the_extremes_and_holds_zero(name: str, grid: Grid) -> None:
    counts, edges = histogram(DATA[name])
    low, high = minmax_range(counts, edges, grid)
    for rule in (percentile_range, mse_range, entropy_range, gaussian_range, laplace_range):
        a, b = rule(counts, edges, grid)
        assert low <= a <= 0.0 <= b <= high and a < b, rule.__name__
        if grid.symmetric:
            assert a == -b
    zeros = torch.zeros(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for rule in (percentile_range, mse_range, entropy_range, gaussian_range, laplace_range):
        assert math.isfinite(rule(*zeros, grid)[1])


# weights


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("grid", [U4, S4, S8], ids=str)
def test_channel_ranges_are_as_good_as_a_dense_search(dim: int | None, grid: Grid) -> None:
    weight = student(6 * 5 * 40).reshape(6, 5, 40)
    low, high = channel_mse_range(weight, grid, dim)
    channels = [weight] if dim is None else list(weight.unbind(dim))
    assert len(low) == len(channels)
    exact, dense, got = [], [], []
    for index, channel in enumerate(channels):
        extremes = (min(float(channel.min()), 0.0), max(float(channel.max()), 0.0))
        exact.append(true_error(channel, extremes, grid))
        tried = np.linspace(0.1, 1.0, 400).tolist()
        dense.append(min(true_error(channel, (t * extremes[0], t * extremes[1]), grid) for t in tried))
        got.append(true_error(channel, (float(low[index]), float(high[index])), grid))
    assert all(ours <= theirs * (1 + 1e-5) for ours, theirs in zip(got, exact, strict=True))
    lost = np.log10(np.array(got) / dense)  # the error of few values is jagged: the dense search finds lucky ranges
    assert 10 * lost.mean() < 0.25 and 10 * lost.max() < 1.0
    gained = 10 * np.log10(np.array(exact) / got).mean()
    assert gained > (0.0 if grid is S8 else 0.1 if dim == -1 else 0.4)


def test_channel_ranges_of_one_dimension_and_of_zeros() -> None:
    low, high = channel_mse_range(torch.tensor([1.0, -2.0, 0.0]), S8, 0)
    assert torch.equal(high, torch.tensor([1.0, -2.0, 0.0])) and torch.equal(low, high)
    low, high = channel_mse_range(torch.zeros(3, 4), S8, 0)
    assert torch.equal(low, torch.zeros(3)) and torch.equal(high, torch.zeros(3))
