"""Train and eval mode of a captured graph: one graph, whose mode-dependent arguments are switched.

A node whose arguments depend on the mode says so itself, in ``node.meta["mode_args"]``: a dict from the argument (its
position, or its name when it is given by keyword) to the pair (value in train mode, value in eval mode). What depends
on the mode by structure (stochastic depth, say) meets in a `select` node, whose last argument is such a value; nodes
that one mode alone runs say so in ``node.meta["only_mode"]``. Node metadata is copied with the graph, so switching
survives deepcopy and every rewrite that keeps its nodes' metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from torchopt_passes._compat import copy_graph, set_output_spec, split_spec

__all__ = ["FROZEN", "MODE_ARGS", "ONLY", "follow_mode", "in_one_mode", "select", "set_mode"]

MODE_ARGS = "mode_args"
"""The key of a node's mode-dependent arguments."""

ONLY = "only_mode"
"""The key that tells that one mode alone, ``"train"`` or ``"eval"``, runs a node.

On the output node it tells that the two modes return different structures: the graph returns the pair of both.
"""

FROZEN = "bn_frozen"
"""The key that keeps a node in eval mode always: a batch norm with frozen statistics."""


@fx.wrap
def select(train_value: Any, eval_value: Any, training: bool) -> Any:
    """Return the value of the current mode.

    Example:
        >>> select("dropped", "kept", False)
        'kept'
    """
    return train_value if training else eval_value


def follow_mode(node: fx.Node, argument: int | str, train_value: Any, eval_value: Any) -> None:
    """Make an argument of a node depend on the mode, from the next `set_mode` on.

    Args:
        node: the node.
        argument: position or keyword of the argument.
        train_value: its value in train mode.
        eval_value: its value in eval mode.
    """
    node.meta[MODE_ARGS] = node.meta.get(MODE_ARGS, {}) | {argument: (train_value, eval_value)}


def set_mode(graph: fx.Graph, training: bool | Callable[[fx.Node], bool]) -> bool:
    """Switch every mode-dependent argument of a graph; nodes marked `FROZEN` stay in eval mode.

    Args:
        graph: the graph of a captured module; the caller recompiles its module when it changed.
        training: True for train mode, or a function that tells it for each node.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in graph.nodes:
        if MODE_ARGS not in node.meta:
            continue
        wanted = training(node) if callable(training) else training
        mode = wanted and not node.meta.get(FROZEN, False)
        for argument, (train_value, eval_value) in node.meta.get(MODE_ARGS, {}).items():
            changed |= _set(node, argument, train_value if mode else eval_value)
    return changed


def in_one_mode(graph: fx.Graph, training: bool) -> fx.Graph:
    """Return what a graph runs in one mode: a copy without `select` nodes and without what the other mode alone runs.

    Args:
        graph: the graph of a captured module; it is left as it is.
        training: True for train mode.

    Returns:
        The graph itself when both modes run all of it; its mode-dependent arguments are those of `set_mode`.
    """
    marked = [node for node in graph.nodes if ONLY in node.meta or node.target is select]
    if not marked:
        return graph
    graph = copy_graph(graph)
    chosen = "train" if training else "eval"
    for node in [n for n in graph.nodes if n.target is select]:
        node.replace_all_uses_with(node.args[0 if training else 1])
        graph.erase_node(node)
    output = graph.output_node()
    if ONLY in output.meta:
        train_spec, eval_spec = split_spec(graph)
        values: Any = output.args[0]
        count = train_spec.num_leaves
        output.args = (tuple(values[:count] if training else values[count:]),)
        set_output_spec(graph, train_spec if training else eval_spec)
    for node in _of_the_other_mode(graph, chosen):
        if not node.users:
            graph.erase_node(node)
    return graph


def _of_the_other_mode(graph: fx.Graph, chosen: str) -> list[fx.Node]:
    """Return what the other mode alone runs, last first: marked nodes, and what passes have put behind them."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        marked = node.meta.get(ONLY, chosen) != chosen
        if node.op.startswith("call_") and (marked or any(one in found for one in node.all_input_nodes)):
            found[node] = None
    return [*reversed(found)]


def _set(node: fx.Node, argument: int | str, value: Any) -> bool:
    if isinstance(argument, str):
        if node.kwargs.get(argument) == value and argument in node.kwargs:
            return False
        node.kwargs = {**node.kwargs, argument: value}
        return True
    if node.args[argument] == value:
        return False
    args = list(node.args)
    args[argument] = value
    node.args = tuple(args)
    return True
