"""Scaled dot-product attention in ONNX as runtimes fuse it: two products around a softmax, and a mask that is added."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["attention_translation"]

_FAR = -1e30  # stands for minus infinity: e to it is 0, and no difference of two such numbers is NaN
_FAR_HALF = -3e4  # for float16


def attention_translation() -> dict[Any, Any]:
    """Return what ``torch.onnx`` writes for attention, for ``custom_translation_table``.

    softmax(q kᵀ s + m) v, and 0 for a query whose keys are all masked, as torch has it. The exporter's own translation
    looks for NaN among all probabilities for that; the far smaller mask tells it too, and OpenVINO computes what then
    is left between the two products in one kernel.

    Source:
        ``torch.nn.functional.scaled_dot_product_attention``, its documentation.
    """
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    del dropout_p  # files are for inference
    if enable_gqa:
        key, value = _repeat(op, key, query), _repeat(op, value, query)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rank = len(query.shape)
    swapped = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _number(op, factor, query)), swapped)
    if is_causal:  # every query has a key: the first
        scores = op.Add(scores, _causal(op, query, key))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    found = op.MatMul(op.Softmax(op.Add(scores, _bias(op, attn_mask, query)), axis=-1), value)
    return op.Mul(found, _answered(op, attn_mask, query))


def _bias(op: Any, mask: Any, query: Any) -> Any:
    """Return what is added to the scores: a mask of truth values as numbers, one of numbers without infinities."""
    from onnx_ir import DataType

    if mask.dtype == DataType.BOOL:
        return op.Where(mask, _number(op, 0.0, query), _far(op, query))
    return op.Max(mask, _far(op, query))


def _answered(op: Any, mask: Any, query: Any) -> Any:
    """Return 1 for queries that have a key, 0 for others."""
    from onnx_ir import DataType

    last = op.Constant(value_ints=[-1])
    if mask.dtype == DataType.BOOL:
        return op.ReduceMax(op.CastLike(mask, query), last)
    lowest = op.CastLike(op.Constant(value_float=torch.finfo(torch.float32).min), query)
    return op.CastLike(op.GreaterOrEqual(op.ReduceMax(mask, last), lowest), query)


def _causal(op: Any, query: Any, key: Any) -> Any:
    """Return what is added to the scores of keys behind their query, shape [queries, keys]."""
    sizes = [op.Shape(tensor, start=-2, end=-1) for tensor in (query, key)]
    behind = op.Trilu(op.Expand(_number(op, 1.0, query), op.Concat(*sizes, axis=0)), op.Constant(value_int=1))
    return op.Mul(behind, _far(op, query))


def _repeat(op: Any, tensor: Any, query: Any) -> Any:
    """Return keys or values with the heads of the query: each of theirs serves several in a row."""
    heads = op.Constant(value_ints=[query.shape[-3]])
    each = op.Constant(value_ints=[query.shape[-3] // tensor.shape[-3]])
    whole = op.Shape(tensor)
    start, end = (op.Slice(whole, *(op.Constant(value_ints=[n]) for n in limits)) for limits in ((0, -3), (-2, 10)))
    kept = op.Constant(value_ints=[tensor.shape[-3]])
    wide = op.Expand(op.Unsqueeze(tensor, op.Constant(value_ints=[-3])), op.Concat(start, kept, each, end, axis=0))
    return op.Reshape(wide, op.Concat(start, heads, end, axis=0))


def _far(op: Any, like: Any) -> Any:
    from onnx_ir import DataType

    return _number(op, _FAR_HALF if like.dtype == DataType.FLOAT16 else _FAR, like)


def _number(op: Any, number: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value_float=number), like)
