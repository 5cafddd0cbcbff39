"""One-dimensional k-means of many groups at once, weighted, exact in every step.

In one dimension a cluster is an interval, so a step runs on sorted values and their prefix sums: it costs K binary
searches, not n distances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.codebooks import at_least_float32, borders

__all__ = ["kmeans"]

SKETCH = 32
"""So many points for each cluster stand for a group while starts are compared."""
SOLVED = 1024
"""So many points at most stand for a single group when its optimum is computed: the cost is K times their square."""
BLOCK = 2**18
"""So many values of small groups are clustered at once: they stay in the cache."""


def kmeans(
    values: torch.Tensor,
    clusters: int,
    *,
    importance: torch.Tensor | None = None,
    keep_zero: bool = False,
    seed: int = 0,
    restarts: int = 4,
    max_steps: int = 1000,
) -> torch.Tensor:
    """Return cluster centres that locally minimize the weighted squared error of each group.

    Formula: minimize sum_i h_i (w_i - c_a(i))^2, with a(i) the nearest centre. Steps, each exact on all values:
        boundaries b_k = (c_k + c_k+1) / 2;  c_k = sum h_i w_i / sum h_i over b_k-1 < w_i <= b_k.
    Starts are compared on at most 32 K points (means of runs of equal count and of equal width); the best goes on with
    all values until no value changes its cluster. For a single group one start is the optimum of such points, computed
    by dynamic programming. A group with no more distinct values than clusters keeps them exactly.

    Args:
        values: (G, n), floating.
        clusters: K, 1 to 256.
        importance: h >= 0, (G, n); None for 1. A value of importance 0 has no say.
        keep_zero: one centre is 0 exactly, and stays there.
        seed: of the k-means++ starts: the same seed gives the same centres.
        restarts: how many starts are tried.
        max_steps: limit of the steps.

    Returns:
        (G, K) in the dtype of the values (float32 for half precision), ascending. Clusters that are not needed are
        duplicates.

    Source:
        Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++", section 2.2;
        weighted as in Choi et al. 2017, "Towards the limit of network quantization", equation 7; Fisher 1958, "On
        grouping for maximum homogeneity" (the optimum).

    Example:
        >>> kmeans(torch.tensor([[1.0, 1.2, 5.0, 5.2, 9.0]]), 3)
        tensor([[1.1000, 5.1000, 9.0000]])
    """
    if not 1 <= clusters <= 256:
        raise ConfigError(f"clusters must be 1 to 256, not {clusters}")
    values = at_least_float32(values.detach())
    rows = max(1, BLOCK // max(values.shape[1], 1))
    generator = torch.Generator().manual_seed(seed)
    found = [
        _cluster(
            values[start : start + rows],
            None if importance is None else importance[start : start + rows],
            clusters,
            keep_zero,
            generator,
            restarts,
            max_steps,
        )
        for start in range(0, len(values), rows)
    ]
    return torch.cat(found).to(values.dtype)


@dataclass(frozen=True)
class _Sorted:
    """Groups in ascending order, with prefix sums: the sum of any interval is one difference.

    Args:
        values: (G, n) ascending.
        moments: (G, n + 1) float64, sums of h w over the first i values.
        weights: (G, n + 1) float64, sums of h; None where h is 1 (then it is i).
    """

    values: torch.Tensor
    moments: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def of(cls, values: torch.Tensor, importance: torch.Tensor | None) -> _Sorted:
        """Sort the groups."""
        if importance is None:
            if values.device.type == "cpu":  # numpy sorts without making indices
                values = torch.from_numpy(np.sort(values.numpy(), axis=1))
            else:
                values = values.sort(dim=1).values
            return cls(values, _prefix(values.double()), None)
        values, order = values.sort(dim=1)
        weights = importance.detach().gather(1, order).double()
        return cls(values, _prefix(weights * values), _prefix(weights))

    def weight_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the sum of h over the first `positions` values, (G, K) float64."""
        return positions.double() if self.weights is None else self.weights.gather(1, positions)

    def sketch(self, size: int) -> _Sorted:
        """Return groups of `size` points, the means of runs: half of the borders at equal counts, half at equal widths.

        Points of equal count alone would melt the few values of a long tail into one.
        """
        count, device = self.values.shape[1], self.values.device
        even = torch.linspace(0, count, size // 2 + 1, dtype=torch.float64, device=device).long()
        low, high = self.values[:, :1], self.values[:, -1:]
        steps = torch.linspace(0, 1, size - size // 2 + 2, dtype=self.values.dtype, device=device)[1:-1]
        wide = torch.searchsorted(self.values, (low + (high - low) * steps).contiguous())
        edges = torch.cat([even.expand(len(self.values), -1), wide], dim=1).sort(dim=1).values
        moments, weights = self.moments.gather(1, edges), self.weight_at(edges)
        mass = weights.diff(dim=1)
        middle = self.values.gather(1, edges[:, :-1].clamp(max=count - 1)).double()
        points = torch.where(mass > 0, moments.diff(dim=1) / mass.clamp(min=1e-300), middle)
        return _Sorted(points.to(self.values.dtype), moments, weights)

    def repeat(self, times: int) -> _Sorted:
        """Return the groups `times` over."""
        weights = None if self.weights is None else self.weights.repeat(times, 1)
        return _Sorted(self.values.repeat(times, 1), self.moments.repeat(times, 1), weights)

    def choose(self, groups: torch.Tensor) -> _Sorted:
        """Return some of the groups."""
        weights = None if self.weights is None else self.weights[groups]
        return replace(self, values=self.values[groups], moments=self.moments[groups], weights=weights)

    def sums(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return where clusters end, (G, K - 1), and their sums of h and h w, (G, K)."""
        ends = torch.searchsorted(self.values, borders(centres, self.values.dtype), right=True)
        first = torch.zeros_like(ends[:, :1]) if ends.shape[1] else ends.new_zeros(len(ends), 1)
        edges = torch.cat([first, ends, torch.full_like(first, self.values.shape[1])], dim=1)
        return ends, self.weight_at(edges).diff(dim=1), self.moments.gather(1, edges).diff(dim=1)


def _cluster(
    values: torch.Tensor,
    importance: torch.Tensor | None,
    clusters: int,
    keep_zero: bool,
    generator: torch.Generator,
    restarts: int,
    max_steps: int,
) -> torch.Tensor:
    groups = len(values)
    full = _Sorted.of(values, importance)
    few = full.sketch(SKETCH * clusters) if values.shape[1] > SKETCH * clusters else full
    tried = few.repeat(restarts)
    centres = _lloyd(tried, _plus_plus(tried, clusters, keep_zero, generator), keep_zero, max_steps)
    best = _gain(tried, centres).view(restarts, groups).argmax(0)
    centres = centres.view(restarts, groups, -1)[best, torch.arange(groups, device=best.device)]
    if few is not full:
        centres = _lloyd(full, centres, keep_zero, max_steps)
    if groups == 1 and clusters > 1 + keep_zero:
        start = _optimum(full.sketch(SOLVED) if values.shape[1] > SOLVED else full, clusters - keep_zero)
        start = torch.cat([start, start.new_zeros(1, int(keep_zero))], dim=1).sort(dim=1).values
        solved = _lloyd(full, start, keep_zero, max_steps)
        centres = solved if _gain(full, solved) > _gain(full, centres) else centres
    return _exact_where_few(full.values, centres, keep_zero)


def _gain(points: _Sorted, centres: torch.Tensor) -> torch.Tensor:
    """Return how much of sum h w^2 the centres explain: the error is the rest."""
    _, weight, moment = points.sums(centres)
    return (2 * centres * moment - centres.square() * weight).sum(1)


def _optimum(points: _Sorted, clusters: int) -> torch.Tensor:
    """Return the optimal centres of the points of one group, (1, K): every run is tried as the last cluster."""
    values = points.values[0].double()
    weights = torch.ones_like(values) if points.weights is None else points.weights[0].diff()
    mass, moment, square = (_prefix((weights * values**power).unsqueeze(0))[0] for power in range(3))

    def between(sums: torch.Tensor) -> torch.Tensor:
        return sums.unsqueeze(0) - sums.unsqueeze(1)  # of the run from i to j

    cost = between(square) - between(moment).square() / between(mass).clamp(min=1e-300)
    cost = cost.clamp(min=0.0).masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    least, cuts = cost[0], list[torch.Tensor]()
    for _ in range(clusters - 1):
        found = (least.unsqueeze(1) + cost).min(0)
        least = found.values
        cuts.append(found.indices)
    end, centres = len(values), list[torch.Tensor]()
    for begin in (*reversed(cuts), None):
        start = 0 if begin is None else int(begin[end])
        inside = mass[end] - mass[start]
        mean = (moment[end] - moment[start]) / inside
        centres.append(mean if bool(inside > 0) else values[min(start, len(values) - 1)])
        end = start
    return torch.stack(centres).unsqueeze(0).sort(dim=1).values


def _plus_plus(points: _Sorted, clusters: int, keep_zero: bool, generator: torch.Generator) -> torch.Tensor:
    """Return k-means++ starts, (G, K) float64: each next one is drawn with chance h D^2, D the distance so far."""
    values = points.values
    weight = None if points.weights is None else points.weights.diff(dim=1).to(values.dtype)
    draws = torch.rand(clusters, len(values), 1, generator=generator).to(values)
    distance = torch.ones_like(values)
    centres: list[torch.Tensor] = []
    for number in range(clusters):
        if number == 0 and keep_zero:
            centre = torch.zeros_like(values[:, :1])
        else:
            chance = (distance if weight is None else weight * distance).cumsum(1)
            drawn = torch.searchsorted(chance, draws[number] * chance[:, -1:]).clamp(max=values.shape[1] - 1)
            centre = values.gather(1, drawn)
        centres.append(centre)
        squared = (values - centre).square_()
        distance = squared if number == 0 else torch.minimum(distance, squared, out=distance)
    return torch.cat(centres, dim=1).double().sort(dim=1).values


def _lloyd(points: _Sorted, centres: torch.Tensor, keep_zero: bool, max_steps: int) -> torch.Tensor:
    """Move ascending centres to the means of their clusters until no value changes its cluster."""
    result = centres.clone()
    active = torch.arange(len(centres), device=centres.device)
    last: torch.Tensor | None = None
    for _ in range(max_steps):
        ends, weight, moment = points.sums(centres)
        means = torch.where(weight > 0, moment / weight.clamp(min=1e-300), centres)
        if keep_zero:  # means keep the order of their clusters, so the slot of zero is the same in each step
            means.scatter_(1, (centres < 0).sum(1, keepdim=True), 0.0)
            means = means.sort(dim=1).values  # an empty cluster that stayed behind
        centres = means
        result[active] = centres
        moving = torch.ones(len(ends), dtype=torch.bool) if last is None else (ends != last).any(1)
        count = int(moving.sum())
        if not count or not ends.shape[1]:
            break
        last = ends
        if 2 * count < len(active):
            active, centres, last, points = active[moving], centres[moving], ends[moving], points.choose(moving)
    return result.sort(dim=1).values


def _exact_where_few(ascending: torch.Tensor, centres: torch.Tensor, keep_zero: bool) -> torch.Tensor:
    """Return the distinct values themselves for groups that have no more of them than clusters."""
    if ascending.shape[1] == 0:
        return centres
    rank = torch.nn.functional.pad((ascending.diff(dim=1) != 0).to(torch.int32), (1, 0)).cumsum(1)
    has_zero = (ascending == 0).any(1)
    room = centres.shape[1] - (0 if not keep_zero else (~has_zero).long())
    few = rank[:, -1] < room
    if not bool(few.any()):
        return centres
    exact = ascending[few][:, -1:].double().repeat(1, centres.shape[1])
    exact.scatter_(1, rank[few].long(), ascending[few].double())
    if keep_zero:
        exact[:, -1] = torch.where(has_zero[few], exact[:, -1], 0.0)
    result = centres.clone()
    result[few] = exact.sort(dim=1).values
    return result


def _prefix(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))
