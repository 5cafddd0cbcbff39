"""AdaRound's formulas against the paper's, and that learned rounding beats rounding to nearest."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.adaround import SoftRounding, beta_at, rectified_sigmoid, rounding_loss


@settings(max_examples=50, deadline=None)
@given(v=st.floats(-10, 10))
def test_rectified_sigmoid_is_equation_23(v: float) -> None:
    expected = min(max(1 / (1 + math.exp(-v)) * 1.2 - 0.1, 0.0), 1.0)
    assert float(rectified_sigmoid(torch.tensor(v, dtype=torch.float64))) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(h=st.lists(st.floats(0, 1), min_size=1, max_size=5), beta=st.floats(2, 20))
def test_rounding_loss_is_equation_24(h: list[float], beta: float) -> None:
    expected = sum(1 - abs(2 * x - 1) ** beta for x in h)
    assert float(rounding_loss(torch.tensor(h, dtype=torch.float64), beta)) == pytest.approx(expected, abs=1e-9)


def test_beta_is_off_then_falls_from_20_to_2() -> None:
    values = [beta_at(step, 50) for step in range(51)]
    assert values[:10] == [None] * 10
    rest = [v for v in values if v is not None]
    assert len(rest) == 41 and rest[0] == 20.0 and rest[-1] == 2.0
    assert all(a >= b for a, b in pairwise(rest))
    assert beta_at(30, 50) == pytest.approx(11.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8))
def test_it_starts_at_the_weight_and_ends_on_the_grid_a_step_away_at_most(seed: int, bits: int) -> None:
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    high = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / high
    soft = SoftRounding(weight, scale, -high, high, 0)
    torch.testing.assert_close(soft().detach(), weight, rtol=1e-4, atol=1e-5 * float(scale.max()) + 1e-5)
    integers = soft.integers()
    assert torch.equal(integers, integers.round()) and float(integers.abs().max()) <= high
    assert bool(((soft.hard() - weight).abs() <= scale.unsqueeze(1) * (0.5 + 1e-3)).all())


def test_learned_rounding_beats_nearest_on_correlated_inputs() -> None:
    weight = torch.randn(8, 32)
    x = torch.randn(256, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(256, 32)
    scale = weight.abs().amax(1) / 3
    soft = SoftRounding(weight, scale, -3, 3, 0)
    nearest = soft.hard()
    optimizer, steps = torch.optim.Adam(soft.parameters(), lr=3e-2), 300

    def error(rounded: torch.Tensor) -> torch.Tensor:
        return (x @ (rounded - weight).T).square().sum()

    for step in range(steps):
        loss, beta = error(soft()) / error(nearest), beta_at(step, steps)
        if beta is not None:
            loss = loss + 3 * rounding_loss(soft.h(), beta) / weight.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(error(soft.hard())) < 0.4 * float(error(nearest))
    h = soft.h().detach()
    assert float(((h > 0.05) & (h < 0.95)).float().mean()) < 0.05  # the regularizer made it decide


def test_gradient_reaches_v_where_it_is_not_clipped() -> None:
    soft = SoftRounding(torch.tensor([0.5, 5.0]), torch.tensor([1.0]), -2, 2)
    soft().sum().backward()
    assert soft.v.grad is not None and float(soft.v.grad[0]) > 0 and float(soft.v.grad[1]) == 0
    with pytest.raises(ConfigError):
        SoftRounding(torch.zeros(1), torch.ones(1), 1, 1)
