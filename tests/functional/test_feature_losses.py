"""Feature losses against loops written from the papers; what does not count has no influence, not even NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from torchopt_passes.functional.feature_losses import (
    attention_transfer,
    cosine_distance,
    flow_distance,
    flow_matrix,
    hint_distance,
    mean_feature,
    positions_last,
    same_grid,
)

Loss = Callable[..., torch.Tensor]


def feature(channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, channels, dtype=torch.float64, generator=generator)


def vectors(tensor: torch.Tensor) -> list[list[list[float]]]:
    return tensor.tolist()


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def test_hints_are_mean_squared_errors() -> None:
    student, teacher = feature(seed=0), feature(seed=1)
    for found, relative, s, t in zip(
        hint_distance(student, teacher).tolist(),
        hint_distance(student, teacher, normalized=True).tolist(),
        vectors(student),
        vectors(teacher),
        strict=True,
    ):
        above = sum((a - b) ** 2 for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True))
        below = sum(b * b for y in t for b in y)
        assert found == pytest.approx(above / 12, rel=1e-12)
        assert relative == pytest.approx(above / below, rel=1e-12)


def test_a_teacher_of_zeros_leaves_the_normalized_hint_finite() -> None:
    assert bool(hint_distance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), normalized=True).isfinite())


def test_cosine_is_that_of_each_position() -> None:
    student, teacher = feature(seed=0), feature(seed=1)
    for found, s, t in zip(cosine_distance(student, teacher).tolist(), vectors(student), vectors(teacher), strict=True):
        cosines = [dot(x, y) / math.sqrt(dot(x, x) * dot(y, y)) for x, y in zip(s, t, strict=True)]
        assert found == pytest.approx(1 - sum(cosines) / 4, rel=1e-9)


def test_attention_transfer_is_equation_2() -> None:
    student, teacher = feature(3, seed=0), feature(5, seed=1)
    for found, s, t in zip(
        attention_transfer(student, teacher).tolist(), vectors(student), vectors(teacher), strict=True
    ):
        q_s, q_t = ([dot(x, x) for x in table] for table in (s, t))
        n_s, n_t = math.sqrt(dot(q_s, q_s)), math.sqrt(dot(q_t, q_t))
        assert found == pytest.approx(sum((a / n_s - b / n_t) ** 2 for a, b in zip(q_s, q_t, strict=True)), rel=1e-9)


def test_flow_is_equations_1_and_2() -> None:
    first, last = feature(2, seed=0), feature(3, seed=1)
    matrix = flow_matrix(first, last)
    for n in range(2):
        for i in range(2):
            for j in range(3):
                expected = sum(float(first[n, p, i] * last[n, p, j]) for p in range(4)) / 4
                assert float(matrix[n, i, j]) == pytest.approx(expected, rel=1e-12)
    other = flow_matrix(feature(2, seed=2), last)
    expected_distance = [
        sum((a - b) ** 2 for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)) / 6
        for s, t in zip(vectors(matrix), vectors(other), strict=True)
    ]
    assert flow_distance(matrix, other).tolist() == pytest.approx(expected_distance, rel=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        hint_distance,
        lambda s, t, v=None: hint_distance(s, t, v, normalized=True),
        cosine_distance,
        attention_transfer,
        lambda s, t, v=None: flow_distance(flow_matrix(s, s, v), flow_matrix(t, t, v)),
        lambda s, t, v=None: (mean_feature(s, v) - mean_feature(t, v)).square().sum((1, 2)),
    ],
    ids=["hint", "normalized", "cosine", "attention", "flow", "mean"],
)
def test_positions_that_do_not_count_are_as_if_they_were_not_there(loss: Loss) -> None:
    student, teacher = feature(seed=0).requires_grad_(), feature(seed=1)
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = loss(student, teacher, valid)
    found.sum().backward()
    alone = [
        loss(student[n : n + 1, : int(valid[n].sum())], teacher[n : n + 1, : int(valid[n].sum())]) for n in range(2)
    ]
    assert torch.allclose(found, torch.cat(alone), rtol=1e-12)
    assert student.grad is not None
    assert float(student.grad[~valid].abs().sum()) == 0.0
    assert float(student.grad[valid].abs().sum()) > 0.0


def test_shapes() -> None:
    maps = torch.randn(2, 3, 4, 5)
    rows = positions_last(maps, 1)
    assert torch.equal(rows[1, 7], maps[1, :, 1, 2])
    assert positions_last(torch.zeros(2, 3).half(), -1).dtype is torch.float32
    one, other = same_grid(torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 7, 2, 4))
    assert one[0, 0, 0].tolist() == [2.0, 3.0, 4.0, 5.0]  # the mean of two rows
    assert other.shape == (1, 7, 2, 4)
