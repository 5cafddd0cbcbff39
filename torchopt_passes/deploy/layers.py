"""Which layers of a graph compute in int8, and which in float."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from torchopt_passes.deploy.stored_weights import MATMUL_NBITS

__all__ = ["count_layers", "dequantized", "is_quantized"]

_aten = torch.ops.aten
# what a dequantized tensor may pass on its way into a layer
_MOVES = {
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.dropout.default,  # of an inference graph: nothing
    _aten.flatten.using_ints,
}


def is_quantized(graph_module: fx.GraphModule) -> bool:
    """Return whether the graph holds quantize / dequantize ops."""
    return any(_is_dequantize(node) for node in graph_module.graph.nodes)


def count_layers(graph_module: fx.GraphModule) -> dict[str, int]:
    """Count the matrix operations by kind and precision, such as ``{"conv2d int8": 20, "linear float": 1}``.

    One is int8 when both its input and its weight come out of a dequantize op; one that reads a packed weight has
    ``"4-bit weights"`` or ``"8-bit weights"``.
    """
    # here, since opening an artefact must not load the quantization family
    from torchopt_passes.graph.quantization.targets import KINDS

    counts: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        layer = KINDS.get(node.target)
        if node.op == "call_function" and layer is not None:
            int8 = all(dequantized(node.args[place]) for place in (layer.activation, layer.weight))
            counts[f"{layer.kind} {'int8' if int8 else 'float'}"] += 1
        elif str(node.target) == MATMUL_NBITS:
            counts[f"linear {node.args[4]}-bit weights"] += 1
    return dict(sorted(counts.items()))


def dequantized(value: object) -> fx.Node | None:
    """Return the dequantize op that a value comes out of, moved or as it is; None where there is none."""
    while isinstance(value, fx.Node) and value.target in _MOVES:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and _is_dequantize(value) else None


def _is_dequantize(node: fx.Node) -> bool:
    return node.op == "call_function" and "quantized_decomposed.dequantize" in str(node.target)
