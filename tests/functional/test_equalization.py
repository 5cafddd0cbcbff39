"""Scales between layers, pooled moments and channel splitting: each against a slow reference of its formula."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.functional.equalization import (
    absorbed_bias,
    activation_scale,
    carried_bias,
    equalization_scale,
    pool_moments,
    smoothing_scale,
    split_channels,
    split_outliers,
)

positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(deadline=None)
@given(positive, st.randoms(use_true_random=False))
def test_equalized_sides_have_the_geometric_mean_as_range(made: list[float], chance: random.Random) -> None:
    read = [chance.uniform(1e-3, 1e3) for _ in made]
    r1, r2 = torch.tensor(made, dtype=torch.float64), torch.tensor(read, dtype=torch.float64)
    scale = equalization_scale(r1, r2)
    for s, a, b in zip(scale.tolist(), made, read, strict=True):
        assert s == pytest.approx(math.sqrt(a * b) / b, rel=1e-12)  # equation 11
        assert a / s == pytest.approx(b * s, rel=1e-12) == pytest.approx(math.sqrt(a * b), rel=1e-12)
    assert torch.allclose(equalization_scale(r1 / scale, r2 * scale), torch.ones_like(scale), rtol=1e-12)


def test_dead_channels_keep_their_scale() -> None:
    zero, one = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert equalization_scale(zero, one).tolist() == [1.0, 1.0, 1.0]
    assert smoothing_scale(zero, one, 0.5).tolist() == [1.0, 1.0, 1.0]


def test_channels_that_are_as_good_as_dead_do_not_overflow() -> None:
    nearly_zero, one = torch.tensor([1e-30, 1.0, 1e-30]), torch.tensor([1.0, 1e-30, 1e-30])
    assert smoothing_scale(nearly_zero, one, 0.5).tolist() == pytest.approx([1e-5, 1e5, 1.0])


@settings(deadline=None)
@given(positive, st.floats(0.0, 1.0), st.randoms(use_true_random=False))
def test_smoothing_is_equation_4_and_a_second_time_does_nothing(
    x: list[float], alpha: float, chance: random.Random
) -> None:
    w = [chance.uniform(1e-3, 1e3) for _ in x]
    xs, ws = torch.tensor(x, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)
    scale = smoothing_scale(xs, ws, alpha)
    for s, a, b in zip(scale.tolist(), x, w, strict=True):
        assert s == pytest.approx(a**alpha / b ** (1 - alpha), rel=1e-12)
    assert torch.allclose(smoothing_scale(xs / scale, ws * scale, alpha), torch.ones_like(scale), rtol=1e-9)


@settings(deadline=None)
@given(positive, st.floats(0.0, 1.0))
def test_activation_scales_lie_around_one(mean: list[float], alpha: float) -> None:
    scale = activation_scale(torch.tensor(mean, dtype=torch.float64), alpha).tolist()
    powers = [m**alpha for m in mean]
    middle = math.sqrt(max(powers) * min(powers))
    assert scale == pytest.approx([p / middle for p in powers], rel=1e-9)
    assert max(scale) * min(scale) == pytest.approx(1.0, rel=1e-9)


def test_activation_scale_of_silent_channels() -> None:
    assert activation_scale(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]
    assert activation_scale(torch.tensor([0.0, 1.0, 4.0]), 0.5).tolist() == pytest.approx([2**-0.5, 2**-0.5, 2**0.5])


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(-1e3, 1e3))
def test_pooled_moments_are_those_of_everything(n: int, m: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(n * 31 + m)
    a = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(m, 2, generator=generator, dtype=torch.float64) + offset

    def moments(x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        return len(x), x.mean(0), (x - x.mean(0)).square().sum(0)

    count, mean, squares = pool_moments(moments(a), moments(b))
    both = torch.cat([a, b])
    assert count == n + m
    torch.testing.assert_close(mean, both.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(squares, (both - both.mean(0)).square().sum(0), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6), st.integers(0, 8))
def test_the_largest_channel_is_halved_each_time(sizes: list[float], count: int) -> None:
    values = torch.tensor(sizes).tolist()
    weight = torch.tensor([values, [-v / 3 for v in values]], dtype=torch.float64)
    chosen = split_outliers(torch.tensor(sizes), count)
    assert len(chosen) == count
    for place in chosen:  # the paper's loop
        assert values[place] == max(values)
        values[place] /= 2
        values.append(values[place])
    split = split_channels(weight, 1, chosen)
    assert split[0].abs().tolist() == values
    origin = list(range(len(sizes)))
    for place in chosen:
        origin.append(origin[place])
    x = torch.randn(len(sizes), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    torch.testing.assert_close(split @ x[torch.tensor(origin)], weight @ x, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 50), min_size=1, max_size=6), st.floats(0.0, 4.0), st.randoms(use_true_random=False))
def test_absorbed_bias_is_three_deviations_below_the_mean(
    beta: list[float], deviations: float, chance: random.Random
) -> None:
    gamma = [chance.uniform(-3, 3) for _ in beta]
    got = absorbed_bias(torch.tensor(beta).double(), torch.tensor(gamma).double(), deviations).tolist()
    for c, b, g in zip(got, torch.tensor(beta).tolist(), torch.tensor(gamma).tolist(), strict=True):
        expected = max(0.0, b - deviations * abs(g))
        assert c == pytest.approx(expected if expected > 1e-6 * b else 0.0, abs=1e-12)


@pytest.mark.parametrize(("groups", "kernel"), [(1, ()), (1, (3,)), (2, (2, 3)), (4, (3, 3))])
def test_carried_bias_is_the_sum_over_inputs_and_kernel(groups: int, kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    value = torch.randn(4, generator=generator, dtype=torch.float64)
    got = carried_bias(weight, value, groups)
    for out in range(8):
        group = out // (8 // groups)
        total = 0.0
        for i in range(4 // groups):
            total += sum(float(w) for w in weight[out, i].flatten()) * float(value[group * (4 // groups) + i])
        assert float(got[out]) == pytest.approx(total, rel=1e-12)
