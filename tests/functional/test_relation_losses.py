"""RKD and MiniLM against loops written from the papers."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch

from torchopt_passes.functional.relation_losses import (
    angle_distance,
    pair_distance,
    relation_divergence,
    relation_log_probabilities,
    split_heads,
)


def huber(x: float, y: float) -> float:
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def embeddings(n: int, width: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_distances_are_equations_5_to_7() -> None:
    student, teacher = embeddings(5, 3, 0), embeddings(5, 7, 1)

    def psi(x: torch.Tensor) -> list[float]:
        distances = [math.dist(x[i].tolist(), x[j].tolist()) for i, j in combinations(range(5), 2)]
        return [d / (sum(distances) / len(distances)) for d in distances]

    expected = sum(huber(a, b) for a, b in zip(psi(student), psi(teacher), strict=True)) / 10
    assert float(pair_distance(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_angles_are_equations_8_and_9() -> None:
    student, teacher = embeddings(4, 3, 0), embeddings(4, 6, 1)

    def psi(x: torch.Tensor) -> list[float]:
        found = []
        for i, j, k in permutations(range(4), 3):
            one, other = (x[i] - x[j]).tolist(), (x[k] - x[j]).tolist()
            found.append(sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other))
        return found

    expected = sum(huber(a, b) for a, b in zip(psi(student), psi(teacher), strict=True)) / 24
    assert float(angle_distance(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_equal_examples_have_finite_gradients_and_too_few_count_nothing() -> None:
    student = torch.ones(4, 3, requires_grad=True)
    (
        pair_distance(student, embeddings(4, 2, 0).float()) + angle_distance(student, embeddings(4, 2, 0).float())
    ).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    for n in (0, 1):
        assert float(pair_distance(embeddings(n, 3, 0), embeddings(n, 3, 1))) == 0.0
    for n in (0, 1, 2):
        assert float(angle_distance(embeddings(n, 3, 0), embeddings(n, 3, 1))) == 0.0


@pytest.mark.parametrize("causal", [False, True])
def test_relations_are_equations_6_to_9(causal: bool) -> None:
    torch.manual_seed(0)
    q_s, k_s = (split_heads(torch.randn(2, 3, 8, dtype=torch.float64), 2) for _ in range(2))
    q_t, k_t = (split_heads(torch.randn(2, 3, 12, dtype=torch.float64), 2) for _ in range(2))
    valid = torch.tensor([[True, True, True], [True, True, False]])

    def attention(q: torch.Tensor, k: torch.Tensor, n: int, head: int, token: int) -> list[float]:
        seen = [other for other in range(3) if bool(valid[n, other]) and (not causal or other <= token)]
        query, width = q[n, head, token].tolist(), q.shape[-1]
        scores = [
            sum(a * b for a, b in zip(query, k[n, head, other].tolist(), strict=True)) / math.sqrt(width)
            for other in seen
        ]
        powers = [math.exp(score) for score in scores]
        return [power / sum(powers) for power in powers]

    expected = []
    for n in range(2):
        total, tokens = 0.0, [token for token in range(3) if bool(valid[n, token])]
        for head in range(2):
            for token in tokens:
                p_t, p_s = attention(q_t, k_t, n, head, token), attention(q_s, k_s, n, head, token)
                total += sum(a * math.log(a / b) for a, b in zip(p_t, p_s, strict=True))
        expected.append(total / (2 * len(tokens)))
    student = relation_log_probabilities(q_s, k_s, valid, causal=causal)
    teacher = relation_log_probabilities(q_t, k_t, valid, causal=causal)
    assert relation_divergence(student, teacher, valid).tolist() == pytest.approx(expected, rel=1e-9)


def test_an_example_of_padding_alone_has_no_value_and_no_gradient() -> None:
    values = torch.randn(1, 2, 3, 4, requires_grad=True)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    student = relation_log_probabilities(values, values, nothing)
    teacher = relation_log_probabilities(values.detach() + 1, values.detach(), nothing)
    loss = relation_divergence(student, teacher, nothing)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert values.grad is not None
    assert float(values.grad.abs().sum()) == 0.0


def test_split_heads() -> None:
    feature = torch.arange(12.0).view(1, 2, 6).half()
    heads = split_heads(feature, 3)
    assert heads.dtype is torch.float32
    assert heads[0, 1, 0].tolist() == [2.0, 3.0]
