"""Which layers of a graph compute in int8, and which in float."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

__all__ = ["count_layers", "is_quantized"]

_aten = torch.ops.aten
_LAYERS = {
    "conv": {
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv1d.padding,
        _aten.conv3d.default,
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.convolution.default,
    },
    "linear": {_aten.linear.default, _aten.addmm.default, _aten.mm.default},
    "matmul": {_aten.matmul.default, _aten.bmm.default, _aten.scaled_dot_product_attention.default},
}
# what a dequantized tensor may pass on its way into a layer
_MOVES = {
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
}


def is_quantized(graph_module: fx.GraphModule) -> bool:
    """Return whether the graph holds quantize / dequantize ops."""
    return any(_is_dequantize(node) for node in graph_module.graph.nodes)


def count_layers(graph_module: fx.GraphModule) -> dict[str, int]:
    """Count the layers by kind and precision, such as ``{"conv int8": 20, "linear float": 1}``.

    A layer is int8 when both its data and its weight come out of a dequantize op.
    """
    counts: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        for kind, ops in _LAYERS.items():
            if node.target in ops:
                first = 1 if node.target is _aten.addmm.default else 0
                int8 = all(_from_dequantize(arg) for arg in node.args[first : first + 2])
                counts[f"{kind} {'int8' if int8 else 'float'}"] += 1
    return dict(sorted(counts.items()))


def _from_dequantize(value: object) -> bool:
    while isinstance(value, fx.Node) and value.target in _MOVES:
        value = value.args[0]
    return isinstance(value, fx.Node) and _is_dequantize(value)


def _is_dequantize(node: fx.Node) -> bool:
    return node.op == "call_function" and "quantized_decomposed.dequantize" in str(node.target)
