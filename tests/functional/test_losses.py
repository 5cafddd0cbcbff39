"""Distillation losses against plain Python, and their gradients against the closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.functional.losses import masked_mean, soft_cross_entropy, soft_kl_divergence

LOGITS = st.lists(st.floats(-8, 8), min_size=4, max_size=4)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [p / sum(powers) for p in powers]


@settings(deadline=None)
@given(LOGITS, LOGITS, TEMPERATURES)
def test_losses_are_the_formulas(student: list[float], teacher: list[float], temperature: float) -> None:
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    cross = -sum(t * math.log(s) for s, t in zip(p_s, p_t, strict=True))
    divergence = cross + sum(t * math.log(t) for t in p_t)
    one, two = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    assert float(soft_cross_entropy(one, two, temperature)) == pytest.approx(cross, abs=1e-9)
    assert float(soft_kl_divergence(one, two, temperature)) == pytest.approx(divergence, abs=1e-9)


@pytest.mark.parametrize("loss", [soft_cross_entropy, soft_kl_divergence])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_the_difference_of_the_distributions_over_t(loss: object, temperature: float) -> None:
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    loss(student, teacher, temperature).sum().backward()  # type: ignore[operator]
    expected = ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / temperature
    assert torch.allclose(student.grad, expected.detach(), atol=1e-12)  # type: ignore[arg-type]


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    found = soft_kl_divergence(student, teacher, 2.0)
    assert found.dtype is torch.float32
    assert torch.equal(found, soft_kl_divergence(student.float(), teacher.float(), 2.0))


def test_masked_mean_ignores_what_is_not_valid_even_nan() -> None:
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert float(mean.detach()) == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]
    assert float(masked_mean(values.detach(), torch.zeros(3, dtype=torch.bool))) == 0.0
