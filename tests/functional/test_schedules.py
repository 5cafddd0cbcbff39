"""Schedules against the published formula, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.schedules import (
    SHAPES,
    Ramp,
    cosine,
    cubic,
    linear,
    multi_step,
    named_shape,
    polynomial,
)

SHARES = st.integers(0, 16).map(lambda k: k / 16)


@given(SHARES, SHARES, st.integers(0, 50), st.integers(1, 20), st.integers(1, 7))
def test_cubic_ramp_is_zhu_and_gupta_equation_1(initial: float, final: float, t0: int, n: int, dt: int) -> None:
    ramp = Ramp(initial=initial, final=final, start=t0, end=t0 + n * dt, every=dt, shape=cubic)
    updates = [t0 + k * dt for k in range(n + 1)]
    assert [step for step in range(t0 + n * dt + 20) if ramp.is_update(step)] == updates
    s_i, s_f = Fraction(initial), Fraction(final)
    for step in range(t0 + n * dt + 20):
        t = max((u for u in updates if u <= step), default=None)
        exact = s_i if t is None else s_f + (s_i - s_f) * (1 - Fraction(t - t0, n * dt)) ** 3
        assert abs(ramp.at(step) - float(exact)) < 1e-12
    assert ramp.at(t0 + n * dt) == final
    assert ramp.at(10**9) == final


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.integers(0, 80))
def test_last_update_is_the_latest_update(start: int, length: int, every: int, step: int) -> None:
    ramp = Ramp(initial=0.0, final=1.0, start=start, end=start + length, every=every)
    expected = max((s for s in range(step + 1) if ramp.is_update(s)), default=None)
    assert ramp.last_update(step) == expected


def test_a_window_that_dt_does_not_divide_still_ends_at_the_final_value() -> None:
    ramp = Ramp(initial=0.0, final=0.9, start=0, end=10, every=4)
    assert [s for s in range(20) if ramp.is_update(s)] == [0, 4, 8, 10]
    assert ramp.at(8) < ramp.at(9 + 1) == 0.9


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_rise_and_end_at_one(name: str) -> None:
    values = [SHAPES[name](k / 100) for k in range(101)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert name in ("constant", "one_shot") or values[0] == 0.0


def test_shapes_at_a_quarter() -> None:
    assert cubic(0.25) == 1 - 0.75**3
    assert linear(0.25) == 0.25
    assert cosine(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_a_function_is_a_shape_and_must_arrive() -> None:
    assert named_shape(lambda p: p**0.5)(0.25) == 0.5
    with pytest.raises(ConfigError, match="must map progress 1 to 1"):
        named_shape(lambda p: p / 2)
    with pytest.raises(ConfigError, match="no schedule named 'cubik'"):
        named_shape("cubik")


@pytest.mark.parametrize(
    "options", [{"start": 5, "end": 4}, {"start": -1, "end": 4}, {"start": 0, "end": 4, "every": 0}]
)
def test_impossible_windows_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Ramp(initial=0.0, final=1.0, **options)


@given(st.integers(1, 12), st.integers(0, 64).map(lambda k: k / 64))
def test_a_polynomial_of_any_exponent_only_rises(exponent: int, progress: float) -> None:
    """SparseML's (p - 1)^e + 1 goes to 2 for even exponents."""
    exact = 1 - (1 - Fraction(progress)) ** exponent
    shape = polynomial(exponent)
    assert shape(progress) == pytest.approx(float(exact), abs=1e-12)
    assert 0.0 <= shape(progress) <= 1.0
    assert shape(progress) <= shape(min(1.0, progress + 1 / 64))
    assert polynomial(0.5)(progress) == pytest.approx(1 - math.sqrt(1 - progress))


@given(st.integers(0, 7), st.integers(1, 8), st.integers(0, 40))
def test_exponential_is_the_formula_of_nncf(initial: int, more: int, epoch: int) -> None:
    """1 - (1 - s_i) ((1 - s_f) / (1 - s_i))^(e / E), for E = 40 epochs."""
    s_i = initial / 16
    s_f = s_i + more / 17
    ramp = Ramp(initial=s_i, final=s_f, start=0, end=40, shape=named_shape("exponential", s_i, s_f))
    density = 1.0 - s_i
    assert ramp.at(epoch) == pytest.approx(1 - density * ((1 - s_f) / density) ** (epoch / 40), abs=1e-12)


def test_exponential_needs_something_left_and_something_to_remove() -> None:
    for initial, final in ((0.0, 1.0), (0.5, 0.5), (0.6, 0.5), (1.0, 1.0)):
        with pytest.raises(ConfigError, match="first value < last value < 1"):
            named_shape("exponential", initial, final)


def test_multi_step_is_the_staircase_of_nncf() -> None:
    """Boundaries [20, 50], levels [0.1, 0.4, 0.8] of epochs 0 to 100, as bisect_right finds them."""
    levels, boundaries = [0.1, 0.4, 0.8], [20, 50]
    shape = named_shape("multi_step:0=0.125,0.2=0.5,0.5=1")
    for epoch in range(101):
        level = levels[sum(boundary <= epoch for boundary in boundaries)]
        assert 0.8 * shape(epoch / 100) == pytest.approx(level)
    assert multi_step([(0.5, 1.0)])(0.4) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polynomial:0", "must be > 0"),
        ("polynomial:nan", "must be > 0"),
        ("polynomial:", "no schedule named"),
        ("polynomial", "no schedule named"),
        ("multi_step:0.5", "no schedule named"),
        ("multi_step:0=a", "no schedule named"),
        ("multi_step:0.5=0.5,0.2=1", "must ascend"),
        ("multi_step:0=0.5,1.5=1", "must ascend"),
        ("multi_step:0=0.5", "end at 1"),
        ("multi_step:0=1.5,1=1", "end at 1"),
    ],
)
def test_texts_that_are_no_schedule(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named_shape(text)


def test_names_of_one_shape() -> None:
    assert named_shape("agp") is named_shape("cubic") is cubic
    assert named_shape("one_shot")(0.0) == 1.0
    assert named_shape("polynomial:3")(0.3) == pytest.approx(cubic(0.3))
