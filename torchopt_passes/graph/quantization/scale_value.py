"""Scaling a value channel by channel, explicitly: where nothing in front of linears, or behind them, can take it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.axes import base_name
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.state import free_name, store
from torchopt_passes.graph.tensors import aliases
from torchopt_passes.graph.weights import input_dim, matrix_weights

__all__ = ["ScaleValue", "SharedInput", "find_inputs", "plain_linears"]


class ScaleValue(Edit):
    """Let what reads a value, the node that is the target, read it scaled: one number for each channel.

    Args:
        users: names of the nodes that do.
        scale: positive, one for each channel (the last dimension of the value).
        divide: divide by it instead of multiplying.
    """

    on_source = False

    users: tuple[str, ...]
    scale: torch.Tensor
    divide: bool = False

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without those nodes."""
        names = {node.name for node in module.graph.nodes}  # pyright: ignore
        missing = {self.target, *self.users} - names
        if missing:
            raise PlanError(f"the graph has no node {min(missing)!r}")

    def apply(self, module: nn.Module) -> None:
        """Store the scale, and insert the operation in front of its first reader."""
        if not isinstance(module, fx.GraphModule):
            raise PlanError("a scale of a value goes into a captured graph")
        nodes = {node.name: node for node in module.graph.nodes}
        value = nodes[self.target]
        name = free_name(module, f"{self.target}_scale")
        example = value.meta["val"]
        store(module, name, self.scale.to(dtype=example.dtype, device=example.device), parameter=False)
        operation = torch.ops.aten.div.Tensor if self.divide else torch.ops.aten.mul.Tensor
        with module.graph.inserting_before(min((nodes[user] for user in self.users), key=list(nodes.values()).index)):
            scale = module.graph.get_attr(name)
            scaled = module.graph.call_function(operation, (value, scale))
        scale.meta["val"] = module.get_buffer(name)
        scaled.meta = {k: value.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in value.meta}
        for user in self.users:
            nodes[user].replace_input_with(value, scaled)


@dataclass(frozen=True)
class SharedInput:
    """A value and the linears that read it.

    Args:
        value: its node.
        users: the linears.
        weights: fqn of each one's weight, and the dimension of its inputs.
    """

    value: fx.Node
    users: tuple[fx.Node, ...]
    weights: tuple[tuple[str, int], ...]


def find_inputs(graph_module: fx.GraphModule, taken: Iterable[str]) -> list[SharedInput]:
    """Return the inputs of the linears whose weights are used once, grouped by value, in the order of the graph.

    Args:
        graph_module: a captured graph.
        taken: fqns of weights whose inputs are scaled otherwise.
    """
    left_out = set(taken)
    found: dict[fx.Node, list[tuple[fx.Node, str, int]]] = defaultdict(list)
    for node, fqn, dim in plain_linears(graph_module):
        value = node.args[1] if base_name(node) == "addmm" else node.args[0]
        if isinstance(value, fx.Node) and fqn not in left_out:
            found[value].append((node, fqn, dim))
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    return [
        SharedInput(value, tuple(n for n, _, _ in users), tuple((fqn, dim) for _, fqn, dim in users))
        for value, users in sorted(found.items(), key=lambda item: order[item[0]])
    ]


def plain_linears(graph_module: fx.GraphModule) -> list[tuple[fx.Node, str, int]]:
    """Return the linears whose weights nothing else reads: node, fqn of the weight, and the dimension of its inputs."""
    first = aliases(graph_module)
    reads = Counter(first.get(str(n.target)) for n in graph_module.graph.find_nodes(op="get_attr") for _ in n.users)
    found: list[tuple[fx.Node, str, int]] = []
    for fqn, uses in matrix_weights(graph_module).items():
        dim = input_dim(uses[0], fqn)
        if base_name(uses[0]) in ("linear", "addmm") and dim is not None and len(uses) == 1 and reads[fqn] == 1:
            found.append((uses[0], fqn, dim))
    return found
