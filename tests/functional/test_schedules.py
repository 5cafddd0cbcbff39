"""Schedules against the published formula, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.schedules import SHAPES, Ramp, cosine, cubic, linear, named_shape

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
    assert name == "constant" or values[0] == 0.0


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
