"""GPTQ against optimal brain quantization written from its formula, one row and one column at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.gptq import Rounder, add_hessian, gptq, output_error
from torchopt_passes.functional.groupwise import GroupGrid, fit_least_squares, fit_range

Fit = Callable[[torch.Tensor, torch.Tensor], Rounder]


def correlated(samples: int, columns: int, rank: int) -> torch.Tensor:
    """Return inputs that lie near a plane of `rank` dimensions."""
    return torch.randn(samples, rank) @ torch.randn(rank, columns) + 0.1 * torch.randn(samples, columns)


def slow(
    weight: torch.Tensor, hessian: torch.Tensor, fit: Fit, group: int, order: list[int], damping: float
) -> torch.Tensor:
    """OBQ in a given order: w_k -= (w_j - q_j) [H^-1]_jk / [H^-1]_jj, then eliminate j from H^-1 (Frantar eq. 2, 3)."""
    work, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + torch.eye(columns, dtype=torch.float64) * damping * hessian.diagonal().double().mean()
    inverse, result, grids = torch.linalg.inv(damped), torch.zeros_like(work), {}
    if order != list(range(columns)):
        grids = {
            g: fit(weight[:, g * group : (g + 1) * group], torch.arange(g * group, (g + 1) * group))
            for g in range(columns // group)
        }
    for j in order:
        g = j // group
        if g not in grids:
            grids[g] = fit(work[:, j : j + group].float(), torch.arange(j, j + group))
        for row in range(len(work)):
            value = work[:, j : j + 1].float()
            q = grids[g](value)[row, 0].double()
            delta = (work[row, j] - q) / inverse[j, j]
            result[row, j] = q
            work[row] -= delta * inverse[j]
            work[row, j] = q  # it is fixed now: later rows must not see it moved
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize(("group", "act_order"), [(12, False), (4, False), (4, True), (12, True)])
def test_equals_the_slow_reference(group: int, act_order: bool) -> None:
    weight, x = torch.randn(5, 12), correlated(40, 12, 4)
    hessian = add_hessian(torch.zeros(12, 12), x)

    def fit(columns: torch.Tensor, index: torch.Tensor):
        assert columns.shape == (5, len(index))
        return fit_range(columns, 3, columns.shape[1], symmetric=False).round

    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else list(range(12))
    fast = gptq(weight, hessian, fit, group_size=group, act_order=act_order, damping=0.05, block_size=5)
    reference = slow(weight, hessian, fit, group, order, 0.05)
    torch.testing.assert_close(fast, reference.float(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(fast, fit(weight, torch.arange(12))(weight))


def test_any_block_size_gives_the_same() -> None:
    weight, x = torch.randn(6, 32), correlated(100, 32, 8)
    hessian = add_hessian(torch.zeros(32, 32), x)

    def fit(columns: torch.Tensor, index: torch.Tensor):
        return fit_range(columns, 4, columns.shape[1], symmetric=True).round

    first, *others = [gptq(weight, hessian, fit, group_size=8, block_size=size) for size in (32, 8, 5, 1)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_hessian_streams_and_its_error_is_that_of_the_outputs() -> None:
    x, difference = torch.randn(30, 7), torch.randn(4, 7)
    hessian = torch.zeros(7, 7)
    for batch in x.split(11):
        add_hessian(hessian, batch)
    torch.testing.assert_close(hessian, 2 * x.T @ x)
    assert output_error(difference, hessian) == pytest.approx(float((x @ difference.T).square().sum()), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest_on_correlated_inputs(bits: int) -> None:
    weight, x = torch.randn(16, 64), correlated(512, 64, 16)
    hessian = add_hessian(torch.zeros(64, 64), x)
    grid = fit_range(weight, bits, 64, symmetric=True)
    nearest = output_error(weight - grid.round(weight), hessian)
    ours = output_error(weight - gptq(weight, hessian, lambda c, i: grid.round), hessian)
    ordered = output_error(weight - gptq(weight, hessian, lambda c, i: grid.round, act_order=True), hessian)
    assert ours < 0.4 * nearest and ordered < 0.4 * nearest


def test_a_codebook_is_a_grid_like_any_other() -> None:
    weight, x = torch.randn(8, 32), correlated(200, 32, 8)
    codes = torch.tensor([-2.5, -1.5, -0.9, -0.4, -0.1, 0.1, 0.4, 0.9, 1.5, 2.5])

    def nearest(columns: torch.Tensor) -> torch.Tensor:
        return codes[(columns.unsqueeze(-1) - codes).abs().argmin(-1)]

    hessian = add_hessian(torch.zeros(32, 32), x)
    rounded = gptq(weight, hessian, lambda c, i: nearest)
    assert set(rounded.unique().tolist()) <= set(codes.tolist())
    assert output_error(weight - rounded, hessian) < 0.8 * output_error(weight - nearest(weight), hessian)


def test_a_column_without_inputs_is_rounded_to_nearest_and_bad_input_is_refused() -> None:
    weight, x = torch.randn(4, 6), torch.randn(50, 6)
    x[:, 2] = 0
    hessian = add_hessian(torch.zeros(6, 6), x)
    rounded = gptq(weight, hessian, lambda c, i: torch.round)
    assert torch.equal(rounded[:, 2], weight[:, 2].round()) and bool(rounded.isfinite().all())
    everything_dead = gptq(weight, torch.zeros(6, 6), lambda c, i: torch.round)
    assert torch.equal(everything_dead, weight.round())
    with pytest.raises(ConfigError, match="6 x 6"):
        gptq(weight, torch.zeros(5, 5), lambda c, i: torch.round)
    with pytest.raises(ConfigError, match="not finite"):
        gptq(weight, torch.full((6, 6), float("nan")), lambda c, i: torch.round)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 10**6))
def test_grids_round_to_the_nearest_of_their_values(bits: int, symmetric: bool, seed: int) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    grid = fit_range(weight, bits, 8, symmetric=symmetric)
    integers = grid.quantize(weight)
    assert int(integers.min()) >= -(2 ** (bits - 1)) and int(integers.max()) <= 2 ** (bits - 1) - 1
    levels = torch.arange(grid.quant_min, grid.quant_max + 1).float()
    values = (levels - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)  # [3, 2, levels]
    distance = (weight.view(3, 2, 8, 1) - values.unsqueeze(2)).abs().amin(-1).flatten(1)
    torch.testing.assert_close((grid.round(weight) - weight).abs(), distance, rtol=1e-4, atol=1e-5)
    assert torch.equal(grid.quantize(grid.dequantize(integers)), integers)


@settings(max_examples=15, deadline=None)
@given(bits=st.integers(2, 5), symmetric=st.booleans(), seed=st.integers(0, 10**6))
def test_least_squares_never_loses_to_the_range_and_uses_importance(bits: int, symmetric: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, h = torch.randn(4, 64, generator=generator), torch.rand(64, generator=generator) ** 4

    def error(grid: GroupGrid, h: torch.Tensor) -> float:
        return float(((weight - grid.round(weight)).square() * h).sum())

    ones = torch.ones(64)
    full = fit_range(weight, bits, 32, symmetric=symmetric)
    plain = fit_least_squares(weight, bits, 32, symmetric=symmetric)
    weighted = fit_least_squares(weight, bits, 32, symmetric=symmetric, importance=h)
    assert error(plain, ones) <= error(full, ones) * (1 + 1e-5)
    assert error(weighted, h) <= error(full, h) * (1 + 1e-5)


def test_least_squares_finds_the_best_scale_of_a_brute_force_search() -> None:
    weight = torch.randn(1, 32)
    found = fit_least_squares(weight, 3, 32, symmetric=True)
    scales = torch.linspace(0.05, 1.2, 4000)
    steps = torch.round(weight / scales.unsqueeze(1)).clamp(-4, 3)
    brute = (weight - steps * scales.unsqueeze(1)).square().sum(1).min()
    assert float((weight - found.round(weight)).square().sum()) <= 1.1 * float(brute)


def test_grids_of_zeros_and_shapes_that_do_not_fit() -> None:
    grid = fit_range(torch.zeros(2, 8), 4, 4, symmetric=False)
    assert torch.equal(grid.round(torch.zeros(2, 8)), torch.zeros(2, 8))
    for bad in (3, 0):
        with pytest.raises(ConfigError, match="groups"):
            fit_range(torch.zeros(2, 8), 4, bad, symmetric=True)
    with pytest.raises(ConfigError, match="bits"):
        fit_range(torch.zeros(2, 8), 9, 4, symmetric=True)


def test_fixed_entries_keep_their_value_and_others_make_up_for_it() -> None:
    weight, x = torch.randn(4, 10), correlated(60, 10, 4)
    hessian = add_hessian(torch.zeros(10, 10), x)
    fixed = torch.rand(4, 10) < 0.4
    weight[fixed] = torch.where(torch.rand(4, 10) < 0.5, 0.0, 7.3)[fixed]
    fast = gptq(weight, hessian, lambda c, i: torch.round, fixed=fixed, act_order=True, damping=0.05, block_size=3)
    assert torch.equal(fast[fixed], weight[fixed])

    order = torch.argsort(hessian.diagonal(), descending=True).tolist()
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(10, dtype=torch.float64)
    for row in range(4):  # one row at a time, the inverse of what is left computed anew
        work, left = weight[row].double().clone(), list(order)
        for j in order:
            inverse = torch.linalg.inv(damped[left][:, left])
            place = left.index(j)
            q = weight[row, j].double() if bool(fixed[row, j]) else work[j].round()
            work[left] -= (work[j] - q) / inverse[place, place] * inverse[place]
            work[j] = q
            left.remove(j)
        torch.testing.assert_close(fast[row], work.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"fixed has shape \(2, 10\)"):
        gptq(weight, hessian, lambda c, i: torch.round, fixed=fixed[:2])
