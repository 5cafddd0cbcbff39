"""Units, axes and groups: sums, norms and means against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance, units

SIZE = 4
SCORES = st.lists(st.tuples(st.integers(0, 12).map(lambda k: k / 4), st.integers(-1, SIZE - 1)), min_size=1, max_size=9)
AXES = st.lists(
    st.lists(st.one_of(st.integers(0, 12).map(lambda k: k / 4), st.just(math.nan)), min_size=SIZE, max_size=SIZE),
    min_size=1,
    max_size=4,
)


def same(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.dtype is torch.float64
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True)


@settings(deadline=None)
@given(SCORES, st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_unit_scores(pairs: list[tuple[float, int]], p: float) -> None:
    expected: list[float] = []
    for unit in range(SIZE):
        own = [score for score, of in pairs if of == unit]
        total = max(own, default=0.0) if p == math.inf else sum(score**p for score in own) ** (1 / p)
        expected.append(total if own else math.nan)
    scores, unit_of = torch.tensor([s for s, _ in pairs]), np.array([u for _, u in pairs])
    same(units.unit_scores(scores, unit_of, SIZE, p), expected)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_norm_of_a_unit_is_the_norm_of_all_its_weights(p: float) -> None:
    weight = torch.randn(6, 4, 3, dtype=torch.float64)
    unit_of = np.array([1, 0, 1, -1, 0, 1])
    for dim, of in ((0, unit_of), (1, unit_of[:4])):
        rows = units.channel_rows(weight, dim)
        found = units.unit_scores(importance.lp_norm(rows, p), of, 2, p)
        for unit in (0, 1):
            inside = weight.index_select(dim, torch.from_numpy(np.flatnonzero(of == unit)))
            assert math.isclose(float(found[unit]), float(inside.flatten().norm(p)), rel_tol=1e-12)


def test_norms_neither_overflow_nor_vanish() -> None:
    found = units.unit_scores(
        torch.tensor([3e-200, 4e-200, 3e200, 4e200], dtype=torch.float64), np.array([0, 0, 1, 1]), 2, 2.0
    )
    same(found, [5e-200, 5e200])


def test_terms_with_signs_cancel_in_a_unit() -> None:
    scores = units.unit_scores(torch.tensor([3.0, -2.0, -4.0]), np.array([0, 0, 1]), 2)
    assert scores.tolist() == [1.0, -4.0]


@settings(deadline=None)
@given(AXES.map(lambda axes: axes[0]), st.sampled_from(["none", "mean", "max"]))
def test_normalize(axis: list[float], how) -> None:
    held = [score for score in axis if not math.isnan(score)]
    divisor = {"none": 1.0, "mean": sum(held) / max(len(held), 1), "max": max(held, default=0.0)}[how]
    same(units.normalize(torch.tensor(axis), how), [score / (divisor or 1.0) for score in axis])


@settings(deadline=None)
@given(AXES, st.sampled_from(["mean", "max", "product"]))
def test_aggregate(axes: list[list[float]], how) -> None:
    expected: list[float] = []
    for unit in range(SIZE):
        own = [axis[unit] for axis in axes if not math.isnan(axis[unit])]
        if not own:
            expected.append(math.nan)
        elif how == "product":
            expected.append(math.prod(own) ** (1 / len(own)))
        else:
            expected.append(max(own) if how == "max" else sum(own) / len(own))
    same(units.aggregate([torch.tensor(axis) for axis in axes], how), expected)


def test_product_of_many_axes_does_not_vanish() -> None:
    axes = [torch.tensor([1e-3, 2e-3])] * 400  # their plain product is zero in float64
    assert torch.allclose(units.aggregate(axes, "product"), torch.tensor([1e-3, 2e-3]).double(), rtol=1e-12)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="normalize must be"):
        units.normalize(torch.ones(2), "sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="aggregation must be"):
        units.aggregate([torch.ones(2)], "sum")  # pyright: ignore[reportArgumentType]
