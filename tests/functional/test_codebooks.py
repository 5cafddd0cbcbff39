"""Codebooks, one-dimensional k-means and packing against slow references and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.codebooks import (
    fit_log_levels,
    inertia,
    largest,
    log_levels,
    look_up,
    nearest,
    zero_first,
)
from torchopt_passes.functional.kmeans import kmeans
from torchopt_passes.functional.packing import pack, packed_size, unpack


def best_error(values: list[float], weights: list[float], clusters: int) -> float:
    """The least error of any clustering: clusters of an optimum are runs of sorted values, so try every cut."""
    pairs = sorted(zip(values, weights, strict=True))

    def cost(first: int, last: int) -> float:
        run = pairs[first:last]
        total = sum(h for _, h in run)
        mean = sum(h * w for w, h in run) / total if total else 0.0
        return sum(h * (w - mean) ** 2 for w, h in run)

    n = len(pairs)
    table = [[math.inf] * (n + 1) for _ in range(clusters + 1)]
    table[0][0] = 0.0
    for k in range(1, clusters + 1):
        for end in range(n + 1):
            table[k][end] = min(table[k - 1][start] + cost(start, end) for start in range(end + 1))
    return table[clusters][n]


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_finds_the_optimum_of_small_inputs(weighted: bool) -> None:
    hits = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(1, 14, generator=generator, dtype=torch.float64)
        weights = torch.rand(1, 14, generator=generator, dtype=torch.float64) if weighted else None
        levels = kmeans(values, 4, importance=weights, restarts=32, seed=seed)
        error = float(inertia(values, levels, weights))
        least = best_error(values[0].tolist(), (torch.ones(14) if weights is None else weights[0]).tolist(), 4)
        assert error >= least - 1e-12  # or one of the two is wrong
        hits += error <= least * (1 + 1e-9) + 1e-12
    assert hits >= 28, f"optimal in {hits} of 30"


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("size", [200, 6000])  # fewer and more than are looked at for a start
def test_centres_are_the_weighted_means_of_their_nearest_values(size: int, keep_zero: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, size, generator=generator)
    weights = torch.rand(5, size, generator=generator)
    levels = kmeans(values, 8, importance=weights, keep_zero=keep_zero)
    assert bool((levels.diff(dim=1) > 0).all()) and levels.shape == (5, 8)
    index = (values.unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
    for group in range(5):
        for k in range(8):
            own = index[group] == k
            mean = (weights[group][own].double() * values[group][own].double()).sum() / weights[group][
                own
            ].double().sum()
            if keep_zero and levels[group, k] == 0:
                continue
            torch.testing.assert_close(levels[group, k].double(), mean, rtol=1e-5, atol=1e-6)
    assert bool((levels == 0).any(1).all()) is keep_zero


def test_integer_importance_is_repetition() -> None:
    values = torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.randint(1, 5, (1, 60), generator=torch.Generator().manual_seed(1))
    repeated = values[0].repeat_interleave(times[0]).unsqueeze(0)
    one = kmeans(values, 5, importance=times.double(), restarts=32)
    other = kmeans(repeated, 5, restarts=32)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", ["normal", "laplace", "two_scales"])
def test_no_worse_than_scikit_learn(shape: str) -> None:
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(7)
    values = torch.randn(1, 30_000, generator=generator)
    if shape == "laplace":
        values = values.sign() * torch.empty_like(values).exponential_(generator=generator)
    if shape == "two_scales":
        values[:, ::50] *= 20
    ours = float(inertia(values, kmeans(values, 16)))
    for seed in range(2):
        peer: Any = KMeans(16, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
        peer.fit(values.T.double().numpy())
        assert ours <= peer.inertia_ * (1 + 1e-6)


def test_few_distinct_values_are_kept_exactly() -> None:
    values = torch.tensor([-0.3, 0.0, 0.1, 7.5])[torch.randint(0, 4, (3, 5000))]
    for keep_zero in (False, True):
        levels = kmeans(values, 4, keep_zero=keep_zero)
        assert torch.equal(look_up(levels, nearest(values, levels)), values)
    without = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    assert torch.equal(kmeans(without, 4, keep_zero=True), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    constant = torch.full((1, 9), 2.5)
    assert torch.equal(kmeans(constant, 3), torch.full((1, 3), 2.5))


def test_values_without_importance_have_no_say() -> None:
    values = torch.cat([torch.randn(1, 300), torch.full((1, 5), 50.0)], dim=1)
    say = torch.cat([torch.ones(1, 300), torch.zeros(1, 5)], dim=1)
    levels = kmeans(values, 4, importance=say)
    assert float(levels.max()) < 5
    torch.testing.assert_close(
        inertia(values[:, :300], levels), inertia(values[:, :300], kmeans(values[:, :300], 4)), rtol=0.05, atol=0
    )


def test_seed_decides_and_half_precision_works() -> None:
    values = torch.randn(4, 500)
    assert torch.equal(kmeans(values, 7, seed=5), kmeans(values, 7, seed=5))
    half = kmeans(values.bfloat16(), 7)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, kmeans(values.bfloat16().float(), 7))
    with pytest.raises(ConfigError, match="1 to 256"):
        kmeans(values, 257)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9, unique=True),
)
def test_nearest_is_the_least_distance(values: list[float], levels: list[float]) -> None:
    x, table = torch.tensor([values, values]), torch.tensor([levels, levels[::-1]])
    found = look_up(table, nearest(x, table))
    least = (x.double().unsqueeze(-1) - table.double().unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((x.double() - found.double()).abs(), least, rtol=1e-6, atol=1e-6)


def test_a_value_between_two_levels_takes_the_lower() -> None:
    assert nearest(torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [[1, 2]]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_level_is_the_sum_over_its_values(groups: int, dtype: torch.dtype) -> None:
    levels = torch.randn(groups, 4, dtype=dtype, requires_grad=True)
    indices = torch.randint(0, 4, (groups, 600), dtype=torch.uint8)
    grad = torch.rand(groups, 600).to(dtype)
    look_up(levels, indices).backward(grad)
    for g in range(groups):
        for k in range(4):
            expected = sum(float(v) for v, i in zip(grad[g], indices[g], strict=True) if int(i) == k)
            assert levels.grad is not None
            assert float(levels.grad[g, k]) == pytest.approx(expected, rel=1e-4 if dtype is torch.float32 else 1e-2)


def log_quant(x: float, bits: int, top: int, base: float) -> float:
    """Miyashita et al. 2016, equations 3 and 4, with one bit of the width for the sign."""
    if x == 0:
        return 0.0
    lowest = top - (2 ** (bits - 1) - 1) + 1
    exponent = min(max(round(math.log(abs(x), base)), lowest), top)
    return math.copysign(base**exponent, x)


@pytest.mark.parametrize("base", [2.0, math.sqrt(2.0)])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_log_levels_are_those_of_the_paper(bits: int, base: float) -> None:
    top = -1
    levels = log_levels(bits, torch.tensor([top]), base)[0]
    samples = [s * 10 ** (e / 40) for e in range(-280, 40) for s in (-1, 1)]
    reached = sorted({log_quant(x, bits, top, base) for x in [0.0, *samples]})
    torch.testing.assert_close(levels, torch.tensor(reached))
    assert len(reached) == 2**bits - 1


def test_fit_log_levels_tries_the_exponents() -> None:
    values = torch.randn(3, 400) * torch.tensor([[0.01], [1.0], [300.0]])
    fitted = fit_log_levels(values, 3)
    for group in range(3):
        one = values[group : group + 1]
        errors = [float(inertia(one, log_levels(3, torch.tensor([top])))) for top in range(-20, 20)]
        assert float(inertia(one, fitted[group : group + 1])) == pytest.approx(min(errors))
    assert torch.isfinite(fit_log_levels(torch.zeros(1, 4), 3)).all()
    with pytest.raises(ConfigError, match="2 to 8"):
        log_levels(1, torch.tensor([0]))


def test_zero_first_and_largest() -> None:
    with pytest.raises(ConfigError, match="no level 0"):
        zero_first(torch.tensor([[-1.0, 2.0]]))
    assert zero_first(torch.tensor([[0.0, 1.0], [-2.0, 0.0]])).tolist() == [[0.0, 1.0], [0.0, -2.0]]
    w = torch.randn(20, 30)
    mask = torch.zeros(600, dtype=torch.bool)
    mask[largest(w, 0.1).long()] = True
    assert int(mask.sum()) == 60 and w.reshape(-1)[mask].abs().min() >= w.reshape(-1)[~mask].abs().max()


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 70))
def test_packing_is_exact(data: st.DataObject, bits: int, count: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack(torch.tensor(values), bits)
    assert packed.dtype is torch.uint8 and len(packed) == packed_size(count, bits)
    assert math.ceil(count * bits / 8) <= len(packed) <= count * bits / 8 + 3
    assert unpack(packed, bits, count).tolist() == values


def test_packing_refuses() -> None:
    with pytest.raises(ConfigError, match="do not fit into 2 bits"):
        pack(torch.tensor([4]), 2)
    with pytest.raises(ConfigError, match="do not fit"):
        pack(torch.tensor([-1]), 2)
    for bits in (0, 9):
        with pytest.raises(ConfigError, match="1 to 8"):
            pack(torch.tensor([0]), bits)


@pytest.mark.parametrize("bits", [3, 4])
def test_unpacking_exports(bits: int) -> None:
    class Unpack(nn.Module):
        def forward(self, packed: torch.Tensor) -> torch.Tensor:
            return unpack(packed, bits, 21)

    packed = pack(torch.arange(21) % 2**bits, bits)
    exported = torch.export.export(Unpack(), (packed,))
    assert exported.module()(packed).tolist() == [i % 2**bits for i in range(21)]
