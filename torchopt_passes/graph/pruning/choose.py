"""Which units leave: by ratio, or so that a budget of MACs or parameters is met, the largest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.graph.axes import Axes, Mask
from torchopt_passes.graph.grouping import Grouping
from torchopt_passes.graph.labels import Ids

__all__ = ["Candidate", "CostModel", "choose_by_budget", "choose_by_ratio"]

Chosen = dict[str, Mask]
"""Group name -> which of its units leave."""


@dataclass(frozen=True)
class Candidate:
    """A group from which units may leave.

    Args:
        name: of the group.
        scores: importance of each unit, float64, shape (size,); the lowest leaves first.
        ratio: share of its units that leaves; None to follow the ratio or the budget of all.
        min_units: units that stay at least.
        round_to: the number of units that stay is a multiple of it.
        gone: units that have left in earlier rounds; ratios are of what there was before.
        shape: groups of the same shape are ranked together under ``scope="isomorphic"``.
    """

    name: str
    scores: npt.NDArray[np.float64]
    ratio: float | None
    min_units: int
    round_to: int
    shape: tuple[object, ...]
    gone: int = 0

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.scores)

    def lowest(self, count: int) -> Mask:
        """Return a mask of the `count` least important units, or as many as the limits allow."""
        stays = max(self.size - count, min(self.min_units, self.size))
        if self.round_to > 1 and self.size >= self.round_to:
            stays = min(math.ceil(stays / self.round_to) * self.round_to, self.size)
        mask = np.zeros(self.size, bool)
        mask[np.argsort(self.scores, kind="stable")[: self.size - stays]] = True
        return mask


class CostModel:
    """Counts MACs or parameters of a graph for any choice of units, without removing them.

    Args:
        grouping: the groups of the graph.
        what: ``"macs"`` of the example inputs, or ``"params"``.
    """

    def __init__(self, grouping: Grouping, what: Literal["macs", "params"]) -> None:
        self._grouping = grouping
        axes = grouping.axes
        terms = [(term.constant, term.axes) for term in axes.macs] if what == "macs" else _parameter_terms(axes)
        self._factors: list[tuple[int, Ids]] = []  # of the axes that can shrink: size, factors
        self._terms: list[tuple[int, list[int]]] = []  # constant, numbers of the axes
        numbers: dict[bytes, int] = {}
        for constant, labels in terms:
            used: list[int] = []
            for ids in labels:
                factors = axes.labels.factors(ids)
                if not factors.any():
                    constant *= len(ids)
                    continue
                number = numbers.setdefault(factors.tobytes(), len(self._factors))
                if number == len(self._factors):
                    self._factors.append((len(ids), factors))
                used.append(number)
            self._terms.append((constant, used))
        self.full = self.cost({})

    def cost(self, chosen: Mapping[str, Mask]) -> int:
        """Return the cost when the chosen units leave."""
        removed = np.zeros(len(self._grouping.axes.labels), bool)
        for name, mask in chosen.items():
            removed[self._grouping.atoms[name][mask]] = True
        kept = [size - int(removed[factors].any(1).sum()) for size, factors in self._factors]
        return sum(math.prod([constant, *(kept[number] for number in used)]) for constant, used in self._terms)

    def expected(self, open_: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the cost with the size of each axis at its expected value, for units that stay with a probability.

        Args:
            open_: group name -> probability that each unit stays, (units,); units of other groups stay.

        Returns:
            Scalar, float64 on the CPU; gradients reach the probabilities.

        Math:
            sum over products of constant * prod over axes of E[size], an index staying when all of its units do, by
            themselves. It is the expected cost where no product runs over one group twice.

        Source:
            Xia et al. 2022, "Structured Pruning Learns Compact and Accurate Models", section 3.1.
        """
        stays = torch.ones(len(self._grouping.axes.labels), dtype=torch.float64)
        for name, probability in open_.items():
            atoms = torch.from_numpy(self._grouping.atoms[name])
            stays = stays.index_copy(0, atoms, probability.to("cpu", torch.float64))
        sizes = [stays[torch.from_numpy(factors)].prod(1).sum() for _, factors in self._factors]
        terms = [
            math.prod([sizes[number] for number in used], start=stays.new_tensor(constant))
            for constant, used in self._terms
        ]
        return torch.stack(terms).sum()


