"""Training and evaluation mode of a captured graph: every node that depends on the mode says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

__all__ = ["MODE_ARGUMENTS", "by_mode", "get_argument", "pin", "set_argument", "set_mode"]

MODE_ARGUMENTS = "mode_arguments"
"""Key of ``node.meta``: ``{argument: (value in training, value in evaluation)}``."""

_aten = torch.ops.aten


def by_mode(in_training: Any, in_evaluation: Any, training: bool) -> Any:
    """Return the first value in training mode, the second in evaluation mode.

    The node that stands in a captured graph where the source takes another path in training than in evaluation
    (stochastic depth, auxiliary heads, ``if self.training``). `set_mode` sets its last argument.
    """
    return in_training if training else in_evaluation


# (argument, value in evaluation) of the ops that torch itself switches by mode
_KNOWN: dict[Any, tuple[str, Any]] = {
    _aten.dropout.default: ("train", False),
    _aten.dropout_.default: ("train", False),
    _aten.feature_dropout.default: ("train", False),
    _aten.feature_dropout_.default: ("train", False),
    _aten.alpha_dropout.default: ("train", False),
    _aten.alpha_dropout_.default: ("train", False),
    _aten.feature_alpha_dropout.default: ("train", False),
    _aten.feature_alpha_dropout_.default: ("train", False),
    _aten.batch_norm.default: ("training", False),
    _aten.instance_norm.default: ("use_input_stats", None),
    _aten.rrelu.default: ("training", False),
    _aten.rrelu_.default: ("training", False),
    _aten.scaled_dot_product_attention.default: ("dropout_p", 0.0),
    _aten.lstm.input: ("train", False),
    _aten.gru.input: ("train", False),
    _aten.rnn_tanh.input: ("train", False),
    _aten.rnn_relu.input: ("train", False),
}


def mark_known(graph: fx.Graph) -> None:
    """Give the ops of a training graph that torch switches by mode their two values."""
    for node in graph.nodes:
        known = _KNOWN.get(node.target) if node.op == "call_function" else None
        if known is not None and known[1] is not None:
            now = get_argument(node, known[0])
            if now:
                node.meta.setdefault(MODE_ARGUMENTS, {})[known[0]] = (now, known[1])


def set_mode(graph_module: fx.GraphModule, training: bool) -> fx.GraphModule:
    """Switch every mode-dependent node, and the submodules, to training or evaluation.

    What depends on the mode is read from each node's ``meta`` (`MODE_ARGUMENTS`), so passes may move, copy and add
    nodes; a node pinned with `pin` keeps its value in both modes.

    Args:
        graph_module: a captured graph, rewritten or not.
        training: the mode.

    Returns:
        The same module, recompiled if anything changed.
    """
    nn.Module.train(graph_module, training)
    changed = False
    for node in graph_module.graph.nodes:
        for name, values in node.meta.get(MODE_ARGUMENTS, {}).items():
            value = values[0] if training else values[1]
            if get_argument(node, name) != value:
                set_argument(node, name, value)
                changed = True
    if changed:
        graph_module.recompile()
    return graph_module


def pin(node: fx.Node, argument: str, value: Any) -> None:
    """Fix an argument that the mode would switch: a frozen batch norm has ``training`` False in training too."""
    node.meta[MODE_ARGUMENTS] = {k: v for k, v in node.meta.get(MODE_ARGUMENTS, {}).items() if k != argument}
    set_argument(node, argument, value)


def get_argument(node: fx.Node, name: str) -> Any:
    """Return an argument of an operator call by its schema name, its default where the call leaves it out."""
    position, default = _argument(node, name)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an operator call by its schema name.

    Example:
        >>> graph_module = torch.export.export(nn.Dropout(0.5), (torch.ones(2),)).module()
        >>> (node,) = [n for n in graph_module.graph.nodes if n.op == "call_function"]
        >>> set_argument(node, "train", False)
        >>> node.args[1:], get_argument(node, "train")
        ((0.5, False), False)
    """
    position, _ = _argument(node, name)
    if name not in node.kwargs and position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _argument(node: fx.Node, name: str) -> tuple[int, Any]:
    if node.target is by_mode:
        return 2, True
    schema = node.target._schema  # pyright: ignore
    for position, argument in enumerate(schema.arguments):
        if argument.name == name:
            return position, argument.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")
