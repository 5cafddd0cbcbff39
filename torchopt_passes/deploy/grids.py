"""Graphs in the form a converter wants: limits and signs of grids, rounded weights, computed weights as constants."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from torchopt_passes._compat import decomposed_ops
from torchopt_passes.errors import ExportError
from torchopt_passes.graph.state import erase_unused, free_name, get_state, remove_unused_state, store
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["clip_to_grids", "drop_identities", "fold_static", "make_signed", "unfold_weights"]

_IDENTITIES = {  # of an inference graph
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
}
_HALF = 128  # between the zeros of uint8 and int8


def clip_to_grids(graph_module: fx.GraphModule) -> dict[str, str]:
    """Clip values to their grid where it is narrower than its dtype, in place.

    Runtimes know the limits of dtypes alone: a value beyond the calibrated range of a 4-bit grid is 15 in torch, and
    anything up to 255 there. The clip is in float, in front of the rounding, so nothing else of the graph changes: x is
    clipped to [(q_min - z) s, (q_max - z) s]. A limit of -127 for int8 is left alone, as the runtimes' -128 is one step
    from it and a clip would keep TensorRT from fusing.

    Args:
        graph_module: an inference graph of ours alone.

    Returns:
        Facts for the report: how many values are clipped.

    Raises:
        ExportError: a grid is wider than 8 bits; names it.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if is_pair_op(node) and node.args[-1] is torch.int16:
            raise ExportError(
                f"{_stored(node) or node.name} has a grid above 8 bits, which is there to train and to measure: no "
                "runtime here computes with it; give InsertFakeQuant at most 8 bits for its target"
            )
        if not is_pair_op(node) or ".quantize" not in str(node.target):
            continue
        low, high, dtype = cast("tuple[int, int, torch.dtype]", node.args[-3:])
        limits = torch.iinfo(dtype)
        if low - limits.min > 1 or high < limits.max:
            _clip(graph_module, node, low, high)
            count += 1
    graph_module.recompile()
    return {"clipped to narrow grids": f"{count} values"} if count else {}


def _clip(graph_module: fx.GraphModule, node: fx.Node, low: int, high: int) -> None:
    graph, aten = graph_module.graph, torch.ops.aten
    value, scale, zero_point = cast("tuple[fx.Node, Any, Any]", node.args[:3])
    with graph.inserting_before(node):
        if not isinstance(scale, fx.Node):  # one grid for the whole value
            bounds = [(limit - zero_point) * scale for limit in (low, high)]
            clipped = graph.call_function(aten.clamp.default, (value, *bounds))
        else:
            # a stored weight, or rows that have grids of their own
            rank = get_tensor(graph_module, str(value.target)).ndim if value.op == "get_attr" else 2
            shape = [-1 if dim == node.args[3] else 1 for dim in range(rank)]
            steps = [graph.call_function(aten.rsub.Scalar, (zero_point, limit)) for limit in (low, high)]
            limits = [graph.call_function(aten.mul.Tensor, (step, scale)) for step in steps]
            bounds = [graph.call_function(aten.reshape.default, (limit, shape)) for limit in limits]
            clipped = graph.call_function(aten.clamp.Tensor, (value, *bounds))
    node.args = (clipped, *node.args[1:])


def make_signed(graph_module: fx.GraphModule, runtime: str) -> None:
    """Write uint8 grids as int8 ones, in place: zero point and limits move by 128, the values stay the same.

    Args:
        graph_module: an inference graph of ours alone.
        runtime: what wants it, for the error.

    Raises:
        ExportError: a weight is uint8; names it.
    """
    for node in graph_module.graph.nodes:
        if not is_pair_op(node) or node.args[-1] is not torch.uint8:
            continue
        fqn = _stored(node)
        if fqn or "per_channel" in str(node.target):
            raise ExportError(
                f"{fqn or node.name} is uint8: {runtime} takes int8 weights alone: "
                "quantize with InsertFakeQuant(weight_symmetric=True)"
            )
        value, scale, zero_point, low, high, _ = node.args
        node.args = (value, scale, zero_point - _HALF, low - _HALF, high - _HALF, torch.int8)
    graph_module.recompile()


def unfold_weights(graph_module: fx.GraphModule) -> None:
    """Turn weights stored as integers into floats that the graph rounds, in place; each rounds to the same integer."""
    graph, ops = graph_module.graph, decomposed_ops()
    before = get_state(graph_module)
    done: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        fqn = _stored(node) if is_pair_op(node) else ""
        if not fqn or node.target not in (ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default):
            continue
        integers, grid = node.args[0], node.args[1:]
        if (integers, *grid) not in done:
            values = [get_tensor(graph_module, str(a.target)) if isinstance(a, fx.Node) else a for a in node.args]
            name = free_name(graph_module, f"{fqn.replace('.', '_')}_float")
            store(graph_module, name, node.target(*values), parameter=False)  # pyright: ignore
            kind = "per_channel" if node.target is ops.dequantize_per_channel.default else "per_tensor"
            # behind the integers, the scale and the zero point: all are read here
            with graph.inserting_before(node):
                weight = graph.get_attr(name)
                done[integers, *grid] = graph.call_function(getattr(ops, f"quantize_{kind}").default, (weight, *grid))
        node.replace_input_with(integers, done[integers, *grid])
        erase_unused(integers)
    remove_unused_state(graph_module, before)
    graph_module.recompile()


def drop_identities(graph_module: fx.GraphModule) -> None:
    """Remove what changes no value at inference, in place: it hides rounded values from a converter's patterns."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def fold_static(graph_module: fx.GraphModule) -> None:
    """Store what is computed from parameters alone (clustered or normalized weights) as constants, in place.

    Runtimes lack the operations that unpack indices, and would repeat them in every call. Rounding stays in the graph.
    """
    # here, since opening an artefact must not load the quantization family
    from torchopt_passes.graph.quantization.folding import static_value
    from torchopt_passes.graph.quantization.operations import is_static

    graph, before = graph_module.graph, get_state(graph_module)
    seen: dict[fx.Node, bool] = {node: False for node in graph.nodes if is_pair_op(node)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_static(node, seen) or all(is_static(u, seen) for u in node.users):
            continue
        value = static_value(graph_module, node)
        if not isinstance(value, torch.Tensor):
            continue
        name = free_name(graph_module, f"{node.name}_value")
        store(graph_module, name, value, parameter=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        seen[constant] = True
        erase_unused(node)
    remove_unused_state(graph_module, before)
    graph_module.recompile()


def is_pair_op(node: fx.Node) -> bool:
    """Return whether a node is a quantize or dequantize op of PT2E with its grid written out."""
    return node.op == "call_function" and "quantized_decomposed." in str(node.target) and len(node.args) >= 6


def _stored(node: fx.Node) -> str:
    """Return the fqn of the integers that a dequantize op reads, ``""`` for an activation."""
    value = node.args[0]
    if isinstance(value, fx.Node) and value.op == "get_attr" and "dequantize" in str(node.target):
        return str(value.target)
    return ""
