"""HQQ against its formulas, and what it is for: outliers do not stretch the grid of all others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.groupwise import fit_range
from torchopt_passes.functional.hqq import fit_hqq, shrink


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-5, 5), beta=st.floats(0.5, 50))
def test_the_soft_threshold_is_the_minimizer_for_p_1(x: float, beta: float) -> None:
    y = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    best = y[(y.abs() + beta / 2 * (y - x).square()).argmin()]
    assert float(shrink(torch.tensor(x, dtype=torch.float64), beta, 1.0)) == pytest.approx(float(best), abs=1e-3)


def test_shrink_is_the_papers_formula_and_is_0_at_0() -> None:
    x = torch.tensor([-1.5, -0.01, 0.0, 0.3, 2.0])
    expected = [0.0 if v == 0 else (1 if v > 0 else -1) * max(abs(v) - abs(v) ** (0.7 - 1) / 10, 0) for v in x.tolist()]
    torch.testing.assert_close(shrink(x, 10.0, 0.7), torch.tensor(expected))


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_step_is_the_papers_update_where_it_is_better(symmetric: bool) -> None:
    weight = torch.randn(60, 8) * torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 4]])
    start = fit_range(weight, 2, 8, symmetric=symmetric)
    found = fit_hqq(weight, 2, 8, symmetric=symmetric, steps=2)
    better = 0
    for row in range(60):
        s, z = float(start.scale[row]), float(start.zero_point[row])
        q = start.quantize(weight)[row].tolist()  # the largest weight lies on a tie: the same rounding on both sides
        kept = []
        for w, qi in zip(weight[row].tolist(), q, strict=True):
            e = w - s * (qi - z)
            small = 0.0 if e == 0 else (1 if e > 0 else -1) * max(abs(e) - abs(e) ** -0.3 / 10, 0)
            kept.append(w - small)
        new_s, new_z = s, z
        if symmetric and any(q):
            new_s = sum(k * qi for k, qi in zip(kept, q, strict=True)) / sum(qi * qi for qi in q)
        elif not symmetric:
            new_z = sum(qi - k / s for k, qi in zip(kept, q, strict=True)) / 8

        rounded = [(min(max(round(w / new_s + new_z), -2), 1) - new_z) * new_s for w in weight[row].tolist()]
        after = sum(abs(w - r) for w, r in zip(weight[row].tolist(), rounded, strict=True))
        before = float((weight - start.round(weight))[row].abs().sum())
        if after < before - 1e-4:
            better += 1
            assert float(found.scale[row]) == pytest.approx(new_s, rel=1e-4)
            assert float(found.zero_point[row]) == pytest.approx(new_z, rel=1e-4, abs=1e-5)
        elif after > before + 1e-4:
            assert float(found.scale[row]) == pytest.approx(s) and float(found.zero_point[row]) == pytest.approx(z)
    assert 5 < better < 60


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(2, 5), symmetric=st.booleans(), seed=st.integers(0, 10**6))
def test_the_mean_error_never_grows(bits: int, symmetric: bool, seed: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    start = fit_range(weight, bits, 32, symmetric=symmetric)
    found = fit_hqq(weight, bits, 32, symmetric=symmetric)
    before, after = ((weight - grid.round(weight)).abs().mean() for grid in (start, found))
    assert float(after) <= float(before) * (1 + 1e-6)


def test_heavy_tails_lose_less_than_by_the_range() -> None:
    weight = torch.distributions.StudentT(3.0).sample((64, 128))
    start, found = fit_range(weight, 3, 64, symmetric=False), fit_hqq(weight, 3, 64, symmetric=False)
    before, after = ((weight - grid.round(weight)).abs().mean() for grid in (start, found))
    assert float(after) < 0.97 * float(before)
    assert not torch.equal(found.zero_point, found.zero_point.round())


@pytest.mark.parametrize("bad", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"steps": 0}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        fit_hqq(torch.randn(2, 8), 4, 8, symmetric=True, **bad)  # pyright: ignore[reportArgumentType]
