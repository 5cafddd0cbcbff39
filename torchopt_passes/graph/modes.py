"""Train and eval mode of a captured graph: one graph, whose mode-dependent arguments are switched.

A node whose arguments depend on the mode says so itself, in ``node.meta["mode_args"]``: a dict from the argument (its
position, or its name when it is given by keyword) to the pair (value in train mode, value in eval mode). What depends on the
mode by structure (stochastic depth, say) meets in a `select` node, whose last argument is such a value. Node metadata is copied
with the graph, so switching survives deepcopy and every rewrite that keeps its nodes' metadata.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["FROZEN", "MODE_ARGS", "follow_mode", "select", "set_mode"]

MODE_ARGS = "mode_args"
"""The key of a node's mode-dependent arguments."""

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


def set_mode(graph: fx.Graph, training: bool) -> bool:
    """Switch every mode-dependent argument of a graph; nodes marked `FROZEN` stay in eval mode.

    Args:
        graph: the graph of a captured module; the caller recompiles its module when it changed.
        training: True for train mode.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in graph.nodes:
        mode = training and not node.meta.get(FROZEN, False)
        for argument, (train_value, eval_value) in node.meta.get(MODE_ARGS, {}).items():
            changed |= _set(node, argument, train_value if mode else eval_value)
    return changed


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
