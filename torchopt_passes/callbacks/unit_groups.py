"""The channel groups of a model under training: a mask over the units of each, and what a masked unit sets to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.graph.align import user_line
from torchopt_passes.graph.axes import Axes, analyse_axes
from torchopt_passes.graph.channels import ChannelGroup, Kind
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.grouping import Grouping, group_axes
from torchopt_passes.graph.pruning.choose import Candidate, choose_by_ratio
from torchopt_passes.graph.tensors import find_owner, get_tensor, matching_pattern

__all__ = ["UnitGroup", "choose_groups", "count_bounds"]


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """A channel group under a mask.

    Args:
        group: the group.
        owner: the module that holds the parameter which names the group; the mask lies beside it.
        slices: what a unit sets to zero: name of a parameter, dimension, unit of each index (the size of the group
            where an index leaves with none).
        ratio: share of its units that leaves, where it has one of its own.
        spanned: whether a norm or a mean is computed over its units, so that removal changes more than masking.
    """

    group: ChannelGroup
    owner: nn.Module
    slices: tuple[tuple[str, int, torch.Tensor], ...]
    ratio: float | None
    spanned: bool
    _on: dict[torch.device, list[torch.Tensor]] = field(
        default_factory=dict[torch.device, list[torch.Tensor]], init=False
    )

    @property
    def fqn(self) -> str:
        """Name of the parameter that names the group."""
        return self.group.name.partition(":")[0]

    @property
    def mask_name(self) -> str:
        """Name of the mask buffer in the owner: the parameter's, dimension and kind: ``"weight_0_mask"``."""
        _, _, place = self.group.name.partition(":")
        return f"{self.fqn.rpartition('.')[2]}_{place.replace(':', '_')}_mask"

    @property
    def mask(self) -> torch.Tensor:
        """The mask: bool, shape (group.size,), True for a unit that is kept."""
        return self.owner.get_buffer(self.mask_name)

    @property
    def claims(self) -> tuple[str, ...]:
        """Names of the parameters that units set slices of to zero."""
        return tuple(dict.fromkeys(fqn for fqn, _, _ in self.slices))

    def zero(self, model: nn.Module, mask: torch.Tensor) -> None:
        """Set every slice of every masked unit to zero, of what makes it and of what reads it; call without gradients.

        Args:
            model: the student, or a copy.
            mask: see `mask`.
        """
        if mask.device not in self._on:
            self._on[mask.device] = [unit.to(mask.device) for _, _, unit in self.slices]
        gone = torch.cat([~mask, mask.new_zeros(1)])
        for (fqn, dim, _), unit in zip(self.slices, self._on[mask.device], strict=True):
            weight = get_tensor(model, fqn)
            weight.masked_fill_(gone[unit].to(weight.device).view(-1, *[1] * (weight.ndim - 1 - dim)), 0)

    def candidate(self, scores: npt.NDArray[np.float64], share: float, *, min_units: int, round_to: int) -> Candidate:
        """Return the group as one that units are chosen from.

        Args:
            scores: importance of its units.
            share: of the way to its ratio.
            min_units: units that stay, at least.
            round_to: the number of channels that stay is a multiple of it.
        """
        return Candidate(
            name=self.group.name,
            scores=scores,
            ratio=None if self.ratio is None else self.ratio * share,
            min_units=max(min_units, self.group.constraints.min_units),
            round_to=round_to if self.group.kind == "channels" else 1,
            shape=(),
        )


def count_bounds(candidates: Sequence[Candidate], ratio: float, scope: Literal["group", "global"]) -> tuple[int, int]:
    """Return how many units leave, at least and at most, whatever their scores are; see `choose_by_ratio`.

    Where groups are ranked together, one may be asked for more than its limits allow.
    """
    counts = {name: int(mask.sum()) for name, mask in choose_by_ratio(candidates, ratio, "group").items()}
    free = [c for c in candidates if c.ratio is None]
    if scope == "group" or not free:
        return sum(counts.values()), sum(counts.values())
    fixed = sum(counts[c.name] for c in candidates if c.ratio is not None)
    due = removed_count(ratio, sum(c.size for c in free))
    short = sum(c.size - int(c.lowest(c.size).sum()) + c.round_to - 1 for c in free)
    return fixed + max(0, due - short), fixed + due


