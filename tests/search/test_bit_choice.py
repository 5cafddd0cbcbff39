"""The integer program against trying every choice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.search.bit_choice import choose_options

figure = st.integers(0, 50)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], dict[str, list[list[float]]], dict[str, float]]:
    options = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    names = draw(st.sampled_from([("bytes",), ("bytes", "bitops")]))

    def table() -> list[list[float]]:
        return [[float(draw(figure)) for _ in range(n)] for n in options]

    return table(), {n: table() for n in names}, {n: float(draw(st.integers(0, 120))) for n in names}


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_brute_force(problem: tuple[list[list[float]], dict[str, list[list[float]]], dict[str, float]]) -> None:
    costs, spent, budgets = problem

    def total(table: list[list[float]], choice: tuple[int, ...]) -> float:
        return sum(row[i] for row, i in zip(table, choice, strict=True))

    every = itertools.product(*(range(len(row)) for row in costs))
    kept = [c for c in every if all(total(spent[n], c) <= budgets[n] for n in budgets)]
    if not kept:
        with pytest.raises(ConfigError, match="no choice keeps"):
            choose_options(costs, spent, budgets)
        return
    chosen = choose_options(costs, spent, budgets)
    assert chosen in kept
    assert total(costs, chosen) == min(total(costs, c) for c in kept)


def test_scale_does_not_matter() -> None:
    # costs far below the solver's absolute gap of 1e-6, sizes far above its tolerances
    costs = [[4e-9, 1e-9], [3e-9, 0.5e-9], [2.9e-9, 0.1e-9]]
    spent = {"bitops": [[1e12, 2e12], [1e12, 2e12], [1e12, 2e12]]}
    assert choose_options(costs, spent, {"bitops": 4e12}) == (1, 0, 0)
    assert choose_options(costs, spent, {"bitops": 6e12 - 1}) == (1, 0, 1)


def test_a_budget_is_kept_exactly() -> None:
    # one byte too much is far inside the solver's tolerance of 1e-6 of a gigabyte
    costs, spent = [[1.0, 0.0]], {"bytes": [[0.0, 1e9 + 1]]}
    assert choose_options(costs, spent, {"bytes": 1e9}) == (0,)
    assert choose_options(costs, spent, {"bytes": 1e9 + 1}) == (1,)


def test_infeasible_names_the_best_reachable() -> None:
    with pytest.raises(ConfigError, match=r"bytes <= 2: the least that can be reached is 5"):
        choose_options([[0.0, 1.0], [0.0]], {"bytes": [[9, 2], [3]]}, {"bytes": 2})
    tables: dict[str, list[list[float]]] = {"bytes": [[1, 5]], "ms": [[5, 1]]}
    with pytest.raises(ConfigError, match=r"together; each alone can reach bytes 1, ms 1"):
        choose_options([[0.0, 0.0]], tables, {"bytes": 3, "ms": 3})
    assert choose_options([], {}, {}) == ()
