"""How far an int8 model moves by itself: no runtime can be closer to it than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import copy_graph
from torchopt_passes.deploy.calls import run_source
from torchopt_passes.deploy.layers import dequantized
from torchopt_passes.graph.tensors import get_tensor
from torchopt_passes.graph.verify import Inputs, relative_error

__all__ = ["relative_norm", "rounding_noise"]


def relative_norm(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``||a - b|| / ||b||``; integers and other shapes are compared by `relative_error`."""
    if actual.shape != expected.shape or not expected.is_floating_point():
        return relative_error(actual, expected)
    noise = float((actual.double() - expected.double()).norm())
    return noise / max(float(expected.double().norm()), 1e-30) if noise == noise else float("inf")


def rounding_noise(
    source: nn.Module, calls: Sequence[Inputs], names: Sequence[str], *, int32_biases: bool = False
) -> float:
    """Return how far an int8 model moves when its float parameters move by 2^-23, the rounding of float32.

    A value near the border of two steps then falls to the other side, the step is passed on, and layer after layer adds
    to it.

    Args:
        source: the int8 graph; left as it was.
        calls: of the source.
        names: of the outputs that count.
        int32_biases: biases of int8 layers move too, to the nearest integer times the steps of input and weight, b =
            s_x s_w round(b / (s_x s_w)): what runtimes store that add them to integer products.

    Returns:
        ``||a - b|| / ||b||``, the largest over outputs and calls.

    Source:
        The grid of biases: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", equation 11.
    """
    twin = copy_graph(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
                tensor.mul_(1 + torch.finfo(torch.float32).eps * signs)
        if int32_biases and isinstance(twin, fx.GraphModule):
            _round_biases(twin)
    pairs = [(run_source(twin, call), run_source(source, call)) for call in calls]
    return max(relative_norm(moved[name], still[name]) for moved, still in pairs for name in names)


def _round_biases(graph_module: fx.GraphModule) -> None:
    # here, since opening an artefact must not load the quantization family
    from torchopt_passes.graph.quantization.targets import KINDS

    for node in graph_module.graph.nodes:
        layer = KINDS.get(node.target)
        if layer is None or layer.bias is None or len(node.args) <= layer.bias:
            continue
        bias, value, weight = (node.args[place] for place in (layer.bias, layer.activation, layer.weight))
        value, weight = dequantized(value), dequantized(weight)
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and value is not None and weight is not None:
            stored = get_tensor(graph_module, str(bias.target))
            step = _step(graph_module, value) * _step(graph_module, weight)
            stored.copy_(torch.round(stored / step) * step)


def _step(graph_module: fx.GraphModule, dequantize: fx.Node) -> torch.Tensor:
    """Return the step of a dequantize op, one or one for each channel."""
    scale: Any = dequantize.args[1]
    return get_tensor(graph_module, str(scale.target)) if isinstance(scale, fx.Node) else torch.tensor(scale)
