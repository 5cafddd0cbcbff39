"""The loss on what a cache keeps: its formula, its bound, and the plain divergence when all classes are kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.functional.losses import soft_cross_entropy, soft_kl_divergence
from torchopt_passes.functional.top_k import keep_top_k, top_k_divergence

LOGITS = st.lists(st.integers(-128, 128).map(lambda z: z / 16), min_size=5, max_size=5, unique=True)


@settings(deadline=None)
@given(LOGITS, LOGITS, st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_formula_with_the_remainder(student: list[float], teacher: list[float], k: int, temperature: float) -> None:
    def softmax(logits: list[float]) -> list[float]:
        powers = [math.exp(z / temperature) for z in logits]
        return [p / sum(powers) for p in powers]

    p_s, p_t = softmax(student), softmax(teacher)
    top = sorted(range(5), key=lambda c: teacher[c])[-k:]
    r_s, r_t = (sum(p for c, p in enumerate(table) if c not in top) for table in (p_s, p_t))
    expected = sum(p_t[c] * math.log(p_t[c] / p_s[c]) for c in top) + r_t * math.log(r_t / r_s)
    entropy = -sum(p_t[c] * math.log(p_t[c]) for c in top) - r_t * math.log(r_t)
    z_s, z_t = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    kept = keep_top_k(z_t, k, temperature)
    found = float(top_k_divergence(z_s, kept, temperature))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)  # what is kept is float32
    assert float(top_k_divergence(z_s, kept, temperature, cross_entropy=True)) == pytest.approx(
        expected + entropy, rel=1e-4, abs=1e-6
    )
    assert found <= float(soft_kl_divergence(z_s, z_t, temperature)) + 1e-5


def test_with_every_class_it_is_the_plain_divergence_and_its_gradient() -> None:
    torch.manual_seed(0)
    teacher, gradients = torch.randn(3, 7, 6), []
    for whole in (True, False):
        torch.manual_seed(1)
        student = torch.randn(3, 7, 6, requires_grad=True)
        if whole:
            losses = [soft_kl_divergence(student, teacher, 2.0), soft_cross_entropy(student, teacher, 2.0)]
        else:
            kept = keep_top_k(teacher, 6, 2.0)
            assert bool(kept.rest.isneginf().all())
            losses = [top_k_divergence(student, kept, 2.0, cross_entropy=ce) for ce in (False, True)]
        torch.stack(losses).sum().backward()
        assert student.grad is not None
        gradients.append((torch.stack(losses).detach(), student.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=2e-6)


def test_the_gradient_reaches_the_classes_that_were_not_kept() -> None:
    student = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    top_k_divergence(student, keep_top_k(teacher, 2, 1.0), 1.0).sum().backward()
    assert student.grad is not None
    p_s, p_t = student.detach().softmax(-1)[0], teacher.double().softmax(-1)[0]
    r_s, r_t = p_s[2:].sum(), p_t[2:].sum()
    expected = torch.cat((p_s[:2] - p_t[:2], p_s[2:] - r_t * p_s[2:] / r_s))
    assert torch.allclose(student.grad[0], expected, atol=1e-6)
