"""Zeros around an image become the SAME padding of the convolution that reads them, in LiteRT files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["fuse_pads"]


def fuse_pads(model: Any) -> int:
    """Move the zeros of ``PAD`` into convolutions where ``SAME`` pads as much, in place; returns how many.

    TensorFlow pads at the end more than at the start, and LiteRT knows no other padding but this one and none: networks
    that come from there pad apart in torch. The converter brings the two together in float files only, and the
    transposes with which it wraps the pad of an int8 image go too. With input size n, stride s and a kernel that spans
    k: ``SAME`` pads p = max((ceil(n / s) - 1) s + k - n, 0), floor(p / 2) of them in front.

    Args:
        model: an unpacked flatbuffer (``ModelT``), of which the first subgraph is taken.

    Source:
        LiteRT schema, ``Padding``; ComputePaddingHeightWidth in the kernels of TensorFlow Lite.
    """
    return sum(_fuse(model, operator) for operator in list(model.subgraphs[0].operators))


def _fuse(model: Any, conv: Any) -> bool:
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    names, graph = schema.BuiltinOperator, model.subgraphs[0]
    if _kind(model, conv) not in (names.CONV_2D, names.DEPTHWISE_CONV_2D):
        return False
    if conv.builtinOptions.padding != schema.Padding.VALID:
        return False
    between = list(_above(model, conv, {names.PAD, names.TRANSPOSE}))
    turns = [operator for operator in between if _kind(model, operator) == names.TRANSPOSE]
    values = [_numbers(model, operator.inputs[1]) for operator in between]
    if len(turns) == len(between) or any(numbers is None for numbers in values):
        return False
    source, order = between[0].inputs[0], [0, 1, 2, 3]
    zeros = np.zeros((4, 2), np.int64)
    for operator, numbers in zip(between, values, strict=True):
        if operator in turns:
            order = [order[place] for place in numbers]
        else:
            zeros[order] += numbers.reshape(4, 2)
    sizes = np.asarray(graph.tensors[source].shape)[order]
    if zeros[order].tolist() != _same(sizes, graph.tensors[conv.inputs[1]].shape, conv.builtinOptions):
        return False
    if order == [0, 1, 2, 3]:
        turns, conv.inputs[0] = [], source
    elif len(turns) == 1:
        turned = graph.tensors[turns[0].outputs[0]]
        turns[0].inputs[0], turned.shape = source, sizes.tolist()
        conv.inputs[0] = turns[0].outputs[0]
    else:
        return False
    conv.builtinOptions.padding = schema.Padding.SAME
    graph.operators = [one for one in graph.operators if one not in between or one in turns]
    return True


def _above(model: Any, conv: Any, kinds: set[int]) -> Iterable[Any]:
    """Return the operations of some kinds right in front of a convolution, which nothing else reads, in order."""
    graph = model.subgraphs[0]
    found: list[Any] = []
    tensor = conv.inputs[0]
    while tensor not in graph.outputs and len(_users(graph, tensor)) == 1:
        maker = next((one for one in graph.operators if tensor in one.outputs), None)
        if maker is None or _kind(model, maker) not in kinds:
            break
        found.insert(0, maker)
        tensor = maker.inputs[0]
    return found


def _users(graph: Any, tensor: int) -> list[Any]:
    return [one for one in graph.operators if one.inputs is not None and tensor in one.inputs]


def _kind(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def _numbers(model: Any, place: int) -> Any:
    """Return the whole numbers that a constant holds; None for what is computed."""
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    tensor = model.subgraphs[0].tensors[place]
    data = model.buffers[tensor.buffer].data
    dtype = np.int64 if tensor.type == schema.TensorType.INT64 else np.int32
    return None if data is None else np.frombuffer(bytes(data), dtype)


def _same(sizes: Any, kernel: Any, options: Any) -> list[list[int]]:
    """Return what SAME pads in front of and behind each dim of an NHWC image."""
    pads = [[0, 0]]
    strides, dilations = (options.strideH, options.strideW), (options.dilationHFactor, options.dilationWFactor)
    for size, length, stride, dilation in zip(sizes[1:3], kernel[1:3], strides, dilations, strict=True):
        whole = max((-(-int(size) // stride) - 1) * stride + (int(length) - 1) * dilation + 1 - int(size), 0)
        pads.append([whole // 2, whole - whole // 2])
    return [*pads, [0, 0]]