def choose_groups(
    model: nn.Module,
    graph_module: fx.GraphModule,
    *,
    kinds: Sequence[Kind],
    overrides: Mapping[str, float],
    skip: Sequence[str],
) -> tuple[tuple[UnitGroup, ...], tuple[Skip, ...]]:
    """Return the groups whose units may be masked and, with the reason, every group that is left alone.

    Args:
        model: the student.
        graph_module: its graph; the student itself where that is one.
        kinds: of units.
        overrides: globs on group or parameter names -> ratio; they open groups of other kinds, and such as a norm or a
            mean is computed over.
        skip: globs on parameter names; a group that cuts such a parameter is left alone.

    Raises:
        ConfigError: an override matches nothing, or nothing is left to prune.
    """
    grouping = group_axes(analyse_axes(graph_module, free_outputs=()))
    spans = _spans(grouping)
    unused = set(overrides)
    found: list[UnitGroup] = []
    skips: list[Skip] = []
    for group in grouping.groups:
        pattern = _override(group, overrides)
        unused.discard(pattern or "")
        over = spans.get(group.name)
        reason = _reason(model, group, kinds if pattern is None else (group.kind,), skip)
        if reason is None and over is not None and pattern is None:
            reason = (
                f"{over} is computed over all of it, and would not be the same over what stays and over zeros; "
                "overrides={name: ratio} prunes it all the same, at the price of a jump at the end"
            )
        if reason is not None:
            skips.append(Skip(target=group.name, reason=reason))
        else:
            ratio = None if pattern is None else overrides[pattern]
            found.append(_unit_group(model, group, ratio, spanned=over is not None))
    if unused:
        names = [group.name for group in grouping.groups]
        raise ConfigError(f"overrides {sorted(unused)} match no group; the groups are {names}")
    if not found:
        reasons = "; ".join(dict.fromkeys(f"{skip.target}: {skip.reason}" for skip in skips))
        raise ConfigError(f"no channel group of {type(model).__name__} is left to prune: {reasons or 'it has none'}")
    return tuple(found), tuple(skips)


def _override(group: ChannelGroup, overrides: Mapping[str, float]) -> str | None:
    return matching_pattern(group.name, overrides) or matching_pattern(group.name.partition(":")[0], overrides)


def _reason(model: nn.Module, group: ChannelGroup, kinds: Sequence[Kind], skip: Sequence[str]) -> str | None:
    """Return why the units of a group stay, norms aside."""
    if group.locked is not None:
        return group.locked
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis in group.axes:
        pattern = matching_pattern(axis.fqn, skip)
        if pattern is not None:
            return f"skip pattern {pattern!r}"
        if axis.fqn not in tensors:
            return f"its code makes a constant of this size ({axis.fqn}), which only a captured graph can shrink"
        if isinstance(tensors[axis.fqn], nn.Parameter) and not tensors[axis.fqn].requires_grad:
            return f"{axis.fqn} is frozen: requires_grad is False"
    if group.kind not in kinds:
        first = group.constraints.product_with
        return f"{first} is removed instead" if first else f"{group.kind} are not in kinds"
    return None


def _unit_group(model: nn.Module, group: ChannelGroup, ratio: float | None, *, spanned: bool) -> UnitGroup:
    parameters = dict(model.named_parameters())
    slices = [
        (axis.fqn, axis.dim, torch.from_numpy(np.where(axis.unit_of < 0, group.size, axis.unit_of)))
        for axis in group.axes
        if axis.fqn in parameters
    ]
    owner, _ = find_owner(model, group.name.partition(":")[0])
    return UnitGroup(group, owner, tuple(slices), ratio, spanned)


def _spans(grouping: Grouping) -> dict[str, str]:
    """Return the groups over whose units a norm or a mean is computed -> which, in words."""
    axes = grouping.axes
    atoms_of = {node: _spanned(axes, node) for node in axes.statistics}
    found: dict[str, str] = {}
    for name, atoms in grouping.atoms.items():
        node = next((node for node, spanned in atoms_of.items() if np.isin(atoms, spanned).any()), None)
        if node is not None:
            line = user_line(node, own=True)
            found[name] = f"{node.name} ({node.target}){f' at {line}' if line else ''}"
    return found


def _spanned(axes: Axes, node: fx.Node) -> npt.NDArray[np.int64]:
    """Return the atoms that a statistic is computed over; blocks of a group norm have one each."""
    source = next(n for n in node.all_input_nodes if isinstance(axes.values.get(n), tuple))
    atoms = [axes.labels.factors(axes.values[source][dim]).ravel() for dim in axes.statistics[node]]
    blocks = axes.labels.factors(axes.groups[node]).ravel() if node in axes.groups else np.zeros(0, np.int64)
    return np.setdiff1d(np.concatenate(atoms), np.append(blocks, 0))
