"""Penalties against their definitions: proximal steps against a search, norms and spectra against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.penalties import (
    block_shrinkage,
    inverse_variance,
    restricted_isometry,
    soft_orthogonality,
    soft_threshold,
)


@settings(deadline=None, max_examples=50)
@given(st.floats(-3, 3), st.floats(0, 2))
def test_soft_threshold_is_the_proximal_step_of_the_absolute_value(w: float, t: float) -> None:
    found = float(soft_threshold(torch.tensor(w, dtype=torch.float64), t))
    best = minimize_scalar(lambda v: 0.5 * (v - w) ** 2 + t * abs(v), bounds=(-4, 4), method="bounded")
    assert found == pytest.approx(best.x, abs=1e-4)
    assert (found == 0.0) == (abs(w) <= t)


@pytest.mark.parametrize("t", [0.1, 0.9, 5.0])
def test_block_shrinkage_is_the_proximal_step_of_the_norm(t: float) -> None:
    block = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = block * block_shrinkage(block.norm(), torch.tensor(t))
    w = block.numpy()
    best = minimize(lambda v: 0.5 * ((v - w) ** 2).sum() + t * math.sqrt((v * v).sum() + 1e-18), w, tol=1e-12)
    assert np.allclose(found.numpy(), best.x, atol=1e-4)
    assert bool((found == 0).all()) == (float(block.norm()) <= t)


def test_blocks_within_their_threshold_are_exactly_zero() -> None:
    factors = block_shrinkage(torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert factors.tolist() == [0.0, 0.0, 0.5, 0.75]


def test_inverse_variance_is_that_of_the_loop_and_finite_for_equal_norms() -> None:
    values = [0.5, 2.0, 3.5, 0.1]
    mean = sum(values) / 4
    variance = sum((v - mean) ** 2 for v in values) / 3
    found = inverse_variance(torch.tensor(values, dtype=torch.float64))
    assert float(found) == pytest.approx(1 / (variance + 1e-8), rel=1e-12)
    equal = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    inverse_variance(equal).backward()
    assert equal.grad is not None
    assert bool(equal.grad.isfinite().all())
    with pytest.raises(ConfigError, match="at least 2 blocks, not 1"):
        inverse_variance(torch.ones(1))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_soft_orthogonality_is_the_sum_over_pairs_and_has_the_gradient_of_either_side(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    short = rows.detach() if shape[0] <= shape[1] else rows.detach().T
    expected = sum((float(short[i] @ short[j]) - (i == j)) ** 2 for i in range(len(short)) for j in range(len(short)))
    found = soft_orthogonality(rows)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, rows)
    other = (rows.T @ rows - torch.eye(shape[1])).square().sum() if shape[0] <= shape[1] else None
    other = other if other is not None else (rows @ rows.T - torch.eye(shape[0])).square().sum()
    assert torch.allclose(torch.autograd.grad(other, rows)[0], gradient, atol=1e-10)
    assert float((other - found).detach()) == pytest.approx(abs(shape[0] - shape[1]), abs=1e-9)


def test_restricted_isometry_reaches_the_spectral_norm_from_below() -> None:
    rows = torch.randn(4, 7, dtype=torch.float64)
    exact = float(torch.linalg.eigvalsh(rows @ rows.T - torch.eye(4)).abs().max())
    found = [float(restricted_isometry(rows, steps)) for steps in (1, 2, 50)]
    assert found[0] <= found[1] <= exact + 1e-12
    assert found[2] == pytest.approx(exact, rel=1e-9)
    assert float(restricted_isometry(torch.eye(3))) == 0.0
    with pytest.raises(ConfigError, match="at least 1 step, not 0"):
        restricted_isometry(rows, 0)


def test_thresholds_below_zero_are_refused() -> None:
    for wrong in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="must be >= 0"):
            soft_threshold(torch.ones(1), wrong)
