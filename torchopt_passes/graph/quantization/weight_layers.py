"""The linears and convolutions of a graph as matrices: which parameter, which rows, which columns of its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from torchopt_passes.graph.quantization.fake_quantizer import is_fake_quant
from torchopt_passes.graph.quantization.targets import KINDS, Operands
from torchopt_passes.graph.tensors import aliases
from torchopt_passes.graph.weights import weight_uses

__all__ = ["WeightLayer", "find_layers"]

aten = torch.ops.aten
_SAME = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default}
_WEIGHTS = {operation: (operands.weight,) for operation, operands in KINDS.items()}
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


@dataclass(frozen=True)
class WeightLayer:
    """A matrix operation and the parameter that is its weight.

    Args:
        fqn: the parameter's first name.
        operation: the first operation that uses it.
        operands: where its operands lie.
        quantizer: the fake-quantizer between them, or ''.
        rounding: the node of that fake-quantizer, or None.
        transposed: whether the parameter is stored as (in, out).
        uses: how many operations use it.
        why_not: why its values cannot be rounded by what its inputs are; empty when they can.
    """

    fqn: str
    operation: fx.Node
    operands: Operands
    quantizer: str = ""
    rounding: fx.Node | None = None
    transposed: bool = False
    uses: int = 1
    why_not: str = ""

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.operands.kind.startswith("conv")

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear."""
        return int(_argument(self.operation, 6, 1)) if self.is_convolution else 1

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as matrices, shape [groups, rows, columns]: rows are output channels."""
        rows = weight.T if self.transposed else weight.flatten(1)
        return rows.unflatten(0, (self.groups, -1))

    def weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return matrices as the weight, in the shape and dtype of `like`."""
        rows = matrix.flatten(0, 1)
        return (rows.T if self.transposed else rows).reshape(like.shape).to(like.dtype).contiguous()

    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the matrices are multiplied by, shape [groups, samples, columns] (im2col for convolutions)."""
        if not self.is_convolution:
            return inputs.reshape(1, -1, inputs.shape[-1])
        return _patches(inputs, self.operation, self.groups)


def find_layers(graph_module: fx.GraphModule, graph: fx.Graph | None = None) -> list[WeightLayer]:
    """Return every matrix operation whose weight is a parameter, in order; a weight that is used twice is one.

    Args:
        graph_module: owner of the parameters.
        graph: the graph to look at; by default its own.
    """
    graph, first = graph or graph_module.graph, aliases(graph_module)
    found: dict[str, WeightLayer] = {}
    for fqn, node, position in weight_uses(graph_module, _WEIGHTS, graph):
        behind = _behind(graph_module, node.args[position])
        if behind is None:
            continue
        (start, rounding, flips), operands = behind, KINDS[node.target]
        if fqn in found:
            found[fqn] = replace(found[fqn], uses=found[fqn].uses + 1)
            continue
        transposed = (operands.channel_dim == -1) != (flips % 2 == 1)
        quantizer = str(rounding.target) if rounding is not None else ""
        why_not = _why_not(node, operands, start, first, graph)
        found[fqn] = WeightLayer(fqn, node, operands, quantizer, rounding, transposed, 1, why_not)
    return list(found.values())


def readers(graph: fx.Graph, first: dict[str, str], fqn: str) -> Iterator[fx.Node]:
    """Yield every node that reads a parameter, under any of its names."""
    for node in graph.find_nodes(op="get_attr"):
        if first.get(str(node.target)) == fqn:
            yield from node.users


def _behind(graph_module: fx.GraphModule, node: Any) -> tuple[fx.Node, fx.Node | None, int] | None:
    """Follow a weight back to its parameter: the parameter, the fake-quantizer, the number of transposes between."""
    rounding, flips = None, 0
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if is_fake_quant(graph_module, node):
            rounding = node
        elif node.target in _TRANSPOSES:
            if getattr(node.meta.get("val"), "ndim", 0) != 2:
                return None
            flips += 1
        elif node.target not in _SAME:
            return None
        node = node.args[0]
    return (node, rounding, flips) if isinstance(node, fx.Node) else None


def _why_not(node: fx.Node, operands: Operands, start: fx.Node, first: dict[str, str], graph: fx.Graph) -> str:
    value = start.meta.get("val")
    if operands.kind not in ("linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d"):
        return f"the inputs of {operands.kind} are not laid out as a matrix"
    if not operands.kind.startswith("conv") and getattr(value, "ndim", 0) != 2:
        return f"its weight has {getattr(value, 'ndim', 0)} dimensions"
    kinds = {type_of(reader) for reader in readers(graph, first, first.get(str(start.target), str(start.target)))}
    others = kinds - {"fake-quantizer", "matrix operation"}
    if others:
        return f"tied: it is read by {', '.join(sorted(others))} too, which would change with it"
    if len(kinds) > 1:
        return "it is read both rounded and as it is"
    return ""


def type_of(node: fx.Node) -> str:
    """Return what kind of reader of a parameter a node is."""
    if node.op == "call_module":
        return "fake-quantizer"
    if node.target in KINDS:
        return "matrix operation"
    if node.target in _SAME | _TRANSPOSES:
        kinds = {type_of(user) for user in node.users}
        return kinds.pop() if len(kinds) == 1 else "several operations"
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if position < len(node.args) else default


def _patches(inputs: torch.Tensor, node: fx.Node, groups: int) -> torch.Tensor:
    """Return the patches that a convolution multiplies its kernels by, shape [groups, samples, channels x kernel]."""
    weight: Any = node.args[1]
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    many = len(kernel)
    stride, padding, dilation = (_argument(node, p, d) for p, d in ((3, 1), (4, 0), (5, 1)))
    stride, dilation = _each(stride, many), _each(dilation, many)
    if inputs.ndim == many + 1:
        inputs = inputs.unsqueeze(0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, many)]
    inputs = functional.pad(inputs, [side for pad in reversed(pads) for side in pad])
    for axis in range(many):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # [batch, channels, *places, *kernel] -> [groups, batch * places, channels / groups * kernel]
    batch, channels, *_ = inputs.shape
    flat = inputs.reshape(batch, groups, channels // groups, -1, torch.Size(kernel).numel())
    return flat.permute(1, 0, 3, 2, 4).reshape(groups, -1, channels // groups * torch.Size(kernel).numel())


def _each(value: Any, many: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * many if len(values) == 1 else values
