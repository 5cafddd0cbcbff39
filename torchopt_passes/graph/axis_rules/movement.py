"""Operations that only move elements: the operation itself is run on the labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchopt_passes.graph.axes import AxisLabels, Call, Rule, base_name
from torchopt_passes.graph.labels import Ids

__all__ = ["MOVEMENT"]


def _moved(call: Call) -> Any:
    """Run the operation on a tensor of the labels of each axis in turn, and read off which axis they vary along."""
    source = call.tensors[0]
    labels, shape = call.of(source), call.shape(source)
    if base_name(call.node) == "slice" and int(call.number("step") or 1) != 1:
        _strided(call, labels[int(call.number("dim"))])
    sizes = call.axes.sizes[call.node]
    outputs = list(sizes) if isinstance(sizes, list | tuple) else [sizes]
    parts: list[list[list[Ids]]] = [[[np.zeros(int(n), np.int64)] for n in out.shape] for out in outputs]
    if base_name(call.node) in _CUTS:
        _pass_empty(parts, labels)
    for axis, ids in enumerate(labels):
        if ids.any():
            view = torch.from_numpy(ids).reshape([-1 if d == axis else 1 for d in range(len(shape))])
            for out, table in zip(parts, _run(call, source, view.expand(shape)), strict=True):
                _spread(call, out, table)
    result = [tuple(call.table.compose(columns) for columns in out) for out in parts]
    for value in result:
        for ids in value:
            if len(ids) == 1:
                call.lock(ids, "takes a single index of the axis")
    result = [tuple(np.zeros(1, np.int64) if len(ids) == 1 else ids for ids in value) for value in result]
    return result if isinstance(sizes, list | tuple) else result[0]


def _pass_empty(parts: list[list[list[Ids]]], labels: AxisLabels) -> None:
    """A piece without elements shows no labels; the axes that are not cut keep theirs."""
    for out in parts:
        if any(columns[0].size == 0 for columns in out):
            for columns, ids in zip(out, labels, strict=True):
                if len(columns[0]) == len(ids):
                    columns.append(ids)


def _as_other(call: Call) -> Any:
    """``reshape_as``: the sizes of another tensor."""
    moved = _moved(call)
    return call.align([moved, call.of(call.tensors[-1])], call.out_shape) if isinstance(moved, tuple) else moved


def _strided(call: Call, ids: Ids) -> None:
    """Every so many index is taken (interleaved rotary): blocks of as many leave, or none of them."""
    step, start, end = (int(call.number(name) or 0) for name in ("step", "start", "end"))
    whole = len(ids) % step == 0 and 0 <= start < step and (call.number("end") is None or end >= len(ids))
    if whole and ids.any():
        call.lock(call.split(ids, len(ids) // step, step)[1], "takes every so many index of the axis")
    else:
        call.lock(ids, "takes every so many index of a part of the axis")


def _run(call: Call, source: fx.Node, table: torch.Tensor) -> list[Ids]:
    """Return what the operation makes of a tensor of labels: a view of it wherever that is possible."""
    target: Any = call.node.target

    def run(labels: torch.Tensor) -> list[Ids]:
        put = {source: labels}
        args, kwargs = map_arg(
            (call.node.args, dict(call.node.kwargs)), lambda node: put.get(node, call.axes.sizes[node])
        )
        if base_name(call.node) in _AS_OTHER:
            return [labels.reshape(call.out_shape).numpy()]
        return [out.numpy() for out in pytree.tree_leaves(target(*args, **kwargs))]

    try:
        return run(table)
    except RuntimeError:  # a view of axes that are expanded, merged with one that is not
        return run(table.contiguous())


def _spread(call: Call, out: list[list[Ids]], table: Ids) -> None:
    """Give a table of labels, shape of an output, to the axes along which it varies."""
    if not table.size:
        return
    table = table[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in table.strides)]
    varying = [axis for axis in range(table.ndim) if (table != table.take([0], axis)).any()]
    if not varying:
        call.lock(table.ravel()[:1], "takes a single index of the axis")
        return
    face = np.ascontiguousarray(table[tuple(slice(None) if axis in varying else 0 for axis in range(table.ndim))])
    pieces = call.table.split(face, call.why("splits an axis whose parts do not match")) if face.ndim > 1 else [face]
    for axis, piece in zip(varying, pieces, strict=True):
        out[axis].append(piece)


def _cat(call: Call) -> AxisLabels:
    tensors = [node for node in call.tensors if call.shape(node) != (0,)]
    repeated = [node for node in call.arg("tensors") if call.shape(node) != (0,)]
    dim = int(call.number("dim") or 0) % len(call.out_shape)
    shape = call.out_shape
    for axis in range(len(shape)):
        if axis != dim:
            for other in tensors[1:]:
                call.unify(call.of(tensors[0])[axis], call.of(other)[axis])
    joined = np.concatenate([call.of(node)[dim] for node in repeated])
    first = call.of(tensors[0])
    return tuple(joined if axis == dim else first[axis] for axis in range(len(shape)))


def _stack(call: Call) -> AxisLabels:
    values = [call.of(node) for node in call.tensors]
    dim = int(call.number("dim") or 0) % len(call.out_shape)
    rest = call.align(values, [size for axis, size in enumerate(call.out_shape) if axis != dim])
    return (*rest[:dim], np.zeros(call.out_shape[dim], np.int64), *rest[dim:])


def _expand(call: Call) -> AxisLabels:
    """An axis that is repeated from size 1 may be repeated any number of times: new atoms."""
    labels = call.of(call.tensors[0])
    result: list[Ids] = []
    for axis, size in enumerate(call.out_shape):
        place = axis - len(call.out_shape)
        own = labels[place] if len(labels) >= -place else np.zeros(1, np.int64)
        result.append(own if len(own) == size else call.table.fresh(size))
    if len(call.tensors) > 1:  # expand_as
        return call.align([tuple(result), call.of(call.tensors[1])], call.out_shape)
    return tuple(result)


def _roll(call: Call) -> AxisLabels:
    labels = call.of(call.tensors[0])
    for dim in call.number("dims") or range(len(labels)):
        call.lock(labels[dim], "rolls the axis by a fixed number")
    return tuple(np.zeros_like(ids) if not ids.any() else ids for ids in labels)


def _pad(call: Call) -> AxisLabels:
    """What is padded with one value may be any size: new atoms beside the old."""
    labels = list(call.of(call.tensors[0]))
    pads = list(call.number("pad"))
    mode = call.arg("mode", "constant")
    for pair in range(len(pads) // 2):
        axis, before, after = len(labels) - 1 - pair, pads[2 * pair], pads[2 * pair + 1]
        ids = labels[axis]
        if mode != "constant" or not ids.any():
            call.lock(ids, "pads the axis by its own values")
            labels[axis] = np.zeros(call.out_shape[axis], np.int64)
            continue
        cut = ids[max(0, -before) : len(ids) - max(0, -after)]
        labels[axis] = np.concatenate([call.table.fresh(max(0, before)), cut, call.table.fresh(max(0, after))])
    return tuple(labels)


def _channel_shuffle(call: Call) -> AxisLabels:
    """The number of groups is part of the operation: every group loses the same places."""
    labels = call.of(call.tensors[0])
    groups = int(call.number("groups"))
    blocks, _ = call.split(labels[1], groups, len(labels[1]) // groups)
    call.lock(blocks, "shuffles a fixed number of groups")
    return (labels[0], np.ascontiguousarray(labels[1].reshape(groups, -1).T).ravel(), *labels[2:])


_CUTS = ("slice", "narrow", "split", "split_with_sizes", "tensor_split")
_AS_OTHER = ("view_as", "reshape_as")
_NAMES = (
    *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis"),
    *("swapaxes", "swapdims", "squeeze", "unsqueeze", "flatten", "unflatten", "select", "slice", "narrow", "split"),
    *("split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_split_with_sizes"),
    *("unsafe_chunk", "repeat", "tile", "repeat_interleave", "flip", "pixel_shuffle", "pixel_unshuffle", "unfold"),
    *("diagonal", "atleast_1d", "atleast_2d", "atleast_3d", "ravel", "adjoint", "matrix_H", "hsplit", "vsplit"),
)

MOVEMENT: dict[str, Rule] = {
    **dict.fromkeys(_NAMES, _moved),
    **dict.fromkeys(_AS_OTHER, _as_other),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    "stack": _stack,
    "roll": _roll,
}
