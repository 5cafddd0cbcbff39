"""Hard concrete gates and bottleneck gates against the papers' formulas, and against frequencies of draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest, norm

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.bottleneck import bottleneck_bound, noise_to_signal, sample_bottleneck
from torchopt_passes.functional.draws import normal_rows, seed_of, uniform
from torchopt_passes.functional.hard_concrete import (
    check_stretch,
    closing_point,
    gate_at_test,
    log_alpha_of,
    open_probability,
    sample_gate,
)

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
STRETCHES = pytest.mark.parametrize(
    ("beta", "gamma", "zeta"), [(BETA, GAMMA, ZETA), (0.4, -0.3, 1.2), (1.0, -0.1, 1.5)]
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@settings(deadline=None)
@given(st.floats(-6, 6), st.floats(0.001, 0.999), st.sampled_from([(BETA, GAMMA, ZETA), (0.3, -0.2, 1.4)]))
def test_gates_are_the_formulas(log_alpha: float, u: float, stretch: tuple[float, float, float]) -> None:
    beta, gamma, zeta = stretch
    s = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / beta)
    drawn = min(1.0, max(0.0, s * (zeta - gamma) + gamma))
    still = min(1.0, max(0.0, sigmoid(log_alpha) * (zeta - gamma) + gamma))
    probability = sigmoid(log_alpha - beta * math.log(-gamma / zeta))
    a, noise = (torch.tensor(value, dtype=torch.float64) for value in (log_alpha, u))
    assert float(sample_gate(a, noise, beta, gamma, zeta)) == pytest.approx(drawn, abs=1e-12)
    assert float(gate_at_test(a, gamma, zeta)) == pytest.approx(still, abs=1e-12)
    assert float(open_probability(a, beta, gamma, zeta)) == pytest.approx(probability, abs=1e-12)


@STRETCHES
def test_the_expected_norm_is_the_frequency_of_gates_that_are_not_zero(beta: float, gamma: float, zeta: float) -> None:
    log_alpha = torch.linspace(-3, 3, 7, dtype=torch.float64)
    draws = sample_gate(log_alpha.expand(40000, 7), uniform((40000, 7), 5).double(), beta, gamma, zeta)
    frequency = (draws > 0).double().mean(0)
    assert torch.allclose(frequency, open_probability(log_alpha, beta, gamma, zeta), atol=0.01)


@STRETCHES
def test_gates_close_exactly_at_the_closing_point(beta: float, gamma: float, zeta: float) -> None:
    point = closing_point(gamma, zeta)
    around = torch.tensor([point - 1e-6, point + 1e-6], dtype=torch.float64)
    closed = gate_at_test(around, gamma, zeta)
    assert closed[0] == 0.0
    assert 0.0 < float(closed[1]) < 1e-6


def test_gradients_of_a_gate_are_those_of_its_formula() -> None:
    log_alpha = torch.tensor([-0.7, 0.2, 1.1], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: sample_gate(a, noise), log_alpha)
    (gradient,) = torch.autograd.grad(open_probability(log_alpha).sum(), log_alpha)
    p = open_probability(log_alpha.detach())
    assert torch.allclose(gradient, p * (1 - p))


def test_the_initial_rate_is_that_of_the_concrete_variable() -> None:
    for rate in (0.05, 0.5, 0.9):
        log_alpha = torch.tensor(log_alpha_of(rate), dtype=torch.float64)
        s = torch.sigmoid((torch.logit(uniform((50000,), 3).double()) + log_alpha) / BETA)
        assert float((s < 0.5).double().mean()) == pytest.approx(rate, abs=0.01)
    for wrong in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"must be in \(0, 1\)"):
            log_alpha_of(wrong)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"gamma": 0.0}, {"zeta": 1.0}])
def test_a_stretch_that_closes_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        check_stretch(**{"beta": BETA, "gamma": GAMMA, "zeta": ZETA} | wrong)


def test_bottleneck_gates_are_the_formulas() -> None:
    mean, log_variance = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([-2.0, 0.3], dtype=torch.float64)
    noise = torch.tensor([[0.4, -1.0], [2.0, 0.0]], dtype=torch.float64)
    z = sample_bottleneck(mean, log_variance, noise)
    bound, alpha = bottleneck_bound(mean, log_variance), noise_to_signal(mean, log_variance)
    for unit in range(2):
        mu, sigma = float(mean[unit]), math.exp(float(log_variance[unit]) / 2)
        for row in range(2):
            assert float(z[row, unit]) == pytest.approx(mu + float(noise[row, unit]) * sigma)
        assert float(bound[unit]) == pytest.approx(math.log(1 + mu**2 / sigma**2))
        assert float(alpha[unit]) == pytest.approx(math.log(sigma**2 / mu**2))


def test_the_bound_is_twice_the_divergence_of_a_gated_unit_at_the_best_prior() -> None:
    """min over s of KL(N(mu f, sigma^2 f^2) || N(0, s)), f fixed, is log(1 + mu^2 / sigma^2) / 2."""
    mu, sigma, f = 0.8, 0.5, 1.7
    s = math.sqrt((mu**2 + sigma**2) * f**2)

    def integrand(x: float) -> float:
        p = norm.pdf(x, mu * f, sigma * f)
        return p * (norm.logpdf(x, mu * f, sigma * f) - norm.logpdf(x, 0, s)) if p > 0 else 0.0

    divergence, _ = quad(integrand, -20, 20, points=[mu * f])
    bound = bottleneck_bound(torch.tensor(mu).double(), torch.tensor(2 * math.log(sigma)).double())
    assert float(bound) == pytest.approx(2 * divergence, rel=1e-6)


def test_draws_are_functions_of_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = uniform((1000, 4), seed_of(3, 7, "conv.weight"))
    assert torch.equal(first, uniform((1000, 4), seed_of(3, 7, "conv.weight")))
    assert not torch.equal(first, uniform((1000, 4), seed_of(3, 8, "conv.weight")))
    assert 0.0 < float(first.min()) < float(first.max()) < 1.0
    assert kstest(first.flatten().numpy(), "uniform").pvalue > 0.01
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_normal_noise_do_not_depend_on_how_they_are_cut() -> None:
    table = normal_rows(0, 400, 5, seed=11)
    parts = [normal_rows(first, rows, 5, seed=11) for first, rows in ((0, 1), (1, 32), (33, 367))]
    assert torch.equal(torch.cat(parts), table)
    assert kstest(table.flatten().numpy(), "norm").pvalue > 0.01
