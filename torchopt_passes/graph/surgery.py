"""Removal in a captured graph: smaller tensors, and the sizes that stand in the graph made to fit."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.axes import Axes, AxisLabels, Mask, analyse_axes, base_name, forget_axes, live_nodes
from torchopt_passes.graph.labels import Ids
from torchopt_passes.graph.state import free_name
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor
from torchopt_passes.graph.values import fill_values

__all__ = ["Removal", "remove_indices", "removed_atoms"]

aten = torch.ops.aten
Removal = Mapping[tuple[str, int], Sequence[int]]
"""What leaves: (fqn of a parameter or buffer, dimension) -> indices."""


def remove_indices(
    graph_module: fx.GraphModule, removal: Removal, axes: Axes | None = None
) -> dict[nn.Parameter, nn.Parameter]:
    """Physically remove indices of parameters and buffers from a captured graph, in place.

    Parameters that shrink are new objects, so that the module the graph was captured from stays as it is; their
    gradients are cut alike.

    Args:
        graph_module: a captured graph.
        removal: everything that leaves, of every tensor.
        axes: the analysis of the graph, where it was made already.

    Returns:
        The parameters that were replaced -> their smaller successors.

    Raises:
        PlanError: the removal is not closed: it takes an index away without what belongs to it, or takes one that
            must stay; names it and the reason.
    """
    axes = axes or analyse_axes(graph_module)
    removed = removed_atoms(axes, removal)
    replaced = _cut_tensors(graph_module, axes, removed)
    live = set(live_nodes(graph_module.graph))
    for node in reversed(list(graph_module.graph.nodes)):
        if node not in live and not node.users:
            graph_module.graph.erase_node(node)
    for node in list(graph_module.graph.nodes):
        fit = _FIT.get(base_name(node)) if node.op == "call_function" else None
        if fit is not None and axes.values.get(node) is not None:
            fit(_Fitting(axes, node, removed))
    fill_values(graph_module)
    forget_axes(graph_module)
    return replaced


def removed_atoms(axes: Axes, removal: Removal) -> Mask:
    """Return which atoms leave (bool by label), given the indices that do; see `remove_indices`."""
    first = aliases(axes.graph_module)
    wanted: dict[tuple[str, int], Mask] = {}
    for (fqn, dim), indices in removal.items():
        name = first.get(fqn, fqn)
        if name not in axes.tensors or dim >= len(axes.tensors[name]):
            raise PlanError(f"the graph does not compute with dimension {dim} of {fqn!r}")
        mask = wanted.setdefault((name, dim), np.zeros(len(axes.tensors[name][dim]), bool))
        mask[list(indices)] = True
    removed = np.zeros(len(axes.labels), bool)
    for (fqn, dim), mask in wanted.items():
        removed[axes.labels.factors(axes.tensors[fqn][dim][mask])] = True
    removed[0] = False
    for fqn, labels in axes.tensors.items():  # an atom leaves when all of its indices do
        for dim, ids in enumerate(labels):
            if ids.any():
                stays = ~wanted[fqn, dim] if (fqn, dim) in wanted else np.ones(len(ids), bool)
                removed[axes.labels.factors(ids[stays])] = False
    for (fqn, dim), mask in wanted.items():
        missing = np.flatnonzero(mask & axes.kept(axes.tensors[fqn][dim], removed))
        if len(missing):
            raise PlanError(_why_not(axes, fqn, dim, int(missing[0]), wanted))
    return removed


def _why_not(axes: Axes, fqn: str, dim: int, index: int, wanted: Mapping[tuple[str, int], Mask]) -> str:
    ids = axes.tensors[fqn][dim][index : index + 1]
    free = axes.labels.factors(ids)
    start = f"index {index} of dimension {dim} of {fqn!r} cannot leave: "
    if not free.any():
        locked = axes.labels.factors(ids, with_locked=True).ravel()
        return start + str(axes.labels.reason(int(locked[0])))
    for other, labels in axes.tensors.items():
        for place, others in enumerate(labels):
            if others.any():
                belongs = np.isin(axes.labels.factors(others), free[free > 0]).any(1)
                mask = wanted.get((other, place), np.zeros(len(others), bool))
                if (belongs & ~mask).any():
                    partner = int(np.flatnonzero(belongs & ~mask)[0])
                    return f"{start}index {partner} of dimension {place} of {other!r} belongs to it and stays"
    return start + "what belongs to it stays"


def _cut_tensors(graph_module: fx.GraphModule, axes: Axes, removed: Mask) -> dict[nn.Parameter, nn.Parameter]:
    names: dict[str, list[str]] = {}
    for name, first in aliases(graph_module).items():
        names.setdefault(first, []).append(name)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for fqn, labels in axes.tensors.items():
        kept = [axes.kept(ids, removed) for ids in labels]
        if all(mask.all() for mask in kept):
            continue
        old = get_tensor(graph_module, fqn)
        new: torch.Tensor = _cut(old.detach(), kept)
        if isinstance(old, nn.Parameter):
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            parameter.grad = None if old.grad is None else _cut(old.grad, kept)
            new = replaced[old] = parameter
        for name in names[fqn]:
            owner, attribute = find_owner(graph_module, name)
            table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
            table[attribute] = new
    return replaced


def _cut(tensor: torch.Tensor, kept: Sequence[Mask]) -> torch.Tensor:
    for dim, mask in enumerate(kept):
        if not mask.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    return tensor


class _Fitting:
    """One operation whose sizes are made to fit what stays."""

    def __init__(self, axes: Axes, node: fx.Node, removed: Mask) -> None:
        self.axes, self.node, self.removed = axes, node, removed
        schema: Any = getattr(node.target, "_schema", None)
        self.places = {argument.name: place for place, argument in enumerate(schema.arguments)} if schema else {}

    def kept(self, ids: Ids) -> Mask:
        """Return which indices of an axis stay."""
        return self.axes.kept(ids, self.removed)

    def input(self) -> AxisLabels:
        """Return the labels of the first tensor argument."""
        source: Any = self.node.args[0]
        return self.axes.values[source]

    def get(self, name: str) -> Any:
        """Return an argument by its name."""
        place = self.places[name]
        return self.node.args[place] if place < len(self.node.args) else self.node.kwargs.get(name)

    def set(self, name: str, value: Any) -> None:
        """Set an argument by its name."""
        place = self.places[name]
        if place < len(self.node.args):
            self.node.update_arg(place, value)
        else:
            self.node.update_kwarg(name, value)

    def size(self, entry: Any, ids: Ids) -> Any:
        """Return a size argument, made to fit the axis that it is the size of."""
        mask = self.kept(ids)
        if mask.all() or entry == -1:
            return entry
        if not isinstance(entry, fx.Node):
            return int(mask.sum())
        share = math.gcd(int(mask.sum()), len(mask))
        with self.node.graph.inserting_before(self.node):
            times = self.node.graph.call_function(operator.mul, (entry, int(mask.sum()) // share))
            return self.node.graph.call_function(operator.floordiv, (times, len(mask) // share))

    def count(self, before: Any, mask: Mask) -> Any:
        """Return where a place on an axis lies once the axis is cut."""
        if mask.all() or not isinstance(before, int):
            return before
        place = min(max(before + len(mask) if before < 0 else before, 0), len(mask))
        return int(mask[:place].sum())


def _output_sizes(*names: str) -> Callable[[_Fitting], None]:
    def fit(f: _Fitting) -> None:
        name = next(name for name in names if name in f.places)
        sizes = f.get(name)
        labels: AxisLabels = f.axes.values[f.node]
        f.set(name, [f.size(entry, ids) for entry, ids in zip(sizes, labels[len(labels) - len(sizes) :], strict=True)])

    return fit


def _unflatten(f: _Fitting) -> None:
    labels: AxisLabels = f.axes.values[f.node]
    sizes = f.get("sizes")
    start = int(f.get("dim")) % len(f.input())
    f.set("sizes", [f.size(entry, ids) for entry, ids in zip(sizes, labels[start:], strict=False)])


def _pieces(f: _Fitting) -> None:
    """``split``, ``chunk``: pieces that lose different numbers need a size each."""
    dim = int(f.get("dim") or 0) % len(f.input())
    if f.kept(f.input()[dim]).all():
        return
    sizes = [int(f.kept(piece[dim]).sum()) for piece in f.axes.values[f.node]]
    f.node.target = aten.split_with_sizes.default
    f.node.args, f.node.kwargs = (f.node.args[0], sizes, dim), {}


def _slice(f: _Fitting) -> None:
    mask = f.kept(f.input()[int(f.get("dim") or 0)])
    strided = int(f.get("step") or 1) != 1  # then whole blocks leave, and a start within the first stays what it is
    for name in () if strided else ("start", "end"):
        if f.get(name) is not None:
            f.set(name, f.count(f.get(name), mask))


def _narrow(f: _Fitting) -> None:
    dim = int(f.get("dim"))
    f.set("start", f.count(f.get("start"), f.kept(f.input()[dim])))
    f.set("length", f.size(f.get("length"), f.axes.values[f.node][dim]))


def _select(f: _Fitting) -> None:
    f.set("index", f.count(f.get("index"), f.kept(f.input()[int(f.get("dim"))])))


def _pad(f: _Fitting) -> None:
    labels: AxisLabels = f.axes.values[f.node]
    pads = list(f.get("pad"))
    for pair in range(len(pads) // 2):
        mask = f.kept(labels[len(labels) - 1 - pair])
        if not mask.all():
            before, after = pads[2 * pair], pads[2 * pair + 1]
            pads[2 * pair] = int(mask[:before].sum()) if before > 0 else before
            pads[2 * pair + 1] = int(mask[len(mask) - after :].sum()) if after > 0 else after
    f.set("pad", pads)


def _groups(name: str) -> Callable[[_Fitting], None]:
    def fit(f: _Fitting) -> None:
        blocks = f.axes.groups.get(f.node)
        if blocks is not None:
            f.set(name, int(f.kept(blocks).sum()))

    return fit


def _lookup(f: _Fitting) -> None:
    """Indices that stand in a buffer are renumbered, in a buffer of this operation's own."""
    ids = f.axes.lookups.get(f.node)
    if ids is None or f.kept(ids).all():
        return
    module, kept = f.axes.graph_module, f.kept(ids)
    index = next(n for n in f.node.all_input_nodes if n.op == "get_attr" and not _floats(f.axes, n))
    order = get_tensor(module, str(index.target))
    stays = torch.from_numpy(kept).to(order.device)
    name = free_name(module, str(index.target))
    owner, attribute = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    renumbered = stays.cumsum(0) - 1
    owner.register_buffer(attribute, renumbered[order[stays[order]]].to(order.dtype), persistent=False)
    with f.node.graph.inserting_before(f.node):
        own = f.node.graph.get_attr(name)
    f.node.replace_input_with(index, own)


def _floats(axes: Axes, node: fx.Node) -> bool:
    return axes.sizes[node].is_floating_point()


def _attention(f: _Fitting) -> None:
    """The default scale is that of the features before: 1 / sqrt(E)."""
    width = f.input()[-1]
    if f.get("scale") is None and not f.kept(width).all():
        f.node.update_kwarg("scale", 1.0 / math.sqrt(len(width)))


def _asserts(f: _Fitting) -> None:
    if f.get("size") is not None:
        f.set("size", None)


_FIT: dict[str, Callable[[_Fitting], None]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "expand", "zeros", "ones", "empty"), _output_sizes("size", "shape")
    ),
    **dict.fromkeys(
        ("full", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty"), _output_sizes("size", "shape")
    ),
    "broadcast_to": _output_sizes("size", "shape"),
    **dict.fromkeys(("layer_norm", "rms_norm"), _output_sizes("normalized_shape")),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _pieces),
    "unsafe_split_with_sizes": _pieces,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _groups("groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups("groups")),
    "group_norm": _groups("num_groups"),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("index", "index_select"), _lookup),
    "_assert_tensor_metadata": _asserts,
}
