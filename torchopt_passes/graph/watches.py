"""Watches: functions that see the values of nodes while a captured graph runs; the graph itself does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from torchopt_passes._compat import copy_graph
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.modes import select

__all__ = ["Watch", "input_node", "module_nodes", "output_node", "with_watches"]

Watch = Callable[[torch.Tensor], None]
"""What is called with the value of a node, in each run."""


def with_watches(graph: fx.Graph, running: fx.Graph, training: bool, watches: Mapping[str, Watch]) -> fx.Graph:
    """Return a copy of what a graph runs that shows the values of nodes to functions.

    Args:
        graph: the graph of a captured module.
        running: what it runs in the current mode (`in_one_mode`).
        training: whether that is train mode.
        watches: name of a node -> what its value is given to. One that the mode does not run is not called.
    """
    copied = copy_graph(running)
    full = {node.name: node for node in graph.nodes}
    nodes = {node.name: node for node in copied.nodes}
    for name, watch in watches.items():
        node = full.get(name)
        while node is not None and node.target is select and node.name not in nodes:
            chosen = node.args[0 if training else 1]
            node = chosen if isinstance(chosen, fx.Node) else None
        if node is not None and node.name in nodes:
            with copied.inserting_after(nodes[node.name]):
                copied.call_function(watch, (nodes[node.name],))
    return copied


def module_nodes(graph: fx.Graph, path: str) -> list[fx.Node]:
    """Return the nodes that the forward of a module made, its submodules included, in order."""
    return [node for node in graph.nodes if _is_inside(node, path)]


def output_node(graph: fx.Graph, path: str) -> fx.Node:
    """Return the floating tensor that a module of the source returned.

    Args:
        graph: of a captured module.
        path: of the module, or the name of a node, which is that node.

    Raises:
        CaptureError: no node came from it, it ran several times, or several values leave it.

    Example:
        >>> from torchopt_passes.graph.capture import capture
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> output_node(capture(model, (torch.ones(4, 2),)).graph, "0").name
        'linear'
    """
    inside = set(module_nodes(graph, path))
    _refuse_repeated(inside, path)
    found = [node for node in graph.nodes if node in inside and _is_float(node) and not inside.issuperset(node.users)]
    named = [node for node in graph.nodes if node.name == path]
    return _only(found or named, path, "leave")


def input_node(graph: fx.Graph, path: str) -> fx.Node:
    """Return the floating tensor that a module of the source was given.

    Raises:
        CaptureError: no node came from it, it ran several times, or it was given several values.
    """
    inside = module_nodes(graph, path)
    _refuse_repeated(inside, path)
    given = dict.fromkeys(
        parent
        for node in inside
        for parent in node.all_input_nodes
        if parent not in inside and parent.op != "get_attr" and _is_float(parent)
    )
    return _only(list(given), path, "enter")


def _only(found: list[fx.Node], path: str, verb: str) -> fx.Node:
    if len(found) == 1:
        return found[0]
    if not found:
        raise CaptureError(f"no operation of the captured graph came from {path!r}: it computes nothing there")
    names = [node.name for node in found]
    raise CaptureError(f"{len(found)} values {verb} {path!r} in the captured graph: name one of the nodes {names}")


def _refuse_repeated(nodes: Iterable[fx.Node], path: str) -> None:
    """Refuse a module that ran several times: each time has a key of its own on the stack."""
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
    keys = {key for stack in stacks for key, entry in stack.items() if str(entry[0]) == path}
    if len(keys) > 1:
        raise CaptureError(f"{path!r} ran {len(keys)} times: name a module that ran once, or one of the graph's nodes")


def _is_inside(node: fx.Node, path: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(str(entry[0]) == path for entry in stack.values())


def _is_float(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