def _parameter_terms(axes: Axes) -> list[tuple[int, tuple[Ids, ...]]]:
    parameters = dict(axes.graph_module.named_parameters())
    terms = [(1, labels) for fqn, labels in axes.tensors.items() if fqn in parameters]
    unread = sum(p.numel() for fqn, p in parameters.items() if fqn not in axes.tensors)
    return [*terms, (unread, ())]


def choose_by_ratio(
    candidates: Sequence[Candidate], ratio: float, scope: Literal["group", "global", "isomorphic"]
) -> Chosen:
    """Return the least important share of the units.

    Args:
        candidates: the groups; those with a ratio of their own follow it.
        ratio: share of units that leaves, 0 <= ratio < 1; of each group, of all, or of all groups of one shape.
        scope: which units are ranked together.
    """
    chosen = {c.name: c.lowest(_due([c], c.ratio)) for c in candidates if c.ratio is not None}
    free = [c for c in candidates if c.ratio is None]
    pools: dict[object, list[Candidate]] = {}
    for candidate in free:
        key = {"group": candidate.name, "global": "", "isomorphic": candidate.shape}[scope]
        pools.setdefault(key, []).append(candidate)
    for pool in pools.values():
        chosen |= _lowest_of(pool, _due(pool, ratio))
    return chosen


def _due(pool: Sequence[Candidate], ratio: float) -> int:
    """Return how many units of several groups have still to leave for a ratio."""
    gone = sum(c.gone for c in pool)
    return max(removed_count(ratio, sum(c.size for c in pool) + gone) - gone, 0)


def _lowest_of(pool: Sequence[Candidate], count: int) -> Chosen:
    """Return the `count` least important units of several groups, within the limits of each."""
    flat = np.concatenate([c.scores for c in pool])
    owner = np.concatenate([np.full(c.size, number) for number, c in enumerate(pool)])
    leave = owner[np.argsort(flat, kind="stable")[:count]]
    return {c.name: c.lowest(int((leave == number).sum())) for number, c in enumerate(pool)}


def choose_by_budget(
    candidates: Sequence[Candidate],
    budget: int,
    scope: Literal["group", "global", "isomorphic"],
    cost: Callable[[Mapping[str, Mask]], int],
    what: str,
) -> Chosen:
    """Return the largest choice of least important units whose cost fits a budget.

    The ratio is raised (by bisection) until the cost fits; then units come back, the most important first, for as long
    as one fits: no unit that leaves could stay without exceeding the budget.

    Args:
        candidates: the groups.
        budget: of MACs or parameters, at most.
        scope: see `choose_by_ratio`.
        cost: of a choice.
        what: is counted, for messages.

    Raises:
        ConfigError: nothing fits; names the least that can be reached.
    """
    total = sum(c.size for c in candidates if c.ratio is None)
    least = cost(choose_by_ratio(candidates, 1.0, scope))
    if least > budget:
        raise ConfigError(
            f"{what} cannot be brought to {budget:,}: the least that can be reached is {least:,} (min_units, round_to, "
            "overrides, skipped and locked groups keep the rest)"
        )
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        fits = cost(choose_by_ratio(candidates, middle / total, scope)) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    chosen = choose_by_ratio(candidates, low / max(total, 1), scope)
    open_ = {c.name: c for c in candidates if c.ratio is None and chosen[c.name].any()}
    while open_:
        best = max(open_.values(), key=lambda c: float(c.scores[chosen[c.name]].max()))
        back = dict(chosen)
        step = best.round_to if best.size >= best.round_to else 1
        back[best.name] = best.lowest(max(int(chosen[best.name].sum()) - step, 0))
        if cost(back) <= budget and not np.array_equal(back[best.name], chosen[best.name]):
            chosen = back
        else:
            del open_[best.name]
            continue
        if not chosen[best.name].any():
            del open_[best.name]
    return chosen


def as_scores(scores: torch.Tensor, size: int, name: str) -> npt.NDArray[np.float64]:
    """Check scores of a criterion and return them as numbers.

    Raises:
        ConfigError: they are not one finite number for each unit.
    """
    values = scores.detach().double().cpu().numpy() if not scores.is_meta else np.zeros(size)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ConfigError(f"the importance of {name} must be {size} finite numbers, not shape {values.shape}")
    return values
