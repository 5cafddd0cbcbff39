"""LSQ, LSQ+, PACT, DoReFa and WRPN against the formulas of their papers, element by element in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.functional.affine import integer_range
from torchopt_passes.functional.learned_steps import (
    dorefa_activations,
    dorefa_weights,
    lsq,
    lsq_gradient_scale,
    lsq_initial_step,
    lsq_plus_initial_step,
    pact,
    wrpn_activations,
    wrpn_weights,
)

GENERATOR = torch.Generator().manual_seed(0)


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def slow_lsq(v: float, s: float, qn: int, qp: int) -> tuple[float, float, float]:
    """Value, gradient of s (equation 3) and of v (equation 5), in the paper's letters."""
    ratio = v / s
    value = round(min(max(ratio, -qn), qp)) * s
    if -qn < ratio < qp:
        return value, -ratio + round(ratio), 1.0
    return value, float(-qn if ratio <= -qn else qp), 0.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_lsq_is_its_paper(bits: int, signed: bool, dim: int | None) -> None:
    low, high = integer_range(bits, signed=signed)
    x = torch.randn(5, 3, 4, generator=GENERATOR).requires_grad_()
    count = 1 if dim is None else x.shape[dim]
    step = (torch.rand(count, generator=GENERATOR) / high + 0.3 / high).requires_grad_()
    outer = torch.randn(x.shape, generator=GENERATOR)
    g = lsq_gradient_scale(x.numel() // count, high)
    out = lsq(x, step, low, high, dim=dim, gradient_scale=g)
    (out * outer).sum().backward()
    expected_step = [0.0] * count
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        i = tuple(index)
        c = 0 if dim is None else i[dim]
        value, of_s, of_v = slow_lsq(x[i].item(), step[c].item(), -low, high)
        assert out[i].item() == pytest.approx(value, abs=1e-6)
        assert float(grad_of(x)[i]) == pytest.approx(float(outer[i]) * of_v, abs=1e-6)
        expected_step[c] += float(outer[i]) * of_s * g
    torch.testing.assert_close(grad_of(step), torch.tensor(expected_step), rtol=1e-4, atol=1e-5)


def test_the_gradient_scale_and_the_initial_steps() -> None:
    assert lsq_gradient_scale(300, 7) == pytest.approx(1 / math.sqrt(300 * 7))
    w = torch.randn(4, 6, generator=GENERATOR)
    for row, step in zip(w.tolist(), lsq_initial_step(w, 7, 0).tolist(), strict=True):
        assert step == pytest.approx(2 * sum(map(abs, row)) / len(row) / math.sqrt(7), rel=1e-5)
    mean, deviation = float(w.mean()), float(w.std(correction=0))
    expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2**3
    assert float(lsq_plus_initial_step(w, 4)) == pytest.approx(expected, rel=1e-5)
    assert lsq_plus_initial_step(w, 4, 1).shape == (6,)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_is_its_paper(bits: int) -> None:
    low, high = integer_range(bits, signed=False)
    x = (torch.randn(60, generator=GENERATOR) * 2 + 0.5).requires_grad_()
    step, offset = torch.tensor([2.5 / high], requires_grad=True), torch.tensor([-0.61], requires_grad=True)
    outer = torch.randn(60, generator=GENERATOR)
    out = lsq(x, step, low, high, offset=offset, gradient_scale=0.25)
    (out * outer).sum().backward()
    s = step.item()
    beta = s * round(-0.61 / s)  # on the grid, as integer arithmetic needs it
    of_s = of_beta = 0.0
    for i in range(60):
        ratio = (x[i].item() - beta) / s
        value = round(min(max(ratio, low), high)) * s + beta
        assert out[i].item() == pytest.approx(value, abs=1e-5)
        inside = low < ratio < high
        assert float(grad_of(x)[i]) == pytest.approx(float(outer[i]) if inside else 0.0)
        of_s += float(outer[i]) * (round(ratio) - ratio if inside else low if ratio <= low else high)
        of_beta += 0.0 if inside else float(outer[i])
    assert float(grad_of(step)) == pytest.approx(of_s / 4, rel=1e-3, abs=1e-4)
    assert float(grad_of(offset)) == pytest.approx(of_beta / 4, rel=1e-4, abs=1e-5)


def test_lsq_on_a_grid_with_a_fixed_zero_point() -> None:
    # integers 0 .. 15 about 5: Q_N = 5, Q_P = 10
    x = torch.linspace(-3, 4, 29, requires_grad=True)
    step = torch.tensor([0.3], requires_grad=True)
    out = lsq(x, step, 0, 15, zero_point=torch.tensor([5], dtype=torch.int32))
    out.sum().backward()
    slow = [slow_lsq(v, 0.3, 5, 10) for v in x.tolist()]
    torch.testing.assert_close(out, torch.tensor([v for v, _, _ in slow]))
    assert grad_of(x).tolist() == [g for _, _, g in slow]
    assert float(grad_of(step)) == pytest.approx(sum(g for _, g, _ in slow), rel=1e-4)


def test_lsq_finds_a_good_step() -> None:
    w = torch.randn(2000, generator=GENERATOR)
    step = lsq_initial_step(w, 1).requires_grad_()

    def error(of: torch.Tensor) -> float:
        return (lsq(w, of.detach(), -1, 1) - w).square().mean().item()

    start = error(step)
    optimizer = torch.optim.SGD([step], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        (lsq(w, step, -1, 1) - w).square().mean().backward()
        optimizer.step()
    best = min(error(torch.tensor([s])) for s in torch.arange(0.5, 2.5, 0.02).tolist())
    assert error(step) < start and error(step) <= best * 1.01


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.floats(0.25, 4.0, width=32), st.integers(2, 8))
@settings(max_examples=80, deadline=None)
def test_pact_is_its_paper(values: list[float], limit: float, bits: int) -> None:
    x, alpha = torch.tensor(values, requires_grad=True), torch.tensor([limit], requires_grad=True)
    out = pact(x, alpha, bits)
    out.sum().backward()
    n, of_alpha = 2**bits - 1, 0.0
    for v, got, of_x in zip(values, out.tolist(), grad_of(x).tolist(), strict=True):
        y = 0.5 * (abs(v) - abs(v - limit) + limit)
        assert abs(got - round(y * n / limit) * limit / n) <= 1e-5 + (limit / n if y * n / limit % 1 == 0.5 else 0)
        assert of_x == (1.0 if 0 <= v < limit else 0.0)
        of_alpha += 1.0 if v >= limit else 0.0
    assert grad_of(alpha).tolist() == [of_alpha]


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("dim", [None, 0])
def test_dorefa_weights_are_their_paper(bits: int, dim: int | None) -> None:
    w = torch.randn(3, 7, generator=GENERATOR).requires_grad_()
    outer = torch.randn(3, 7, generator=GENERATOR)
    out = dorefa_weights(w, bits, dim=dim)
    (out * outer).sum().backward()
    n = 2**bits - 1
    rows = [w.detach().flatten().tolist()] if dim is None else w.tolist()
    expected: list[float] = []
    for row in rows:
        largest = max(abs(math.tanh(v)) for v in row)
        expected += [2 * round((math.tanh(v) / (2 * largest) + 0.5) * n) / n - 1 for v in row]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected), rtol=0, atol=1e-6)
    assert len(out.unique()) <= 2**bits and not bool((out == 0).any()), "zero is no level"
    # the gradient of the formula without rounding, differentiated by autograd
    again = w.detach().clone().requires_grad_()
    t = torch.tanh(again)
    largest = t.abs().max() if dim is None else t.abs().amax(1, keepdim=True)
    (2 * (t / (2 * largest) + 0.5) * outer - outer).sum().backward()
    torch.testing.assert_close(grad_of(w), grad_of(again), rtol=1e-4, atol=1e-5)


