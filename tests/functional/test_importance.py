"""Each criterion against a slow reference written from its paper, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance

Matrix = list[list[float]]


def matrices(low: int = -8, high: int = 8) -> st.SearchStrategy[Matrix]:
    """Few distinct values, exact in binary: equal rows, zeros and ties are frequent."""
    values = st.integers(low, high).map(lambda k: k / 2)
    return st.integers(1, 5).flatmap(
        lambda m: st.lists(st.lists(values, min_size=m, max_size=m), min_size=1, max_size=6)
    )


def like(matrix: Matrix, seed: int) -> torch.Tensor:
    """A second matrix of that shape, such as gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, (len(matrix), len(matrix[0])), generator=generator).double() / 4


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    assert actual.dtype is torch.float64 and actual.shape == (len(expected),)
    assert torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


@settings(deadline=None)
@given(matrices(), st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf]))
def test_lp_norm(matrix: Matrix, p: float) -> None:
    def slow(row: list[float]) -> float:
        if p == math.inf:
            return max(abs(w) for w in row)
        total = 0.0
        for w in row:
            total += abs(w) ** p
        return total ** (1 / p)

    close(importance.lp_norm(torch.tensor(matrix), p), [slow(row) for row in matrix])


@pytest.mark.parametrize("p", [0.0, -1.0, math.nan])
def test_lp_norm_refuses_other_p(p: float) -> None:
    with pytest.raises(ConfigError, match="must be > 0"):
        importance.lp_norm(torch.ones(2, 2), p)


@settings(deadline=None)
@given(matrices(), st.integers(0, 9))
def test_taylor_is_the_change_of_a_linear_loss(matrix: Matrix, seed: int) -> None:
    weight, gradient = torch.tensor(matrix, dtype=torch.float64), like(matrix, seed)
    losses: list[float] = []
    for row in range(len(weight)):
        pruned = weight.clone()
        pruned[row] = 0
        losses.append(float((gradient * weight).sum() - (gradient * pruned).sum()))
    close(importance.taylor_terms(weight, gradient), losses)


@settings(deadline=None)
@given(matrices(), st.integers(0, 9))
def test_squared_gradient_is_the_saliency_of_a_diagonal_hessian(matrix: Matrix, seed: int) -> None:
    gradient = like(matrix, seed)
    expected: list[float] = []
    for row, slopes in zip(matrix, gradient.tolist(), strict=True):
        saliency = 0.0
        for w, g in zip(row, slopes, strict=True):
            saliency += (g * g) * w**2 / 2  # h = g^2 of one sample
        expected.append(saliency)
    close(importance.squared_gradient(torch.tensor(matrix), gradient), expected)


@settings(deadline=None)
@given(matrices())
def test_fpgm(matrix: Matrix) -> None:
    expected = [sum(math.dist(row, other) for other in matrix) for row in matrix]
    # equal rows come out as far apart as the root of the rounding error: large matrices are multiplied out
    close(importance.fpgm(torch.tensor(matrix)), expected, tolerance=1e-6)


def test_fpgm_in_blocks_is_fpgm_at_once() -> None:
    rows = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))  # more than two blocks
    some = [0, 1397, 1398, 2999]
    slow = [float((rows.double() - rows[i].double()).norm(dim=1).sum()) for i in some]
    close(importance.fpgm(rows)[some], slow, tolerance=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8).map(lambda k: k / 2), min_size=1, max_size=8))
def test_lamp(weights: list[float]) -> None:
    ascending = sorted(range(len(weights)), key=lambda i: (weights[i], i))
    expected = [0.0] * len(weights)
    for rank, u in enumerate(ascending):
        surviving = sum(weights[v] ** 2 for v in ascending[rank:])
        expected[u] = weights[u] ** 2 / surviving if surviving else 0.0
    close(importance.lamp(torch.tensor(weights) ** 2), expected)


