"""HSIC against loops over samples, and against what dependence and independence must give."""

from __future__ import annotations

import math

import pytest
import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.dependence import channel_dependence, gaussian_kernel, hsic, normalized_hsic


def slow_kernel(x: torch.Tensor) -> list[list[float]]:
    n = len(x)
    squares = [[float((x[i] - x[j]).square().sum()) for j in range(n)] for i in range(n)]
    pairs = sorted(squares[i][j] for i in range(n) for j in range(i + 1, n))
    half = len(pairs) // 2
    median = pairs[half] if len(pairs) % 2 else (pairs[half - 1] + pairs[half]) / 2
    return [[math.exp(-squares[i][j] / (2 * median)) for j in range(n)] for i in range(n)]


def slow_hsic(k: list[list[float]], other: list[list[float]]) -> float:
    """tr(K H L H) / (n - 1)^2, term by term."""
    n = len(k)
    h = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    total = 0.0
    for a in range(n):
        for b in range(n):
            for c in range(n):
                for d in range(n):
                    total += k[a][b] * h[b][c] * other[c][d] * h[d][a]
    return total / (n - 1) ** 2


def test_kernel_and_hsic_are_the_loops() -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    k, other = slow_kernel(x), slow_kernel(y)
    assert torch.allclose(gaussian_kernel(x), torch.tensor(k, dtype=torch.float64), atol=1e-12)
    found = hsic(gaussian_kernel(x), gaussian_kernel(y))
    assert float(found) == pytest.approx(slow_hsic(k, other), rel=1e-10)
    share = slow_hsic(k, other) / math.sqrt(slow_hsic(k, k) * slow_hsic(other, other))
    assert float(normalized_hsic(gaussian_kernel(x), gaussian_kernel(y))) == pytest.approx(share, rel=1e-10)


def test_dependence_is_found_where_correlation_is_not() -> None:
    x = torch.randn(200, 1, dtype=torch.float64)
    unrelated, square = torch.randn(200, 1, dtype=torch.float64), x.square()
    dependent = float(normalized_hsic(gaussian_kernel(x), gaussian_kernel(square)))
    independent = float(normalized_hsic(gaussian_kernel(x), gaussian_kernel(unrelated)))
    assert dependent > 10 * independent


def test_channels_are_scored_by_themselves_whatever_the_layout() -> None:
    images = torch.randn(7, 3, 2, 2)
    other = gaussian_kernel(torch.randn(7, 4, dtype=torch.float64))
    expected = torch.stack(
        [normalized_hsic(gaussian_kernel(images[:, c].flatten(1).double()), other) for c in range(3)]
    )
    assert torch.allclose(channel_dependence(images, 1, other), expected)
    assert torch.allclose(channel_dependence(images.movedim(1, -1), -1, other), expected)
    assert torch.allclose(
        channel_dependence(images[:, :, 0, 0], 1, other)[0], channel_dependence(images[:, :1, :1, :1], 1, other)[0]
    )


def test_a_dead_channel_tells_nothing() -> None:
    values = torch.randn(5, 2)
    values[:, 1] = 3.0
    found = channel_dependence(values, 1, gaussian_kernel(values[:, :1]))
    assert found[1] == 0.0
    assert float(found[0]) == pytest.approx(1.0, abs=1e-6)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="compares samples, but the batch has 1"):
        gaussian_kernel(torch.ones(1, 3))
    with pytest.raises(ConfigError, match=r"shape \(3,\) are not 4 samples"):
        channel_dependence(torch.ones(3), 0, torch.eye(4))
