"""How far two graphs of one model are apart, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.cost import layer_of
from torchopt_passes.graph.verify import evaluate, sqnr
from torchopt_passes.graph.weights import MATRIX_OPS

__all__ = ["LayerSqnr", "layer_sqnr"]

aten = torch.ops.aten
_COMPARED = frozenset(MATRIX_OPS) | {
    aten.scaled_dot_product_attention.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.embedding.default,
}


@dataclass(frozen=True, kw_only=True)
class LayerSqnr:
    """The signal-to-quantization-noise ratio of one operation's result.

    Args:
        layer: dotted name of the module it came from; ``""`` is the model itself.
        node: its node in the reference graph, or the number of an output.
        kind: the operation, such as ``"conv2d"``; ``"output"`` for what the model returns.
        sqnr: in dB, 10 log10(sum b^2 / sum (a - b)^2) with b the reference; infinite when equal; None when the other
            graph has no such result.
        note: why there is none, or which node stands for it.
    """

    layer: str
    node: str
    kind: str
    sqnr: float | None
    note: str = ""


def layer_sqnr(reference: fx.GraphModule, other: fx.GraphModule, inputs: Any = None) -> tuple[LayerSqnr, ...]:
    """Compare the result of every matrix operation, and the outputs, between two graphs of one model.

    The graphs are matched by node names, which passes keep. Where a batch norm was folded into an operation, the
    reference's value behind the batch norm is compared; where a bias is added apart, the sum is. Both run in eval
    mode, in their own dtypes, each on its own values (errors add up through the layers); neither is changed.

    Args:
        reference: the graph before, such as the float model.
        other: the graph after: fake-quantized, converted to int8, pruned.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``; by
            default those the reference was captured with.

    Returns:
        One row for each operation in the order of the graph, then one for each floating output.

    Raises:
        ConfigError: there are no inputs.
    """
    call = as_call(inputs) if inputs is not None else reference.meta.get("example_inputs")
    if call is None:
        raise ConfigError("layer_sqnr needs inputs: the reference graph has no example inputs")
    before, after = _Values(reference), _Values(other)
    expected = evaluate(reference, call, dtype=None, record=before)
    actual = evaluate(other, call, dtype=None, record=after)
    twins = {node.name: node for node in other.graph.nodes}
    rows = [_row(node, twins, before, after) for node in reference.graph.nodes if node.target in _COMPARED]
    for index, (a, b) in enumerate(zip(actual, expected, strict=False)):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            rows.append(LayerSqnr(layer="", node=str(index), kind="output", sqnr=_sqnr(a, b)))
    return tuple(rows)


class _Values(dict[str, Any]):
    """Takes what nodes compute, and keeps the compared operations and what directly reads them: not all activations."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        compared = [node for node in graph_module.graph.nodes if node.target in _COMPARED]
        self._wanted = {near.name for node in compared for near in (node, *node.users)}

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._wanted:
            super().__setitem__(name, value)


def _row(node: fx.Node, twins: dict[str, fx.Node], before: dict[str, Any], after: dict[str, Any]) -> LayerSqnr:
    kind = str(node.target).removeprefix("aten.").partition(".")[0]
    layer, note = layer_of(node), ""
    twin = twins.get(node.name)
    if twin is None or twin.target is not node.target:
        return LayerSqnr(layer=layer, node=node.name, kind=kind, sqnr=None, note="not in the other graph")
    value = before[node.name]
    norm = _folded_norm(node, twins)
    if norm is not None:
        value, note = before[norm.name], f"behind {norm.name}, which is folded in"
    ratio = _sqnr(after[_with_bias(twin, node).name], value)
    return LayerSqnr(
        layer=layer, node=node.name, kind=kind, sqnr=ratio, note=note if ratio is not None else "its shape differs"
    )


def _with_bias(twin: fx.Node, node: fx.Node) -> fx.Node:
    """Return the addition behind an operation that got its bias taken apart, else the operation itself."""
    reader = next(iter(twin.users), twin)
    apart = len(twin.args) < len(node.args) and len(twin.users) == 1 and reader.target is aten.add.Tensor
    other = reader.args[1] if apart else None
    return reader if isinstance(other, fx.Node) and other.op == "get_attr" else twin


def _folded_norm(node: fx.Node, twins: dict[str, fx.Node]) -> fx.Node | None:
    """Return the batch norm that alone reads a node, when the other graph has it no more."""
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    norm = readers[0] if len(readers) == 1 else None
    return norm if norm is not None and norm.target is aten.batch_norm.default and norm.name not in twins else None


def _sqnr(actual: Any, expected: Any) -> float | None:
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        return None
    return sqnr(actual, expected)