def test_dorefa_units_are_a_factor() -> None:
    w = torch.randn(3, 7, generator=GENERATOR)
    unit = torch.tensor([0.5, 2.0, 3.0])
    torch.testing.assert_close(dorefa_weights(w, 3, dim=0, unit=unit), dorefa_weights(w, 3, dim=0) * unit[:, None])
    torch.testing.assert_close(dorefa_weights(w, 3, unit=unit[:1]), dorefa_weights(w, 3) * 0.5)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12), st.integers(2, 8))
@settings(max_examples=80, deadline=None)
def test_clipped_grids_are_their_papers(values: list[float], bits: int) -> None:
    n, top = 2**bits - 1, 2 ** (bits - 1) - 1
    x, w = torch.tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    activations, weights = dorefa_activations(x, bits), wrpn_weights(w, bits)
    assert torch.equal(wrpn_activations(x, bits), activations)
    (activations.sum() + weights.sum()).backward()
    for i, v in enumerate(values):
        a, b = min(max(v, 0.0), 1.0) * n, min(max(v, -1.0), 1.0) * top
        # a tie may go either way in float32
        assert abs(activations[i].item() - round(a) / n) <= 1e-6 + (1 / n if abs(a % 1 - 0.5) < 1e-4 else 0)
        assert abs(weights[i].item() - round(b) / top) <= 1e-6 + (1 / top if abs(b % 1 - 0.5) < 1e-4 else 0)
        assert float(grad_of(x)[i]) == (1.0 if 0 <= v <= 1 else 0.0)
        assert float(grad_of(w)[i]) == (1.0 if -1 <= v <= 1 else 0.0)


def test_units_scale_the_clipped_grids() -> None:
    x = torch.randn(4, 9, generator=GENERATOR)
    torch.testing.assert_close(dorefa_activations(x, 4, unit=torch.tensor([2.5])), dorefa_activations(x / 2.5, 4) * 2.5)
    unit = torch.tensor([0.5, 1.0, 2.0, 3.0])
    expected = wrpn_weights(x / unit[:, None], 4) * unit[:, None]
    torch.testing.assert_close(wrpn_weights(x, 4, dim=0, unit=unit), expected)
