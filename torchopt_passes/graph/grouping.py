"""From labels to groups: which units a captured model has, and why the others must stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx, nn

from torchopt_passes.graph.axes import Axes, analyse_axes
from torchopt_passes.graph.channels import ChannelGroup, Constraints, GroupAxis, Kind
from torchopt_passes.graph.labels import HEADS, OUTER, Ids
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["Grouping", "find_channel_groups", "group_axes"]


def find_channel_groups(graph_module: fx.GraphModule, free_outputs: Sequence[str] = ()) -> list[ChannelGroup]:
    """Find what can be removed from a captured model, and what cannot, with the reason.

    Every index of every dimension of every parameter is followed through the graph; indices that must leave together
    are a unit, units of the same make are a group.

    Args:
        graph_module: a captured graph; its values do not matter, and it is left as it is.
        free_outputs: globs on the names of outputs that may get narrower, such as ``"encoder_last_hidden_state"``.

    Returns:
        The groups in the order of the parameters, the locked ones included.

    Raises:
        ConfigError: the graph has no example inputs, or holds fake-quantizers.

    Example:
        >>> import torch
        >>> from torchopt_passes.graph.capture import capture
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(g.name, g.size, g.locked) for g in find_channel_groups(capture(model, (torch.ones(3, 4),)))]
        [('0.weight:0', 8, None), ('0.weight:1', 4, 'meets ...'), ('2.weight:0', 2, 'an output of the model (output)')]
    """
    return list(group_axes(analyse_axes(graph_module, free_outputs)).groups)


@dataclass(frozen=True)
class Grouping:
    """The groups of a graph, and the atoms behind their units.

    Args:
        axes: the labels of the graph.
        groups: every group.
        atoms: name of each group that is not locked -> the atom of each unit.
    """

    axes: Axes
    groups: tuple[ChannelGroup, ...]
    atoms: dict[str, Ids]


@dataclass(frozen=True)
class _Axis:
    fqn: str
    dim: int
    parameter: bool
    factors: Ids
    locked: Ids


def group_axes(axes: Axes) -> Grouping:
    """Group the atoms of analysed axes."""
    table, listed = axes.labels, _listed(axes)
    count = len(table)
    signature = np.zeros(count, np.uint64)
    for number, axis in enumerate(listed):
        roots = np.unique(np.concatenate([axis.factors.ravel(), axis.locked]))
        signature[roots] = signature[roots] * np.uint64(1000003) + np.uint64(number + 1)
    free = np.unique(np.concatenate([axis.factors.ravel() for axis in listed] or [np.zeros(1, np.int64)]))
    stuck = np.unique(np.concatenate([axis.locked for axis in listed] or [np.zeros(1, np.int64)]))
    found: list[tuple[Ids, str | None]] = [
        (roots, None if len(roots) > 1 else "the only unit: nothing of the axis would stay")
        for roots in _classes(free[free > 0], signature, table.blocks(free[free > 0]))
    ]
    reasons = np.array([table.reason(int(root)) or "" for root in stuck], dtype=object)
    for reason in dict.fromkeys(reasons[reasons != ""]):
        of_reason = stuck[(reasons == reason) & (stuck > 0)]
        found += [(roots, reason) for roots in _classes(of_reason, signature * 0, table.blocks(of_reason))]
    touched = _touched(listed, [roots for roots, _ in found], count)
    made = [
        entry
        for (roots, locked), near in zip(found, touched, strict=True)
        if (entry := _group(axes, near, roots, locked, count)) is not None
    ]
    partners = _partners(listed, [roots for _, roots, group in made if group.locked is None], count)
    made.sort(key=lambda entry: (entry[0], -_rank(axes, int(entry[1][0]))))
    names: dict[int, str] = {}
    tops: dict[int, int | None] = {}
    kinds: dict[int, Kind] = {}
    for _, roots, group in made:
        first = int(roots[0])
        kinds[first], tops[first] = _kind(axes, first, partners.get(first, []))
        names[first] = _free(group.name if kinds[first] == "channels" else f"{group.name}:{kinds[first]}", names)
    groups = [
        replace(
            group,
            name=names[int(roots[0])],
            kind=kinds[int(roots[0])],
            constraints=Constraints(product_with=names.get(tops[int(roots[0])] or 0)),
        )
        for _, roots, group in made
    ]
    atoms = {names[int(roots[0])]: roots for _, roots, group in made if group.locked is None}
    return Grouping(axes, tuple(groups), atoms)


def _free(name: str, taken: dict[int, str]) -> str:
    number, free = 1, name
    while free in taken.values():
        number += 1
        free = f"{name}:{number}"
    return free


def _listed(axes: Axes) -> list[_Axis]:
    found: list[_Axis] = []
    for fqn, labels in axes.tensors.items():
        parameter = isinstance(get_tensor(axes.graph_module, fqn), nn.Parameter)
        for dim, ids in enumerate(labels):
            if ids.any():
                free = axes.labels.factors(ids)
                locked = axes.labels.factors(ids[~free.any(1)], with_locked=True).ravel()
                found.append(_Axis(fqn, dim, parameter, free, np.unique(locked)))
    return found


def _classes(roots: Ids, signature: np.ndarray[tuple[int], np.dtype[np.uint64]], blocks: Ids) -> Iterator[Ids]:
    """Yield the atoms that cut the same axes and were made together."""
    if len(roots):
        keys = np.stack([signature[roots], blocks.astype(np.uint64)], 1)
        _, inverse = np.unique(keys, axis=0, return_inverse=True)
        for number in range(int(inverse.max()) + 1):
            yield roots[inverse.ravel() == number]


def _touched(listed: list[_Axis], classes: list[Ids], count: int) -> list[list[tuple[int, _Axis]]]:
    """Return, for each class of atoms, the axes that they cut or hold, with their places in the list."""
    class_of = np.zeros(count, np.int64)
    for number, roots in enumerate(classes):
        class_of[roots] = number + 1
    found: list[list[tuple[int, _Axis]]] = [[] for _ in range(len(classes) + 1)]
    for place, axis in enumerate(listed):
        for number in np.unique(class_of[np.concatenate([axis.factors.ravel(), axis.locked])]):
            found[number].append((place, axis))
    return found[1:]


def _group(
    axes: Axes, listed: list[tuple[int, _Axis]], roots: Ids, locked: str | None, count: int
) -> tuple[int, Ids, ChannelGroup] | None:
    """Return place, atoms and a group of atoms; None where no parameter is among its axes."""
    lookup = np.full(count, -1, np.int64)
    lookup[roots] = np.arange(len(roots))
    touched: list[tuple[int, _Axis, Ids]] = []
    for number, axis in listed:
        if locked is None or not lookup[axis.locked].max(initial=-1) >= 0:
            factors = axis.factors
        else:
            factors = axes.labels.factors(axes.tensors[axis.fqn][axis.dim], with_locked=True)
        unit = lookup[factors].max(1)
        if (unit >= 0).any():
            touched.append((number, axis, unit))
    if not any(axis.parameter for _, axis, _ in touched):
        return None
    rank = {fqn: len(labels) for fqn, labels in axes.tensors.items()}
    own = [entry for entry in touched if entry[1].parameter and entry[1].dim == 0 and rank[entry[1].fqn] > 1]
    number, naming, unit = (own or [entry for entry in touched if entry[1].parameter])[0]
    order = unit[unit >= 0]
    order = order[np.sort(np.unique(order, return_index=True)[1])]
    if len(order) == len(roots):  # units in the order of the axis that names the group
        renumber = np.full(len(roots) + 1, -1, np.int64)
        renumber[order] = np.arange(len(roots))
        roots = roots[order]
        touched = [(n, axis, renumber[u]) for n, axis, u in touched]
    group = ChannelGroup(
        name=f"{naming.fqn}:{naming.dim}",
        kind="channels",
        axes=tuple(GroupAxis(axis.fqn, axis.dim, u) for _, axis, u in touched),
        size=len(roots),
        locked=locked,
        constraints=Constraints(),
    )
    return number, roots, group


def _partners(listed: list[_Axis], classes: list[Ids], count: int) -> dict[int, list[int]]:
    """Return the first atom of each group -> the first atoms of the groups that cut the same indices."""
    first = np.zeros(count, np.int64)
    for roots in classes:
        first[roots] = roots[0]
    found: dict[int, set[int]] = {}
    for axis in listed:
        several = axis.factors[(axis.factors > 0).sum(1) > 1]
        for row in np.unique(first[several], axis=0):
            present = {int(root) for root in row if root}
            for root in present:
                found.setdefault(root, set()).update(present - {root})
    return {root: sorted(others) for root, others in found.items()}


def _rank(axes: Axes, root: int) -> int:
    """Return which factor of a product comes first: heads before blocks before the places in them."""
    marks = int(axes.labels.marks(np.array([root]))[0])
    return (2 if marks & HEADS else 0) + (1 if marks & OUTER else 0)


def _kind(axes: Axes, root: int, partners: list[int]) -> tuple[Kind, int | None]:
    """Return what the units are, and the group (its first atom) that comes first where several cut the same axes."""
    mine = _rank(axes, root)
    if not partners:
        return ("heads" if mine >= 2 else "channels"), None
    top = max(partners, key=lambda other: (_rank(axes, other), -other))
    if (mine, -root) > (_rank(axes, top), -top):
        return ("heads" if mine >= 2 else "blocks"), None
    return ("head_dim" if _rank(axes, top) >= 2 > mine else "block_slices"), top
