"""GraphState: whether a captured graph is still the one that something was found out about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.graph.tensors import aliases, named_tensors

__all__ = ["GraphState"]


@dataclass(frozen=True, eq=False)
class GraphState:
    """What an analysis of a captured graph depends on: nodes, shapes, constant indices, example inputs.

    Args:
        nodes: every node, with its target and arguments.
        tensors: fqn of each parameter and buffer -> its first fqn (of a tied one), shape and dtype.
        constants: fqn -> values of the integer ones, which operations may take as indices.
        inputs: the example inputs.
    """

    nodes: list[tuple[fx.Node, Any, Any, Any]]
    tensors: dict[str, tuple[str, torch.Size, torch.dtype]]
    constants: dict[str, torch.Tensor]
    inputs: Any

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> GraphState:
        """Return the state of a captured graph as it is now."""
        first = aliases(graph_module)
        named = dict(named_tensors(graph_module))
        return cls(
            [(node, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes],
            {fqn: (own, named[own].shape, named[own].dtype) for fqn, own in first.items()},
            {n: t.clone() for n, t in named.items() if t.ndim and not t.is_floating_point() and not t.is_meta},
            graph_module.meta["example_inputs"],
        )

    def same(self, other: GraphState) -> bool:
        """Return whether an analysis of the other is one of this."""
        return (
            self.inputs is other.inputs
            and self.tensors == other.tensors
            and self.nodes == other.nodes
            and all(torch.equal(value, other.constants[name]) for name, value in self.constants.items())
        )
