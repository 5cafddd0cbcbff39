"""Layers, and runs of a prepared graph in which one layer alone is rounded: what the bits of each do by themselves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchopt_passes._compat import flat_inputs
from torchopt_passes.functional.affine import along
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.operations import Operation
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode

__all__ = ["Layer", "LayerRunner", "RoundedWeight", "group_layers", "quantizer_behind"]

Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
"""What is shown the result of a layer's operation: its name, the exact result, the result with the layer rounded."""


Watch = Callable[[str, int, torch.Tensor, FakeQuantizer], None]
"""What is shown the input of a layer: its name, the input's position, its exact value, what rounds it."""


@dataclass(frozen=True)
class Layer:
    """What gets its bits as one: the operations that read one weight, or one product of two activations.

    Args:
        name: the weight's fqn, or the node of the product; globs of `InsertFakeQuant` match it.
        nodes: its operations, by node name; several where a weight is tied or its module is called twice.
        has_weight: False for a product of two activations.
        why_float: why it stays float; empty when it can be rounded.
    """

    name: str
    nodes: tuple[str, ...]
    has_weight: bool
    why_float: str = ""


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as it lies on its grid: multiplied by the scale of its batch norm when that is folded in.

    Args:
        exact: before rounding.
        rounded: after.
        quantizer: what rounds it.
    """

    exact: torch.Tensor
    rounded: torch.Tensor
    quantizer: FakeQuantizer


def group_layers(operations: Iterable[Operation]) -> tuple[Layer, ...]:
    """Return the layers of an annotation's operations, in the order of the graph.

    Operations of one weight that are judged apart (a head skipped by its node, say) are a layer each way.
    """
    nodes: dict[tuple[str, bool, str], list[str]] = {}
    for operation in operations:
        weight = operation.weight
        name = operation.node.name if weight is None else weight.fqn
        nodes.setdefault((name, weight is not None, operation.why_float), []).append(operation.node.name)
    return tuple(Layer(name, tuple(found), weight, why) for (name, weight, why), found in nodes.items())


def quantizer_behind(graph_module: fx.GraphModule, value: object) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the fake-quantizer that an operand comes from, and the moves between the two, the operand's own last.

    Args:
        graph_module: a prepared graph.
        value: an argument of a matrix operation.

    Returns:
        None when nothing rounds it. Rounding moves up through operations with one input; none computes.
    """
    moves: list[fx.Node] = []
    while isinstance(value, fx.Node):
        if value.op == "call_module":
            found = isinstance(graph_module.get_submodule(str(value.target)), FakeQuantizer)
            return (value, moves[::-1]) if found else (None, [])
        if value.op != "call_function" or value.target in KINDS or len(value.all_input_nodes) != 1:
            break
        moves.append(value)
        value = value.all_input_nodes[0]
    return None, []


