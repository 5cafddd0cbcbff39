"""Operations that look elements up by index, and those that order an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from torchopt_passes.graph.axes import AxisLabels, Call, Rule
from torchopt_passes.graph.labels import Ids
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["INDEXING"]


def _embedding(call: Call) -> AxisLabels:
    table, indices = call.labels("weight"), call.labels("indices")
    if table is None or indices is None:
        raise ValueError("an embedding needs a table and indices")
    call.lock(table[0], "rows are looked up by data")
    return (*indices, table[1])


def _embedding_bag(call: Call) -> Any:
    table = call.labels("weight")
    if table is None:
        raise ValueError("an embedding needs a table")
    call.lock(table[0], "rows are looked up by data")
    sizes = call.axes.sizes[call.node]
    others = [tuple(np.zeros(int(n), np.int64) for n in out.shape) for out in sizes[1:]]
    return [(np.zeros(int(sizes[0].shape[0]), np.int64), table[1]), *others]


def _index(call: Call) -> AxisLabels:
    """``x[:, i, j]``: the indexed axes give way to those of the indices."""
    x: fx.Node = call.arg("self")
    labels = call.of(x)
    places = [p for p, index in enumerate(call.arg("indices")) if index is not None]
    indices = [index for index in call.arg("indices") if index is not None]
    if any(not _is_integer(call, index) for index in indices):
        raise ValueError("a mask chooses by data")
    if len(places) == 1 and (order := _chosen(call, indices[0], labels[places[0]])) is not None:
        return tuple(ids[order] if axis == places[0] else ids for axis, ids in enumerate(labels))
    for place in places:
        call.lock(labels[place], "looks up indices of the axis")
    rank = max(len(call.shape(index)) for index in indices)
    together = places == list(range(places[0], places[-1] + 1))
    start = places[0] if together else 0
    looked_up = call.align([call.of(index) for index in indices], call.out_shape[start : start + rank])
    rest = [ids for axis, ids in enumerate(labels) if axis not in places]
    return (*rest[:start], *looked_up, *rest[start:])


def _is_integer(call: Call, index: fx.Node) -> bool:
    dtype = call.axes.sizes[index].dtype
    return not dtype.is_floating_point and str(dtype) != "torch.bool"


def _chosen(call: Call, index: fx.Node, ids: Ids) -> Ids | None:
    """Return the indices of a lookup that is the same in every run and takes no index twice (a permutation, say)."""
    if index.op != "get_attr" or not ids.any():
        return None
    order = get_tensor(call.axes.graph_module, str(index.target))
    if order.is_meta or order.ndim != 1 or len(order.unique()) != len(order):
        return None
    call.axes.lookups[call.node] = ids
    return order.cpu().numpy().astype(np.int64)


def _index_select(call: Call) -> AxisLabels:
    labels = call.of(call.arg("self"))
    dim = int(call.number("dim")) % len(labels)
    if (order := _chosen(call, call.arg("index"), labels[dim])) is not None:
        return tuple(ids[order] if axis == dim else ids for axis, ids in enumerate(labels))
    call.lock(labels[dim], "looks up indices of the axis")
    return tuple(np.zeros(call.out_shape[dim], np.int64) if a == dim else ids for a, ids in enumerate(labels))


def _gather(call: Call) -> AxisLabels:
    labels, index = call.of(call.arg("self")), call.of(call.arg("index"))
    dim = int(call.number("dim")) % len(labels)
    call.lock(labels[dim], "looks up indices of the axis")
    for axis, (mine, theirs) in enumerate(zip(labels, index, strict=True)):
        if axis != dim and len(mine) == len(theirs):
            call.unify(mine, theirs)
        elif axis != dim:
            call.lock((mine, theirs), "takes a part of the axis")
    return index


def _ordered(call: Call) -> Any:
    """The order along the axis depends on all of it."""
    labels = call.of(call.tensors[0])
    dim = int(call.number("dim") if call.number("dim") is not None else -1)
    if labels:
        call.lock(labels[dim], "depends on the order of the whole axis")
    sizes = call.axes.sizes[call.node]
    outputs = sizes if isinstance(sizes, list | tuple) else [sizes]
    made = [
        tuple(
            np.zeros(int(n), np.int64) if axis == dim % max(len(labels), 1) else ids
            for axis, (ids, n) in enumerate(zip(labels, out.shape, strict=True))
        )
        for out in outputs
    ]
    return made if isinstance(sizes, list | tuple) else made[0]


def _triangle(call: Call) -> AxisLabels:
    labels = call.of(call.tensors[0])
    call.lock(labels[-2:], "depends on the place in the matrix")
    return labels


INDEXING: dict[str, Rule] = {
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "_embedding_bag": _embedding_bag,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "sort", "topk", "argsort", "logcumsumexp"), _ordered),
    **dict.fromkeys(("tril", "triu"), _triangle),
}
