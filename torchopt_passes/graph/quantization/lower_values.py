"""Lowering of grids that are fitted to each value: plain operations in float, between rows that share a scale.

An activation gets its scale from the operations in front of it, a weight from what is stored beside it. Integers go
through the quantize and dequantize operations of `lowering.py`, one row a channel; narrow floats are casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torchopt_passes._compat import decomposed_ops
from torchopt_passes.functional.affine import SMALLEST_SCALE, quantize
from torchopt_passes.functional.float_casts import FLOATS
from torchopt_passes.functional.granularity import to_rows
from torchopt_passes.graph.quantization.value_quantizer import SCALED_FORMATS, ValueQuantizer
from torchopt_passes.graph.verify import IN_FLOAT32

__all__ = ["lower_fitted_activation", "lower_fitted_weight"]

aten = torch.ops.aten
Store = Callable[[str, torch.Tensor], fx.Node]
"""Makes the node of a new tensor, from its name and value."""


def lower_fitted_activation(node: fx.Node, quantizer: ValueQuantizer) -> fx.Node:
    """Return the node that computes what a fake-quantizer's node does; it is inserted in front of that.

    Args:
        node: the call of the fake-quantizer.
        quantizer: the fake-quantizer.
    """
    emit = _Emitter(node)
    value = node.args[0]
    rows = emit.rows(value, quantizer, node.meta["val"])
    rounded = _rounded(emit, rows, quantizer)
    return rounded if rows is value else emit(aten.view_as.default, rounded, value)


def lower_fitted_weight(
    node: fx.Node,
    name: str,
    weight: torch.Tensor,
    dim: int,
    quantizer: ValueQuantizer,
    store: Store,
    *,
    fold_weights: bool,
) -> fx.Node:
    """Return the node that computes a weight from what is stored; see `lower_fitted_activation`.

    Args:
        node: the call of the fake-quantizer.
        name: fqn of the weight.
        weight: as it is rounded, its batch norm folded in.
        dim: its output dimension.
        quantizer: the fake-quantizer.
        store: for the tensors.
        fold_weights: store integers or narrow floats; else floats that the graph rounds.
    """
    emit = _Emitter(node)
    first = weight.detach().movedim(dim, 0)  # rows follow each other in memory
    if fold_weights:
        rows = to_rows(weight.detach(), quantizer.granularity, dim=dim, group_size=quantizer.group_size)
        scale, zero = quantizer.row_grid(rows)
        stored = _stored(rows, scale, zero, quantizer).reshape(first.shape).contiguous()
        held = store(name, stored)
        extra = [] if scale is None else [store(f"{name}_scale", scale)]
        extra += [store(f"{name}_zero_point", zero.to(torch.int64))] if zero is not None else []
        wide = emit(aten.reshape.default, held, list(rows.shape))
        value = _restored(emit, wide, extra, quantizer)
    else:
        held = store(name, first.clone())
        rows = emit.rows(held, quantizer, first)
        value = _rounded(emit, rows, quantizer)
    value = emit(aten.reshape.default, value, list(first.shape))
    value = value if dim == 0 else emit(aten.movedim.int, value, 0, dim)
    value.meta["val"] = weight
    return value


class _Emitter:
    """Makes nodes in front of another; each computes in float32, as the fake-quantizer did."""

    def __init__(self, before: fx.Node) -> None:
        self._before = before
        self._meta = {key: before.meta[key] for key in ("stack_trace", "nn_module_stack") if key in before.meta}
        self._meta[IN_FLOAT32] = True

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self._before.graph.inserting_before(self._before):
            node = self._before.graph.call_function(target, args)
        node.meta = dict(self._meta)
        return node

    def rows(self, value: Any, quantizer: ValueQuantizer, like: torch.Tensor) -> fx.Node:
        """Lay a value, whose output channels come first, out in rows that share a scale."""
        if quantizer.format not in ("int", *SCALED_FORMATS):
            return value
        if quantizer.granularity == "token" and like.ndim > 1:
            return value if like.ndim == 2 else self(aten.flatten.using_ints, value, 0, like.ndim - 2)
        if quantizer.granularity == "channel":
            return self(aten.reshape.default, value, [like.shape[0], -1])
        size = quantizer.group_size if quantizer.granularity == "group" else -1
        return self(aten.reshape.default, value, [-1, size] if size > 0 else [1, -1])


def _rounded(emit: _Emitter, rows: fx.Node, quantizer: ValueQuantizer) -> fx.Node:
    """Round rows on the grid that is fitted to them: the formulas of `affine_qparams` and `float_cast`."""
    if quantizer.format not in ("int", *SCALED_FORMATS):
        return _cast(emit, rows, quantizer.format)
    low, high = emit(aten.amin.default, rows, [1]), emit(aten.amax.default, rows, [1])
    if quantizer.format != "int":
        largest = emit(aten.maximum.default, emit(aten.abs.default, low), emit(aten.abs.default, high))
        size = torch.finfo(FLOATS[quantizer.format]).max
        scale = emit(aten.clamp_min.default, emit(aten.div.Tensor, largest, size), torch.finfo(torch.float32).tiny)
        # a row of zeros has the scale 1: what it is divided by does not matter
        scale = emit(aten.unsqueeze.default, scale, 1)
        return emit(aten.mul.Tensor, _cast(emit, emit(aten.div.Tensor, rows, scale), quantizer.format), scale)
    least, most, dtype = quantizer.quant_min, quantizer.quant_max, quantizer.dtype
    low, high = emit(aten.clamp_max.default, low, 0.0), emit(aten.clamp_min.default, high, 0.0)
    if quantizer.signed:
        size = emit(aten.maximum.default, emit(aten.neg.default, low), high)
        scale = emit(aten.clamp_min.default, emit(aten.div.Tensor, size, (most - least) / 2), SMALLEST_SCALE)
        zero = emit(aten.zeros_like.default, scale)
    else:
        size = emit(aten.sub.Tensor, high, low)
        scale = emit(aten.clamp_min.default, emit(aten.div.Tensor, size, most - least), SMALLEST_SCALE)
        steps = emit(aten.round.default, emit(aten.div.Tensor, low, scale))
        zero = emit(aten.clamp.default, emit(aten.rsub.Scalar, steps, least), least, most)
    grid = (scale, emit(aten.to.dtype, zero, torch.int64), 0, least, most, dtype)
    integers = emit(decomposed_ops().quantize_per_channel.default, rows, *grid)
    return emit(decomposed_ops().dequantize_per_channel.default, integers, *grid)


def _cast(emit: _Emitter, value: fx.Node, format: str) -> fx.Node:
    largest = torch.finfo(FLOATS[format]).max
    narrow = emit(aten.to.dtype, emit(aten.clamp.default, value, -largest, largest), FLOATS[format])
    return emit(aten.to.dtype, narrow, torch.float32)


def _stored(
    rows: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, quantizer: ValueQuantizer
) -> torch.Tensor:
    """Return the integers or narrow floats of rows."""
    if scale is not None and zero is not None:
        return quantize(rows.float(), scale, zero, quantizer.quant_min, quantizer.quant_max, 0).to(quantizer.dtype)
    dtype = FLOATS[quantizer.format]
    largest = torch.finfo(dtype).max
    scaled = rows.float() if scale is None else rows.float() / scale[:, None]
    return scaled.clamp(-largest, largest).to(dtype)


def _restored(emit: _Emitter, rows: fx.Node, extra: list[fx.Node], quantizer: ValueQuantizer) -> fx.Node:
    """Return the values of what is stored in rows."""
    if quantizer.format == "int":
        grid = (*extra, 0, quantizer.quant_min, quantizer.quant_max, quantizer.dtype)
        return emit(decomposed_ops().dequantize_per_channel.default, rows, *grid)
    wide = emit(aten.to.dtype, rows, torch.float32)
    return wide if not extra else emit(aten.mul.Tensor, wide, emit(aten.unsqueeze.default, extra[0], 1))
