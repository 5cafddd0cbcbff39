"""The exact choice of one option for each layer under budgets: a multiple-choice knapsack, as an integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from torchopt_passes.errors import ConfigError

__all__ = ["choose_options"]

Table = Sequence[Sequence[float]]
"""One row for each layer, one figure for each of its options."""


def choose_options(costs: Table, spent: Mapping[str, Table], budgets: Mapping[str, float]) -> tuple[int, ...]:
    """Choose one option for each layer so that the summed cost is least and no budget is exceeded.

    Formula: min sum_ij c_ij x_ij with x_ij in {0, 1}, sum_j x_ij = 1 for each layer i, and
        sum_ij s_ij x_ij <= b for each budget b.

    Args:
        costs: for each layer the cost of each option; layers may have different numbers of options.
        spent: budget -> for each layer what each option spends of it.
        budgets: budget -> how much there is, in the unit of `spent`.

    Returns:
        The index of the chosen option of each layer. Budgets are kept exactly, not within a solver's tolerance;
        the cost is least within 1e-9 of the largest cost of one option.

    Source:
        Sinha and Zoltners 1979, "The multiple-choice knapsack problem"; solved by HiGHS through `scipy.optimize.milp`.

    Raises:
        ConfigError: no choice keeps the budgets; names the least that can be reached.

    Example:
        >>> choose_options([[3.0, 1.0], [5.0, 0.0]], {"bytes": [[1, 2], [1, 2]]}, {"bytes": 3})
        (0, 1)
    """
    for name, budget in budgets.items():
        least = sum(min(row) for row in spent[name])
        if least > budget:
            raise ConfigError(f"no choice keeps {name} <= {budget:,.6g}: the least that can be reached is {least:,.6g}")
    if not costs:
        return ()
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    size = len(owner)
    cost = np.concatenate([np.asarray(row, dtype=float) for row in costs])
    largest = float(np.abs(cost).max()) or 1.0
    rules = [LinearConstraint(csr_array((np.ones(size), (owner, np.arange(size)))), lb=1, ub=1)]
    flat = {name: np.concatenate([np.asarray(row, dtype=float) for row in spent[name]]) for name in budgets}
    for name, budget in budgets.items():
        unit = float(np.abs(flat[name]).max()) or 1.0
        rules.append(LinearConstraint(flat[name][None, :] / unit, ub=budget / unit))
    for _ in range(100):
        # HiGHS stops within an absolute 1e-6 of the best: the scale makes that 1e-9 of the largest cost
        found = milp(
            cost * (1e3 / largest),
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=rules,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            reach = ", ".join(f"{name} {sum(min(row) for row in spent[name]):,.6g}" for name in budgets)
            raise ConfigError(f"no choice keeps all budgets {dict(budgets)} together; each alone can reach {reach}")
        chosen = found.x > 0.5
        if all(float(flat[name][chosen].sum()) <= budget for name, budget in budgets.items()):
            starts = np.searchsorted(owner, np.arange(len(costs)))
            return tuple(int(i) for i in np.flatnonzero(chosen) - starts)
        # the solver's tolerance let it through: this very choice is forbidden, and the next best is asked for
        rules.append(LinearConstraint(chosen.astype(float)[None, :], ub=len(costs) - 1))
    raise ConfigError(f"no choice keeps {dict(budgets)} exactly: give budgets a little more room")
