"""Masks against slow references, and the counts they promise."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import masks, patterns

SHARES = st.integers(0, 64).map(lambda k: k / 64)  # exact in binary, so that the reference can use fractions
# few distinct values: ties in most examples
VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40)


def slow_keep(scores: list[float], removed: int) -> list[bool]:
    """Remove one at a time the first of the smallest scores."""
    kept = [True] * len(scores)
    for _ in range(removed):
        alive = [i for i, keep in enumerate(kept) if keep]
        kept[min(alive, key=lambda i: (scores[i], i))] = False
    return kept


@given(SHARES, st.integers(0, 1000))
def test_removed_count_rounds_halves_up(share: float, n: int) -> None:
    assert masks.removed_count(share, n) == math.floor(Fraction(share) * n + Fraction(1, 2))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_sparsity_outside_range_is_refused(share: float) -> None:
    for call in (
        lambda: masks.magnitude_mask(torch.ones(3), share),
        lambda: masks.global_magnitude_masks({"a": torch.ones(3)}, share),
        lambda: masks.global_magnitude_masks({}, share),
        lambda: masks.random_mask(torch.ones(3), share),
        lambda: patterns.block_mask(torch.ones(2, 2), (1, 1), share),
    ):
        with pytest.raises(ConfigError, match="sparsity must be in"):
            call()


@settings(deadline=None)
@given(VALUES, SHARES)
def test_magnitude_mask_is_the_slow_reference(values: list[float], share: float) -> None:
    mask = masks.magnitude_mask(torch.tensor(values), share)
    expected = slow_keep([abs(v) for v in values], masks.removed_count(share, len(values)))
    assert mask.dtype is torch.bool
    assert mask.tolist() == expected


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), SHARES)
def test_global_masks_rank_all_together(tensors: list[list[float]], share: float) -> None:
    weights = {f"w{i}": torch.tensor(values) for i, values in enumerate(tensors)}
    flat = [abs(v) for values in tensors for v in values]
    found = masks.global_magnitude_masks(weights, share)
    assert list(found) == list(weights)
    together = [keep for mask in found.values() for keep in mask.tolist()]
    assert together == slow_keep(flat, masks.removed_count(share, len(flat)))


def test_global_masks_keep_shapes_and_own_their_memory() -> None:
    found = masks.global_magnitude_masks({"a": torch.randn(2, 3), "b": torch.randn(4)}, 0.5)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"a": (2, 3), "b": (4,)}
    before = found["b"].clone()
    found["a"].fill_(value=True)
    assert torch.equal(found["b"], before)
    assert found["a"].untyped_storage().nbytes() == 6  # a checkpoint of one does not drag the others along


@settings(deadline=None)
@given(st.integers(1, 200), SHARES, st.integers(0, 5))
def test_random_mask_has_the_count_and_follows_the_generator(n: int, share: float, seed: int) -> None:
    weight = torch.zeros(n)
    mask = masks.random_mask(weight, share, torch.Generator().manual_seed(seed))
    assert int((~mask).sum()) == masks.removed_count(share, n)
    assert torch.equal(mask, masks.random_mask(weight, share, torch.Generator().manual_seed(seed)))


def test_random_mask_removes_each_weight_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = sum(masks.random_mask(torch.zeros(10), 0.3, generator).double() for _ in range(2000))
    # binomial with p = 0.7: standard deviation 0.0102, five of them
    assert torch.allclose(kept / 2000, torch.full((10,), 0.7, dtype=torch.float64), atol=0.05)


@settings(deadline=None)
@given(st.data(), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5)]), st.sampled_from([0, 1, 2, -1]))
def test_n_m_mask_is_the_slow_reference(data: st.DataObject, pattern: tuple[int, int], dim: int) -> None:
    n, m = pattern
    shape = [2, 2, 2]
    shape[dim] = 2 * m
    values = data.draw(st.lists(st.integers(-3, 3), min_size=8 * m, max_size=8 * m))
    weight = torch.tensor(values, dtype=torch.float32).view(shape)
    mask = patterns.n_m_mask(weight, n, m, dim=dim)
    assert mask.is_contiguous()
    lines = weight.abs().movedim(dim, -1).reshape(-1, m).tolist()
    kept = mask.movedim(dim, -1).reshape(-1, m).tolist()
    assert kept == [slow_keep(line, m - n) for line in lines]


@pytest.mark.parametrize(
    ("shape", "n", "m", "dim", "message"),
    [
        ((4, 6), 2, 4, 1, "not divisible by 4"),
        ((4,), 2, 4, 1, "does not fit"),
        ((4, 4), 4, 4, 1, "0 < N < M"),
        ((4, 4), 0, 4, 1, "0 < N < M"),
    ],
)
def test_n_m_mask_refuses_what_does_not_fit(shape: tuple[int, ...], n: int, m: int, dim: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patterns.n_m_mask(torch.ones(shape), n, m, dim=dim)


@settings(deadline=None)
@given(st.data(), st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]), SHARES)
def test_block_mask_is_the_slow_reference(data: st.DataObject, block: tuple[int, int], share: float) -> None:
    values = data.draw(st.lists(st.integers(-3, 3), min_size=24, max_size=24))
    weight = torch.tensor(values, dtype=torch.float32).view(4, 3, 2)  # (out, in, kernel)
    matrix = weight.abs().view(4, 6)
    rows, columns = block
    corners = [(r, c) for r in range(0, 4, rows) for c in range(0, 6, columns)]
    means = [float(matrix[r : r + rows, c : c + columns].mean()) for r, c in corners]
    expected = torch.zeros(4, 6, dtype=torch.bool)
    kept = slow_keep(means, masks.removed_count(share, len(corners)))
    for (r, c), keep in zip(corners, kept, strict=True):
        expected[r : r + rows, c : c + columns] = keep
    assert torch.equal(patterns.block_mask(weight, block, share), expected.view(4, 3, 2))


@pytest.mark.parametrize(
    ("shape", "block", "message"),
    [
        ((4, 6), (3, 1), "do not tile"),
        ((4, 6), (1, 4), "do not tile"),
        ((4,), (1, 1), "matrix"),
        ((4, 6), (0, 1), "at least"),
    ],
)
def test_block_mask_refuses_what_does_not_fit(shape: tuple[int, ...], block: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patterns.block_mask(torch.ones(shape), block, 0.5)


def test_nan_weights_are_kept() -> None:
    weight = torch.tensor([math.nan, 0.1, 0.2])
    assert masks.magnitude_mask(weight, 1 / 3).tolist() == [True, False, True]
    assert masks.threshold_mask(weight, 0.1).tolist() == [True, False, True]


@given(VALUES, st.sampled_from([0.0, 1.0, 2.5]))
def test_threshold_removes_up_to_and_with_it(values: list[float], threshold: float) -> None:
    assert masks.threshold_mask(torch.tensor(values), threshold).tolist() == [abs(v) > threshold for v in values]


def test_threshold_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        masks.threshold_mask(torch.ones(1), -1.0)


def test_sparsity_of_counts_all_tensors_together() -> None:
    assert masks.sparsity_of([]) == 0.0
    assert masks.sparsity_of([torch.tensor([0.0, -0.0, 1.0]), torch.zeros(1, 5)]) == 7 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_selection_removes_what_a_stable_sort_puts_first(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 300):
        scores = torch.randint(-3, 4, (size,), generator=generator).to(dtype)
        if dtype.is_floating_point and size > 2:
            scores[0], scores[1], scores[2] = torch.nan, -torch.inf, -0.0
            scores[-1] = torch.nan
        for removed in range(size + 1):
            expected = torch.ones(size, dtype=torch.bool)
            expected[scores.argsort(stable=True)[:removed]] = False
            assert torch.equal(masks.keep_largest(scores, removed / size), expected), (size, removed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_zeroed_is_plus_zero_whatever_it_was(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.5, -2.0, torch.nan, torch.inf], [-torch.inf, -0.0, 1e-3, -7.0]]).to(dtype)
    mask = torch.tensor([[True, False, False, False], [False, False, True, True]])
    for weight in (values.clone(), values.t().contiguous().t()):
        parameter = torch.nn.Parameter(weight)
        masks.zero_out(parameter, mask)
        assert torch.equal(parameter, values.masked_fill(~mask, 0))
        assert not parameter[~mask].signbit().any()
        assert parameter.is_leaf and parameter._version > 0
