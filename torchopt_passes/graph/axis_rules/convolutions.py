"""Convolutions, plain and transposed, in any number of groups."""

from __future__ import annotations

import math

import numpy as np

from torchopt_passes.graph.axes import AxisLabels, Call, Rule
from torchopt_passes.graph.labels import Ids

__all__ = ["CONVOLUTIONS"]


def _convolution(call: Call) -> AxisLabels:
    """Weight (out, in / groups, kernel): an input channel is (block, place), an output channel too."""
    x, weight, bias, spatial = _parts(call)
    groups = int(call.number("groups") or 1)
    channels = x[-len(spatial) - 1]
    blocks, places = _blocks(call, channels, groups)
    call.unify(places, weight[1])
    if groups > 1:
        out_blocks, _ = _blocks(call, weight[0], groups)
        call.unify(blocks, out_blocks)
        call.axes.groups[call.node] = blocks
    return _result(call, x, weight, bias, spatial, weight[0], weight[1])


def _transposed(call: Call) -> AxisLabels:
    """Weight (in, out / groups, kernel): an output channel is (block, place)."""
    x, weight, bias, spatial = _parts(call)
    groups = int(call.number("groups") or 1)
    channels = x[-len(spatial) - 1]
    call.unify(channels, weight[0])
    out = weight[1]
    if groups > 1:
        blocks, _ = _blocks(call, channels, groups)
        call.axes.groups[call.node] = blocks
        out = call.table.compose([np.repeat(blocks, len(weight[1])), np.tile(weight[1], groups)])
    return _result(call, x, weight, bias, spatial, out, weight[0], transposed=True)


def _either(call: Call) -> AxisLabels:
    return _transposed(call) if call.arg("transposed") else _convolution(call)


def _parts(call: Call) -> tuple[AxisLabels, AxisLabels, AxisLabels | None, AxisLabels]:
    x, weight = call.of(call.tensors[0]), call.labels("weight")
    if weight is None:
        raise ValueError("a convolution needs a weight")
    spatial = x[-(len(weight) - 2) :]
    call.lock(spatial, "windows over places")
    for ids in weight[2:]:
        call.table.lock(ids, "")  # a kernel is no channel: there is nothing to report
    return x, weight, call.labels("bias"), spatial


def _blocks(call: Call, channels: Ids, groups: int) -> tuple[Ids, Ids]:
    if groups == 1:
        return np.zeros(1, np.int64), channels
    blocks, places = call.split(channels, groups, len(channels) // groups)
    return blocks, places


def _result(
    call: Call,
    x: AxisLabels,
    weight: AxisLabels,
    bias: AxisLabels | None,
    spatial: AxisLabels,
    out: Ids,
    summed: Ids,
    *,
    transposed: bool = False,
) -> AxisLabels:
    if bias is not None:
        call.unify(out, bias[0])
    places = call.out_shape[-len(spatial) :]
    fixed = tuple(np.zeros(n, np.int64) for n in places)
    kernel = math.prod(len(ids) for ids in weight[2:])
    batch = x[: -len(spatial) - 1]
    over = tuple(np.zeros(len(ids), np.int64) for ids in spatial) if transposed else fixed
    call.count([*batch, *over, weight[1] if transposed else out, summed], kernel)
    return (*batch, out, *fixed)


CONVOLUTIONS: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "convolution": _either,
    "_convolution": _either,
}