class LayerRunner(fx.Interpreter):
    """Run a prepared graph unrounded but for the layers in `rounded`, whatever its switches say.

    A layer's rounding is that of its weight and of its inputs, for itself alone: another reader of the same input gets
    it unrounded. Sums and outputs that a target rounds besides belong to no layer and stay exact.

    Args:
        prepared: a graph with calibrated fake-quantizers; use it inside `measuring`.
        layers: its layers.
    """

    def __init__(self, prepared: fx.GraphModule, layers: Iterable[Layer]) -> None:
        self._of_eval_mode = in_one_mode(prepared.graph, training=False)
        super().__init__(prepared, graph=self._of_eval_mode)
        self.prepared = prepared
        self.rounded: set[str] = set()
        """Names of the layers that are rounded."""
        self.visit: Visit | None = None
        """When given, is shown every layer's result, exact and rounded; what is computed behind it stays exact."""
        self.watch: Watch | None = None
        """When given, is shown every rounded input of every layer, exact, with its fake-quantizer."""
        self._layers = {node: layer for layer in layers for node in layer.nodes}
        self._quantizers = dict(fake_quantizers(prepared))

    @contextmanager
    def measuring(self) -> Generator[None]:
        """Run a block in eval mode without gradients; buffers, modes and random state are as before afterwards."""
        with in_eval_mode(self.prepared), buffers_kept(self.prepared):
            yield

    def outputs(self, batch: Any) -> tuple[list[Any], Any]:
        """Return the flat outputs of a batch, and the outputs in the model's own form."""
        flat = self.run(*flat_inputs(self.prepared, *as_call(batch)), enable_io_processing=False)
        return pytree.tree_leaves(flat), self._of_eval_mode.process_outputs(flat)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; one of a rounded layer on its rounded operands."""
        layer = self._layers.get(n.name)
        if layer is None:
            return super().run_node(n)
        if self.watch is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            for position, module, _, _ in self._operands(n):
                if not module.exact:
                    self.watch(layer.name, position, args[position], module)
        if self.visit is None:
            return self._rounded(n) if layer.name in self.rounded else super().run_node(n)
        value = super().run_node(n)
        if not value.requires_grad and torch.is_grad_enabled():
            value = value.detach().requires_grad_()  # in front of it everything is frozen
        with torch.no_grad():
            self.visit(layer.name, value, self._rounded(n))
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Pass through every fake-quantizer: layers round for themselves."""
        return args[0] if target in self._quantizers else super().call_module(target, args, kwargs)

    def quantizers(self, node: str) -> dict[int, FakeQuantizer]:
        """Return what rounds the operands of a layer's operation, by the operand's position."""
        (found,) = [n for n in self._of_eval_mode.nodes if n.name == node]
        return {position: module for position, module, _, _ in self._operands(found)}

    def weight(self, node: str) -> RoundedWeight | None:
        """Return the weight of a layer's operation before and after rounding; None when it is not rounded."""
        (found,) = [n for n in self._of_eval_mode.nodes if n.name == node]
        for _, module, quantizer, _ in self._operands(found):
            if module.exact:
                exact, *norm = [self._static(arg, {}) for arg in quantizer.args]
                rounded = _round(module, exact, *norm)
                if norm:
                    scale = along(module.channel_scale(*norm), exact.ndim, module.weight_dim)
                    exact, rounded = exact * scale, rounded * scale
                return RoundedWeight(exact.detach(), rounded.detach(), module)
        return None

    def _operands(self, n: fx.Node) -> Iterator[tuple[int, FakeQuantizer, fx.Node, list[fx.Node]]]:
        """Yield each rounded operand: its position, what rounds it, the node of that, the moves behind it."""
        operands = KINDS[n.target]
        for position in (operands.activation, operands.weight):
            quantizer, moves = quantizer_behind(self.prepared, n.args[position])
            if quantizer is not None:
                yield position, self._quantizers[str(quantizer.target)], quantizer, moves

    def _rounded(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        changed = list(args)
        for position, module, quantizer, moves in self._operands(n):
            if module.exact:
                changed[position] = self._weight(quantizer, moves, module)
            else:  # one scale: rounding before a move is rounding behind it
                changed[position] = _round(module, args[position])
        return n.target(*changed, **kwargs)  # pyright: ignore[reportCallIssue]

    def _weight(self, quantizer: fx.Node, moves: list[fx.Node], module: FakeQuantizer) -> torch.Tensor:
        values: dict[fx.Node, Any] = {}
        values[quantizer] = _round(module, *(self._static(arg, values) for arg in quantizer.args))
        for move in moves:
            self._static(move, values)
        return values[moves[-1] if moves else quantizer]

    def _static(self, value: Any, values: dict[fx.Node, Any]) -> Any:
        """Compute what depends on parameters alone: the environment of the run has forgotten it by now."""
        if not isinstance(value, fx.Node):
            return value
        if value not in values:
            if value.op == "get_attr":
                values[value] = self.fetch_attr(str(value.target))
            else:
                args, kwargs = fx.map_arg((value.args, value.kwargs), lambda node: self._static(node, values))  # pyright: ignore
                values[value] = value.target(*args, **kwargs)  # pyright: ignore
        return values[value]


def _round(module: FakeQuantizer, *args: Any) -> torch.Tensor:
    was = module.enabled
    module.enable(True)
    try:
        return module(*args)
    finally:
        module.enable(was)
