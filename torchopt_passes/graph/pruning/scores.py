"""Scores of the units of channel groups: which of them the model misses least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance as criteria
from torchopt_passes.functional import units
from torchopt_passes.functional.units import Aggregation, Normalization
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.pruning.activations import activation_scores
from torchopt_passes.graph.pruning.gradients import gradient_scores
from torchopt_passes.graph.pruning.weight_scores import WeightScores

__all__ = ["CRITERIA", "Importance", "Scores", "parse_importance", "score_groups"]

Importance = str | Callable[[ChannelGroup, fx.GraphModule], torch.Tensor]
"""The name of a criterion (`CRITERIA`, or ``"lp:P"``), or a function that returns scores of shape (group.size,)."""

CRITERIA: dict[str, str] = {
    "l1": "it has no weights",
    "l2": "it has no weights",
    "lp": "it has no weights",
    "random": "",
    "bn_scale": "no batch norm scales its channels",
    "taylor": "none of its weights has a gradient",
    "fisher": "none of its weights has a gradient",
    "fpgm": "it has no filters to compare",
    "lamp": "it has no weights",
    "apoz": "no activation that makes zeros is right behind what makes its channels",
    "mean_activation": "no convolution, linear or matrix product makes its channels",
    "wanda": "no convolution, linear or matrix product reads its channels",
    "hsic": "no convolution, linear or matrix product makes its channels sample by sample",
}
"""Every criterion -> why it may have nothing to look at in a group."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `score_groups` found.

    Args:
        values: name of the group -> importance of its units, float64 on the CPU, shape (group.size,); the lowest
            leaves first.
        fallbacks: name of a group in which the criterion had nothing to look at -> why. It is scored by ``"l2"``.
    """

    values: dict[str, torch.Tensor]
    fallbacks: dict[str, str]


def parse_importance(importance: Importance) -> tuple[str, float]:
    """Return the criterion of a name, ``"custom"`` for a function, and the p of its norm.

    Raises:
        ConfigError: there is no such criterion.

    Example:
        >>> parse_importance("l1"), parse_importance("lp:3"), parse_importance("lp:inf"), parse_importance("taylor")
        (('lp', 1.0), ('lp', 3.0), ('lp', inf), ('taylor', 2.0))
    """
    if callable(importance):
        return "custom", 2.0
    if importance in ("l1", "l2"):
        return "lp", float(importance[1:])
    name, _, number = importance.partition(":")
    try:
        p = float(number) if name == "lp" else 2.0
    except ValueError:
        p = -1.0
    if name not in CRITERIA or not p > 0 or (number and name != "lp"):
        known = ", ".join("lp:P (P > 0)" if known == "lp" else known for known in CRITERIA)
        raise ConfigError(f"there is no importance {importance!r}: it is one of {known}, or a function")
    return name, p


def score_groups(
    graph_module: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    importance: Importance,
    context: PassContext | None = None,
    *,
    aggregation: Aggregation = "mean",
    normalize: Normalization = "mean",
) -> Scores:
    """Return how important each unit of each group is; the graph is left as it is.

    What counts of a group are its axes in parameters with two or more dimensions and in scales (weights of
    normalizations, layer scale), not in biases and buffers; for ``"bn_scale"`` the weights of batch norms, for
    ``"fpgm"`` what has two or more dimensions; for criteria that look at activations, the values that its channels
    have in the graph. Each axis is normalized by itself, then the axes are aggregated. ``"lamp"`` aggregates squared
    norms and is its own normalization; ``"random"`` and a user's function are taken as they are.

    Args:
        graph_module: a captured graph.
        groups: groups of its channels; names are unique.
        importance: ``"l1"``, ``"l2"``, ``"lp:P"``, ``"random"`` (seed of the context), ``"bn_scale"``, ``"taylor"``,
            ``"fisher"``, ``"fpgm"``, ``"lamp"``, ``"apoz"``, ``"mean_activation"``, ``"wanda"``, ``"hsic"``
            (dependence of channel and outputs: batches of some dozen samples), or a function of a group and the graph
            that returns scores of shape (group.size,). Formulas and sources are in `functional.importance` and
            `functional.dependence`.
        context: its `calibration` feeds ``"apoz"``, ``"mean_activation"``, ``"wanda"`` and ``"hsic"``, and
            ``"taylor"`` and ``"fisher"`` when the model returns a loss on it; else these take the parameters'
            ``.grad``.
        aggregation: how the axes of a group make one score; a unit counts on the axes that hold it.
        normalize: what each axis is divided by, so that groups can be ranked together.

    Raises:
        ConfigError: an unknown option, no data or no loss where one is needed, scores that are not finite.
    """
    context = context or PassContext()
    name, p = parse_importance(importance)
    combine = _Combine(aggregation, normalize)
    if name == "custom":
        return Scores(values={g.name: _checked(g, importance(g, graph_module)) for g in groups}, fallbacks={})  # pyright: ignore[reportCallIssue]
    if name == "random":
        generator = torch.Generator().manual_seed(context.seed)
        return Scores(values={g.name: criteria.random_scores(g.size, generator) for g in groups}, fallbacks={})
    weights = WeightScores(graph_module)
    counted = {group.name: weights.counted(group) for group in groups}
    if name in ("taylor", "fisher"):
        found = gradient_scores(graph_module, groups, counted, context, name)
    elif name in ("apoz", "mean_activation", "wanda", "hsic"):
        found = activation_scores(graph_module, groups, context.calibration, name)
    else:
        found = {group.name: weights.scores(group, counted[group.name], name, p) for group in groups}
    values: dict[str, torch.Tensor] = {}
    fallbacks: dict[str, str] = {}
    for group in groups:
        scores = combine(group, found[group.name], name)
        if scores is None:
            some = " (for some of its units)" if found[group.name] else ""
            fallbacks[group.name] = CRITERIA[name] + some
            scores = combine(group, weights.scores(group, counted[group.name], "lp", 2.0), "lp")
        if scores is None:  # biases are all there is
            scores = combine(group, weights.scores(group, weights.parameters(group), "lp", 2.0), "lp")
        if scores is None:
            fallbacks[group.name] += "; it has no parameters at all: its units are equal"
            scores = torch.ones(group.size, dtype=torch.float64)
        values[group.name] = scores
    return Scores(values=values, fallbacks=fallbacks)


@dataclass(frozen=True)
class _Combine:
    """Normalize the axes of a group, aggregate them, and check the result; None where a unit has no score."""

    aggregation: Aggregation
    normalization: Normalization

    def __post_init__(self) -> None:
        # refuses unknown options before any work
        units.aggregate([units.normalize(torch.ones(1), self.normalization)], self.aggregation)

    def __call__(self, group: ChannelGroup, axes: Sequence[torch.Tensor], name: str) -> torch.Tensor | None:
        if not axes:
            return None
        how = "none" if name == "lamp" else self.normalization
        scores = units.aggregate([units.normalize(axis, how) for axis in axes], self.aggregation)
        if bool(scores.isnan().any()):
            return None
        return _checked(group, criteria.lamp(scores) if name == "lamp" else scores)


def _checked(group: ChannelGroup, scores: Any) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (group.size,):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ConfigError(f"importance of {group.name} must be a tensor of shape ({group.size},), not {shape}")
    scores = scores.detach().to("cpu", torch.float64)
    if not bool(scores.isfinite().all()):
        raise ConfigError(f"importance of {group.name} is not finite")
    return scores
