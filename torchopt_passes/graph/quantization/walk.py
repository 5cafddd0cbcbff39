"""A walk through a graph with all calibration batches at once: stop at a layer, change its weight, walk on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.quantization.fake_quantizer import is_fake_quant
from torchopt_passes.graph.tensors import aliases
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode

__all__ = ["Walk", "walking"]


class Walk:
    """Every batch's values at one place of a graph. A layer costs one step, not another run from the start.

    Values live as long as something ahead reads them: memory is what one layer's activations need, times the number
    of batches. Parameters and what is computed from them alone are read anew each time, so a weight that is set
    changes everything ahead. Use it inside `walking`.

    Args:
        graph_module: a captured graph; nothing of it is changed.
        batches: inputs of its calls, by placeholder.
        rounding: whether fake-quantizers round.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: list[list[Any]], *, rounding: bool = True) -> None:
        self._module, self._rounding = graph_module, rounding
        self._first = aliases(graph_module)
        self._set: dict[str, torch.Tensor] = {}
        self.graph = in_one_mode(graph_module.graph, training=False)
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}
        self._by_name = {node.name: node for node in self.graph.nodes}
        self._static = _static_nodes(graph_module, self.graph)
        self._last = {n: max((self.position[u] for u in n.users), default=-1) for n in self.nodes}
        self._at = 0
        places = [node for node in self.nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [dict(zip(places, batch, strict=True)) for batch in batches]

    def set(self, fqn: str, value: torch.Tensor) -> None:
        """Let a parameter have another value from here on."""
        self._set[fqn] = value

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """Return the value of a node that reads a parameter or buffer."""
        name = str(node.target)
        value = self._set.get(self._first.get(name, name))
        if value is not None:
            return value
        owner, _, attribute = name.rpartition(".")
        return getattr(self._module.get_submodule(owner), attribute)

    @torch.no_grad()
    def advance(self, to: fx.Node) -> None:
        """Run every batch up to a node, which is not run."""
        stop = self.position[to]
        for index in range(len(self.values)):
            for node in self.nodes[self._at : stop]:
                self._step(node, self.values[index], {})
                self._forget(node, self.values[index])
        self._at = max(self._at, stop)

    def twin(self, node: fx.Node) -> fx.Node:
        """Return this walk's node for that of another walk through the same graph."""
        return self._by_name[node.name]

    def finish(self, batch: int, instead: Mapping[fx.Node, torch.Tensor]) -> Any:
        """Run a batch from here to the end, on a copy of its values, and return the graph's first output.

        Args:
            batch: its number.
            instead: values that stand in for those of nodes before here.
        """
        values = dict(self.values[batch]) | dict(instead)
        for node in self.nodes[self._at :]:
            self._step(node, values, {})
        output: Any = self.graph.output_node().args[0]
        first = output[0] if isinstance(output, list | tuple) else output
        return self.load(first, values, {}) if isinstance(first, fx.Node) else first

    def input(self, batch: int, node: fx.Node, argument: int) -> Any:
        """Return the value of an argument of a node for a batch; the walk stands at the node."""
        value = node.args[argument]
        return self.load(value, self.values[batch], {}) if isinstance(value, fx.Node) else value

    def run(
        self, batch: int, first: fx.Node, last: fx.Node, instead: Mapping[fx.Node, torch.Tensor]
    ) -> dict[fx.Node, Any]:
        """Run a stretch of nodes for a batch, on a copy of its values, with gradients; the walk stays where it is.

        Args:
            batch: its number.
            first: the node at which the walk stands.
            last: the last node that is run.
            instead: values of static nodes (rounded weights) that stand in for their own.
        """
        values = dict(self.values[batch])
        for node in self.nodes[self.position[first] : self.position[last] + 1]:
            self._step(node, values, instead)
        return values

    def load(self, node: fx.Node, values: Mapping[fx.Node, Any], instead: Mapping[fx.Node, torch.Tensor]) -> Any:
        """Return a node's value: of the batch, what stands in for it, or computed from parameters."""
        if node in instead:
            return instead[node]
        if node not in self._static:
            return values[node]
        return self._compute(node, values, instead)

    def is_static(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters alone."""
        return node in self._static

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], instead: Mapping[fx.Node, torch.Tensor]) -> None:
        if node.op != "placeholder" and node not in self._static:
            values[node] = self._compute(node, values, instead)

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any], instead: Mapping[fx.Node, torch.Tensor]) -> Any:
        if node.op == "get_attr":
            return self.parameter(node)
        args = map_arg(node.args, lambda n: self.load(n, values, instead))
        kwargs = map_arg(node.kwargs, lambda n: self.load(n, values, instead))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        if not self._rounding and is_fake_quant(self._module, node):
            return args[0]  # pyright: ignore[reportIndexIssue]
        return self._module.get_submodule(str(node.target))(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _forget(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        here = self.position[node]
        for parent in node.all_input_nodes:
            if self._last[parent] == here:
                values.pop(parent, None)
        if self._last[node] < here:
            values.pop(node, None)


@contextmanager
def walking(
    graph_module: fx.GraphModule, calibration: Iterable[Any] | None, name: str, max_batches: int | None = None
) -> Generator[list[list[Any]]]:
    """Run a block with the graph in eval mode, everything as before afterwards; gives the batches of a `Walk`.

    Args:
        graph_module: a captured graph.
        calibration: the context's; at most `max_batches` of it are taken.
        name: of the pass, for its errors.
        max_batches: at most so many batches.

    Raises:
        ConfigError: there is no batch.
    """
    if calibration is None:
        raise ConfigError(f"{name} needs data: PassContext(calibration=[batch, ...])")
    batches = [flat_inputs(graph_module, *as_call(batch)) for batch in islice(calibration, max_batches)]
    if not batches:
        raise ConfigError(f"{name} got no batch: context.calibration is empty (a generator that was used up?)")
    with in_eval_mode(graph_module), buffers_kept(graph_module):
        yield batches


def _static_nodes(graph_module: fx.GraphModule, graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        random = schema is not None and torch.Tag.nondeterministic_seeded in node.target.tags  # pyright: ignore
        computed = (node.op == "call_function" and not mutable and not random) or is_fake_quant(graph_module, node)
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (computed and inputs and all(parent in found for parent in inputs)):
            found.add(node)
    # what is written in place is no longer what its parameters say
    written = {n.args[0] for n in graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)}
    return {node for node in found if node.op == "get_attr" or node not in written}
