"""PruneChannels: physically remove the least important channels, heads and blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.axes import analyse_axes
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.grouping import Grouping, group_axes
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.choose import Candidate, Chosen, CostModel, choose_by_budget, choose_by_ratio
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices
from torchopt_passes.graph.pruning.scores import CRITERIA, Scores, parse_importance, score_groups
from torchopt_passes.graph.pruning.source_sizes import source_edits
from torchopt_passes.graph.removal_proof import evaluate_masked
from torchopt_passes.graph.surgery import remove_indices, removed_atoms
from torchopt_passes.graph.tensors import get_tensor, matching_pattern
from torchopt_passes.graph.verify import Inputs

__all__ = ["PruneChannels", "removal_of"]

Scope = Literal["group", "global", "isomorphic"]
Found = dict[tuple[str, int], tuple[int, ...]]


class PruneChannels(GraphPass):
    """Remove channels, attention heads (KV groups under GQA) and blocks from the captured graph, physically.

    What can leave is found on the graph (`find_channel_groups`); what cannot is in the report, with node, operation,
    line and reason. Exactly one of `ratio`, `macs`, `params`, `keep` says how much leaves.

    Args:
        ratio: share of the units that leaves, 0 <= ratio < 1; of each group or of all (`scope`).
        macs: multiply-accumulates that stay, at most: a share (float in (0, 1)) or a number (int) for the example
            inputs; the largest choice that fits.
        params: parameters that stay, at most: a share or a number, likewise.
        keep: group name -> the units that stay, for groups that lose any.
        importance: criterion that ranks the units: ``"l1"``, ``"l2"``, ``"lp:P"``, ``"random"``, ``"bn_scale"``,
            ``"taylor"``, ``"fisher"``, ``"fpgm"``, ``"lamp"``, ``"apoz"``, ``"mean_activation"``, ``"wanda"``,
            ``"hsic"``, or the name of your own in the context's `criteria`. Those that look at data take the context's
            `calibration`.
        scope: ``"group"`` ranks the units of each group, ``"global"`` all together, ``"isomorphic"`` those of groups
            of the same make together.
        aggregation: how the tensors of a unit make one score: ``"mean"``, ``"max"`` or ``"product"``.
        normalize: what the scores of each tensor are divided by: ``"mean"``, ``"max"`` or ``"none"``.
        round_to: the channels that stay in a group are a multiple of it, where the group has as many.
        min_units: units of each group that stay, at least.
        overrides: glob on group or parameter names -> ratio of those groups.
        steps: rounds in which the units leave; importance is measured anew in each.
        kinds: what may leave (see `ChannelGroup`). Of the factors of one axis (heads x features) the first alone is
            removed, unless the others are named here or in `overrides`.
        free_outputs: globs on the names of outputs that may get narrower (``"encoder_last_hidden_state"``, which comes
            beside the logits); every other output keeps its shape.

    Math:
        y(x; W with the indices removed) = y(x; W with them zero, statistics over the indices that stay).

    Source:
        Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Fang et al. 2023, "DepGraph" (groups), equation 6;
        sources of each importance are in `functional.importance`.

    Proof:
        The pruned graph equals the graph before with the removed weights zero and norms over what stays, in float64
        within 1e-9.

    Example:
        >>> from torchopt_passes.graph.capture import capture
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = PruneChannels(ratio=0.5)(capture(model, (torch.ones(3, 4),)))
        >>> result.graph_module.get_parameter("0.weight").shape, result.report.proof.status
        (torch.Size([4, 4]), 'proven')
    """

    claim = "outputs equal the model before with what was removed masked"

    ratio: float | None = None
    macs: float | int | None = None
    params: float | int | None = None
    keep: dict[str, tuple[int, ...]] | None = None
    importance: str = "l2"
    scope: Scope = "group"
    aggregation: Literal["mean", "max", "product"] = "mean"
    normalize: Literal["none", "mean", "max"] = "mean"
    round_to: int = 1
    min_units: int = 1
    overrides: dict[str, float] = field(default_factory=dict[str, float])
    steps: int = 1
    kinds: tuple[Literal["channels", "heads", "head_dim", "blocks", "block_slices"], ...] = (
        "channels",
        "heads",
        "blocks",
    )
    free_outputs: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse options that contradict each other or are out of range."""
        given = {n: getattr(self, n) for n in ("ratio", "macs", "params", "keep") if getattr(self, n) is not None}
        if len(given) != 1:
            raise ConfigError(f"PruneChannels takes exactly one of ratio=, macs=, params=, keep=, not {list(given)}")
        for name, ratio in {"ratio": self.ratio or 0.0, **self.overrides}.items():
            if not 0.0 <= ratio < 1.0:
                raise ConfigError(f"PruneChannels: the ratio of {name!r} must be in [0, 1), not {ratio}")
        for name in ("macs", "params"):
            budget = given.get(name, 1)
            if budget <= 0 or (isinstance(budget, float) and budget >= 1.0):
                raise ConfigError(f"PruneChannels: {name} is a share in (0, 1) or a number > 0, not {budget}")
        for name in ("round_to", "min_units", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PruneChannels: {name} must be at least 1, not {getattr(self, name)}")
        if self.keep is not None and (self.overrides or self.steps > 1):
            raise ConfigError("PruneChannels: keep= says it all; it takes no overrides= and no steps=")
        if self.importance.partition(":")[0] in CRITERIA:
            parse_importance(self.importance)

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the units; see the class."""
        context = context or PassContext()
        grouping = group_axes(analyse_axes(graph_module, self.free_outputs))
        skips: list[Skip] = []
        if self.keep is not None:
            found, why = _removal(grouping, _to_keep(grouping, self.keep)), "not among the units to keep"
        elif self.steps == 1:
            chosen, why = self._choose(graph_module, grouping, context, skips, 1.0, {})
            found = _removal(grouping, chosen)
        else:
            found, why = self._rounds(graph_module, context, skips)
        edits = _edits(grouping, found, why)
        if not edits:
            return Plan((), (*skips, Skip(target="model", reason="nothing to remove")))
        more, untried = source_edits(graph_module, grouping, edits, context)
        return Plan((*edits, *more), (*skips, *untried))

    def expect(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        inputs: Inputs,
        *,
        dtype: torch.dtype | None,
        record: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run the module before, with what leaves masked."""
        axes = analyse_axes(graph_module)
        return evaluate_masked(axes, removed_atoms(axes, removal_of(plan)), inputs, dtype=dtype, record=record)

    def _rounds(self, graph_module: fx.GraphModule, context: PassContext, skips: list[Skip]) -> tuple[Found, str]:
        """Choose in rounds, on a copy that shrinks; return what leaves in indices of the graph as it is."""
        work = copy.deepcopy(graph_module)
        left: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        gone: dict[str, int] = {}
        why = ""
        for number in range(1, self.steps + 1):
            grouping = group_axes(analyse_axes(work, self.free_outputs))
            skips.clear()
            chosen, why = self._choose(work, grouping, context, skips, number / self.steps, gone)
            for name, mask in chosen.items():
                gone[name] = gone.get(name, 0) + int(mask.sum())
            found = _removal(grouping, chosen)
            for (fqn, dim), indices in found.items():
                before = left.get((fqn, dim), np.arange(len(grouping.axes.tensors[fqn][dim])))
                left[fqn, dim] = np.delete(before, indices)
            remove_indices(work, found, grouping.axes)
            work.recompile()
        sizes = {key: get_tensor(graph_module, key[0]).shape[key[1]] for key in left}
        return {k: tuple(int(i) for i in np.setdiff1d(np.arange(sizes[k]), v)) for k, v in left.items()}, why

    def _choose(
        self,
        graph_module: fx.GraphModule,
        grouping: Grouping,
        context: PassContext,
        skips: list[Skip],
        share: float,
        gone: Mapping[str, int],
    ) -> tuple[Chosen, str]:
        """Choose units of a graph; `share` of the way is to be done, `gone` units have left already."""
        groups = self._open_groups(grouping, context, skips)
        if not groups:
            return {}, "nothing may leave"
        scores = self._scores(graph_module, groups, context)
        for name, reason in scores.fallbacks.items():
            skips.append(Skip(target=name, reason=f"{self.importance} finds nothing: {reason}; ranked by l2"))
        candidates = [self._candidate(group, scores, share, gone.get(group.name, 0)) for group in groups]
        why = f"lowest {self.importance} of its {'group' if self.scope == 'group' else self.scope + ' ranking'}"
        if self.ratio is not None:
            return choose_by_ratio(candidates, self.ratio * share, self.scope), f"{why}, ratio {self.ratio:g}"
        what, target = ("macs", self.macs) if self.macs is not None else ("params", self.params or 0)
        model = CostModel(grouping, what)
        budget = int(target * model.full) if isinstance(target, float) else int(target)
        if model.full <= budget:
            skips.append(Skip(target="model", reason=f"nothing to do: {what} are {model.full:,} of {budget:,} allowed"))
            return {}, why
        stage = budget + round((model.full - budget) * (1.0 - share))
        return choose_by_budget(candidates, stage, self.scope, model.cost, what), f"{why}, {what} <= {budget:,}"

    def _open_groups(self, grouping: Grouping, context: PassContext, skips: list[Skip]) -> list[ChannelGroup]:
        unused = set(self.overrides)
        found: list[ChannelGroup] = []
        for group in grouping.groups:
            pattern = self._override(group)
            unused.discard(pattern or "")
            skipped = next((p for axis in group.axes if (p := context.skipped_by(axis.fqn))), None)
            if group.locked is not None:
                skips.append(Skip(target=group.name, reason=group.locked))
            elif skipped is not None:
                skips.append(Skip(target=group.name, reason=f"skip pattern {skipped!r}"))
            elif pattern is None and group.kind not in self.kinds:
                first = group.constraints.product_with
                reason = f"{first} is removed instead" if first else f"{group.kind} are not in kinds"
                skips.append(Skip(target=group.name, reason=reason))
            else:
                found.append(group)
        if unused:
            names = [group.name for group in grouping.groups]
            raise ConfigError(f"overrides {sorted(unused)} match no group; the groups are {names}")
        return found

    def _override(self, group: ChannelGroup) -> str | None:
        name = group.name.partition(":")[0]
        return matching_pattern(group.name, self.overrides) or matching_pattern(name, self.overrides)

    def _scores(self, graph_module: fx.GraphModule, groups: Sequence[ChannelGroup], context: PassContext) -> Scores:
        own = context.criteria.get(self.importance)
        if own is None and self.importance.partition(":")[0] not in CRITERIA:
            known = [*CRITERIA, *context.criteria]
            raise ConfigError(f"there is no importance {self.importance!r}: it is one of {known} (context.criteria)")
        return score_groups(
            graph_module,
            groups,
            own or self.importance,
            context,
            aggregation=self.aggregation,
            normalize=self.normalize,
        )

    def _candidate(self, group: ChannelGroup, scores: Scores, share: float, gone: int) -> Candidate:
        pattern = self._override(group)
        return Candidate(
            name=group.name,
            scores=scores.values[group.name].numpy(),
            ratio=self.overrides[pattern] * share if pattern is not None else None,
            gone=gone,
            min_units=max(self.min_units, group.constraints.min_units),
            round_to=self.round_to if group.kind == "channels" else 1,
            shape=(group.kind, group.size, tuple((axis.dim, len(axis.unit_of)) for axis in group.axes)),
        )


def removal_of(plan: Plan) -> Found:
    """Return what a plan removes: (fqn, dimension) -> indices."""
    return {(e.target, e.dim): e.indices for e in plan.edits if isinstance(e, RemoveIndices)}


def _to_keep(grouping: Grouping, keep: Mapping[str, tuple[int, ...]]) -> Chosen:
    groups = {group.name: group for group in grouping.groups}
    chosen: Chosen = {}
    for name, units in keep.items():
        if name not in groups:
            raise ConfigError(f"keep: there is no group {name!r}; the groups are {list(groups)}")
        group = groups[name]
        if group.locked is not None:
            raise ConfigError(f"keep: {name} cannot lose units: {group.locked}")
        if not units or min(units) < 0 or max(units) >= group.size:
            raise ConfigError(f"keep: the units of {name} are 0..{group.size - 1}, and one must stay: not {units}")
        chosen[name] = ~np.isin(np.arange(group.size), units)
    return chosen


def _removal(grouping: Grouping, chosen: Chosen) -> Found:
    axes = grouping.axes
    removed = np.zeros(len(axes.labels), bool)
    for name, mask in chosen.items():
        removed[grouping.atoms[name][mask]] = True
    found: Found = {}
    for fqn, labels in axes.tensors.items():
        for dim, ids in enumerate(labels):
            gone = np.flatnonzero(~axes.kept(ids, removed))
            if len(gone):
                found[fqn, dim] = tuple(int(i) for i in gone)
    return found


def _edits(grouping: Grouping, found: Found, why: str) -> tuple[RemoveIndices, ...]:
    of: dict[tuple[str, int], list[str]] = {}
    for group in grouping.groups:
        for axis in group.axes if group.locked is None else ():
            if (axis.unit_of[list(found.get((axis.fqn, axis.dim), ()))] >= 0).any():
                of.setdefault((axis.fqn, axis.dim), []).append(group.name)
    sizes = {(fqn, dim): len(ids) for fqn, labels in grouping.axes.tensors.items() for dim, ids in enumerate(labels)}
    return tuple(
        RemoveIndices(
            target=fqn,
            dim=dim,
            indices=indices,
            size=sizes[fqn, dim],
            reason=f"{why} ({', '.join(of[fqn, dim])})",
            numbers={"removed": float(len(indices)), "ratio": len(indices) / sizes[fqn, dim]},
        )
        for (fqn, dim), indices in found.items()
    )