def test_lamp_prunes_a_layer_by_magnitude_and_keeps_its_largest_longest() -> None:
    squares = torch.rand(50, generator=torch.Generator().manual_seed(0))
    scores = importance.lamp(squares)
    assert torch.equal(scores.argsort(), squares.argsort())
    assert float(scores.max()) == 1.0
    assert torch.allclose(importance.lamp(7 * squares), scores, rtol=1e-6)  # layers are ranked whatever their scale


@settings(deadline=None)
@given(matrices(), st.sampled_from([0, 1]))
def test_statistics_of_activations(matrix: Matrix, dim: int) -> None:
    values = torch.tensor(matrix)
    channels = matrix if dim == 0 else [list(column) for column in zip(*matrix, strict=True)]
    zeros = [sum(1 for a in channel if a == 0) / len(channel) for channel in channels]
    close(importance.active_share(values, dim), [1 - share for share in zeros])
    close(importance.mean_activation(values, dim), [sum(abs(a) for a in c) / len(c) for c in channels])
    close(importance.mean_square(values, dim), [sum(a * a for a in c) / len(c) for c in channels])


@settings(deadline=None)
@given(matrices(), st.integers(0, 9))
def test_wanda(matrix: Matrix, seed: int) -> None:
    weight, x = torch.tensor(matrix), torch.randn(7, len(matrix[0]), generator=torch.Generator().manual_seed(seed))
    expected = [0.0] * x.shape[1]
    for j in range(x.shape[1]):
        norm = math.sqrt(sum(float(sample) ** 2 for sample in x[:, j]))
        for i in range(len(weight)):
            expected[j] += abs(matrix[i][j]) * norm
    norms = (importance.mean_square(x, 1) * len(x)).sqrt()
    close(importance.wanda(weight.T, norms), expected, tolerance=1e-6)


def test_wanda_of_a_grouped_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, 3, generator=generator).double()  # 3 groups of 2 outputs, each reads 2 channels
    norms = torch.rand(6, generator=generator).double()
    expected = [0.0, 0.0]
    for out in range(6):
        for j in range(2):
            for k in range(3):
                expected[j] += abs(float(weight[out, j, k])) * float(norms[2 * (out // 2) + j])
    close(importance.wanda(weight.movedim(1, 0).flatten(1), norms.view(3, 2).T), expected)


def test_random_scores_follow_the_generator_and_are_uniform() -> None:
    scores = importance.random_scores(4000, torch.Generator().manual_seed(1))
    assert torch.equal(scores, importance.random_scores(4000, torch.Generator().manual_seed(1)))
    # five standard deviations of the mean, and of the share below a quarter
    assert abs(float(scores.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
    assert abs(float((scores < 0.25).double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_bn_scale() -> None:
    assert importance.bn_scale(torch.tensor([-2.0, 0.0, 0.5])).tolist() == [2.0, 0.0, 0.5]


@settings(deadline=None)
@given(matrices(), st.randoms(use_true_random=False), st.sampled_from([1, 2, 4]))
def test_order_and_scale_of_rows(matrix: Matrix, random, factor: int) -> None:
    """Scores follow their rows when these change places, and grow as their formula does when weights do."""
    order = list(range(len(matrix)))
    random.shuffle(order)
    rows, gradient = torch.tensor(matrix, dtype=torch.float64), like(matrix, 3)
    functions = {
        1: [lambda r, g: importance.lp_norm(r, 3.0), importance.taylor_terms, lambda r, g: importance.fpgm(r)],
        2: [importance.squared_gradient],
    }
    for power, same in functions.items():
        for function in same:
            scores = function(rows, gradient)
            close(function(rows[order], gradient[order]), scores[order].tolist(), tolerance=1e-6)
            close(function(factor * rows, gradient), (factor**power * scores).tolist(), tolerance=1e-6)


def test_half_precision_is_computed_wide() -> None:
    rows = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert float(importance.lp_norm(rows)) == 300.0 * 64
    assert float(importance.taylor_terms(rows, rows)) == 4096 * 300.0**2
