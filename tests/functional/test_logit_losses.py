"""DKD, DIST and JSD against plain Python written from the papers, their limits and their identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.functional.logit_losses import decoupled_divergence, js_divergence, relation_distances
from torchopt_passes.functional.losses import soft_kl_divergence

LOGITS = st.lists(st.floats(-8, 8), min_size=4, max_size=4)
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def pearson(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return above / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def doubles(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(LOGITS, LOGITS, st.integers(0, 3), TEMPERATURES)
def test_dkd_is_equations_5_to_7(student: list[float], teacher: list[float], y: int, temperature: float) -> None:
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    target = kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
    q_s, q_t = ([p / (1 - table[y]) for c, p in enumerate(table) if c != y] for table in (p_s, p_t))
    found = decoupled_divergence(doubles([student]), doubles([teacher]), torch.tensor([y]), temperature)
    # the reference takes 1 - p as a difference: of p = 1 - 5e-8 that leaves nine digits
    assert float(found.target) == pytest.approx(target, rel=1e-6, abs=1e-7)
    assert float(found.rest) == pytest.approx(kl(q_t, q_s), rel=1e-6, abs=1e-7)
    whole = float(found.target + (1 - p_t[y]) * found.rest)  # equation 4
    assert whole == pytest.approx(kl(p_t, p_s), rel=1e-6, abs=1e-9)


def test_dkd_of_confident_teachers_is_finite_and_has_a_gradient() -> None:
    """1 - p_y is 4e-44 here: as a difference it would be 0."""
    student = doubles([[50.0, 0.0, -1.0], [0.0, 3.0, 1.0]]).requires_grad_()
    teacher = doubles([[100.0, 0.0, 1.0], [200.0, 0.0, 0.0]])
    found = decoupled_divergence(student, teacher, torch.tensor([0, 0]), 1.0)
    (found.target + found.rest).sum().backward()
    q_t = softmax([0.0, 1.0], 1.0)
    assert float(found.rest[0].detach()) == pytest.approx(kl(q_t, softmax([0.0, -1.0], 1.0)), rel=1e-9)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[0, 1:].abs().min()) > 0.1


def test_dkd_of_two_classes_has_nothing_among_the_rest() -> None:
    found = decoupled_divergence(doubles([[1.0, 2.0]]), doubles([[0.0, 4.0]]), torch.tensor([1]), 2.0)
    assert float(found.rest) == 0.0
    assert float(found.target) == pytest.approx(kl(softmax([0.0, 4.0], 2.0), softmax([1.0, 2.0], 2.0)), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_equations_6_to_9(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    y_s, y_t = ([softmax(row, temperature) for row in table.tolist()] for table in (student, teacher))
    inter = 1 - sum(pearson(s, t) for s, t in zip(y_s, y_t, strict=True)) / 5
    intra = 1 - sum(pearson([r[c] for r in y_s], [r[c] for r in y_t]) for c in range(4)) / 4
    found = relation_distances(student, teacher, temperature)
    assert [float(value) for value in found] == pytest.approx([inter, intra], rel=1e-9)


def test_dist_forgives_linear_changes_and_survives_constants() -> None:
    equal = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    found = relation_distances(equal, torch.randn(3, 4, dtype=torch.float64), 1.0)
    assert [float(value.detach()) for value in found] == [1.0, 1.0]
    (found.inter + found.intra).backward()
    assert equal.grad is not None
    assert bool(equal.grad.isfinite().all())
    flat, sharp = doubles([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3]]).log(), doubles([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]]).log()
    assert float(relation_distances(flat, sharp, 1.0).inter) == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None)
@given(LOGITS, LOGITS, st.floats(0.01, 0.99), TEMPERATURES)
def test_jsd_is_equation_1(student: list[float], teacher: list[float], beta: float, temperature: float) -> None:
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    m = [beta * t + (1 - beta) * s for s, t in zip(p_s, p_t, strict=True)]
    expected = beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)
    found = js_divergence(doubles(student), doubles(teacher), beta, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_ends_of_jsd_are_its_limits() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    near = 1e-6
    forward, reverse = js_divergence(student, teacher, 0.0, 2.0), js_divergence(student, teacher, 1.0, 2.0)
    assert torch.equal(forward, soft_kl_divergence(student, teacher, 2.0))
    assert torch.allclose(reverse, soft_kl_divergence(teacher, student, 2.0))
    assert torch.allclose(js_divergence(student, teacher, near, 2.0) / near, forward, rtol=1e-4)
    assert torch.allclose(js_divergence(student, teacher, 1 - near, 2.0) / near, reverse, rtol=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, y = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16(), torch.tensor([0, 1, 2])
    pairs = [
        (js_divergence(student, teacher, 0.3, 2.0), js_divergence(student.float(), teacher.float(), 0.3, 2.0)),
        *zip(
            relation_distances(student, teacher, 2.0),
            relation_distances(student.float(), teacher.float(), 2.0),
            strict=True,
        ),
        *zip(
            decoupled_divergence(student, teacher, y, 2.0),
            decoupled_divergence(student.float(), teacher.float(), y, 2.0),
            strict=True,
        ),
    ]
    for half, full in pairs:
        assert half.dtype is torch.float32
        assert torch.equal(half, full)
