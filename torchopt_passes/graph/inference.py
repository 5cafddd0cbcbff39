"""From a captured training graph to the graph that is deployed: eval mode, no loss, no inputs only the loss reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchopt_passes._compat import copy_graph, output_spec_of
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.inplace import written_argument
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.verify import in_eval_mode

__all__ = ["LOSS", "leaf_names", "named_outputs", "to_inference"]

LOSS = "loss"
"""The name of the output that training reads and no deployment does."""

# op -> the position of the argument that eval mode sets to False or 0
_MODE_ARGUMENT = {
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.scaled_dot_product_attention.default: 4,
}


def to_inference(graph_module: fx.GraphModule, outputs: Sequence[str] | None = None) -> fx.GraphModule:
    """Return the inference graph of a captured, pruned or converted graph; the graph given is untouched.

    The result shares the parameters and buffers of the original, takes tensors by position (the inputs that the kept
    outputs depend on, in order) and returns a tuple of tensors. Its ``meta`` holds ``"input_names"``,
    ``"output_names"``, ``"dropped_inputs"`` and ``"dropped_outputs"``.

    Args:
        graph_module: an ATen graph: of `capture`, of ``torch.export``, or a converted int8 graph.
        outputs: names to keep, a nested one by its prefix (``"hidden_states"``); by default all but ``loss``. A lone
            output is called ``"output"``, those of a tuple ``"output_0"``, ``"output_1"``, those of a dict their key.

    Returns:
        A new graph module in eval mode.

    Raises:
        ConfigError: an unknown output name, or a graph that still has observers or ops in training mode.

    Example:
        >>> class Head(torch.nn.Module):
        ...     def forward(self, x, labels):
        ...         return {"loss": (x - labels).square().mean(), "logits": x + 1}
        >>> x = torch.ones(2)
        >>> graph = torch.export.export(Head(), (x, torch.zeros(2))).module()
        >>> inference = to_inference(graph)
        >>> inference.meta["input_names"], inference.meta["dropped_inputs"], inference(x)
        (('x',), ('labels',), (tensor([2., 2.]),))
    """
    graph = _eval_graph(graph_module)
    kept, dropped = _outputs(graph, outputs)
    live = _needed(graph, [node for _, node in kept])
    result = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        if node in live:
            _check_node(graph_module, node)
            twins[node] = result.node_copy(node, lambda n: twins[n])
    result.output(tuple(twins[node] for _, node in kept))
    module = fx.GraphModule(graph_module, result, class_name="InferenceGraph")
    module.meta.update(
        input_names=tuple(str(node.target) for node in placeholders if node in live),
        output_names=tuple(name for name, _ in kept),
        dropped_inputs=tuple(str(node.target) for node in placeholders if node not in live),
        dropped_outputs=dropped,
    )
    module.training = False
    return module


def leaf_names(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested dicts, tuples and model outputs with a name for each: keys joined by ``_``.

    Example:
        >>> leaf_names({"logits": 1, "states": (2, 3)})
        [('logits', 1), ('states_0', 2), ('states_1', 3)]
    """
    found: list[tuple[str, Any]] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        top = [prefix] if prefix else []
        found.append(("_".join([*top, *parts]), leaf))
    return found


def named_outputs(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a model's result by name; a bare tensor is ``output``, a tuple ``output_0``, ...

    Example:
        >>> named_outputs({"loss": 1, "logits": 2}), named_outputs((1, 2)), named_outputs(1)
        ([('loss', 1), ('logits', 2)], [('output_0', 1), ('output_1', 2)], [('output', 1)])
    """
    return leaf_names(tree, "" if pytree.tree_structure(tree).context else "output")


def _eval_graph(graph_module: fx.GraphModule) -> fx.Graph:
    if not graph_module.training:
        return in_one_mode(graph_module.graph, training=False)
    try:
        with in_eval_mode(graph_module):
            return in_one_mode(copy_graph(graph_module.graph), training=False)
    except NotImplementedError:  # graphs of torch.export refuse eval(): each node is checked instead
        return graph_module.graph


def _outputs(graph: fx.Graph, wanted: Sequence[str] | None) -> tuple[list[tuple[str, fx.Node]], tuple[str, ...]]:
    (output,) = graph.find_nodes(op="output")
    values = pytree.tree_leaves(output.args[0], is_leaf=lambda x: isinstance(x, fx.Node))
    spec = output_spec_of(graph)
    tree = pytree.tree_unflatten(values, spec) if spec is not None else output.args[0]
    named = named_outputs(tree)
    names = [name for name, node in named if isinstance(node, fx.Node)]
    unknown = [want for want in wanted or () if not any(_covers(want, name) for name in names)]
    if unknown:
        raise ConfigError(f"no output {unknown}; the model has {names}")

    def keep(name: str) -> bool:
        return name != LOSS if wanted is None else any(_covers(want, name) for want in wanted)

    kept = [(name, node) for name, node in named if isinstance(node, fx.Node) and keep(name)]
    if not kept:
        raise ConfigError(f"nothing to deploy: the outputs are {names}; name one with outputs=[...]")
    return kept, tuple(name for name in names if not keep(name))


def _covers(want: str, name: str) -> bool:
    return name == want or name.startswith(f"{want}_")


def _needed(graph: fx.Graph, outputs: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that the outputs are computed from, and those that write into one of them in place."""
    live: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
        if not pending:
            pending = [w for w in graph.nodes if w not in live and any(t in live for t in _written(w))]
    return live


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what an in-place op writes into, and the tensors that this is a view of."""
    value = written_argument(node)
    while value is not None:
        yield value
        value = _viewed(value)


def _viewed(node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
    first = node.args[0] if node.args else None
    return first if is_view and isinstance(first, fx.Node) else None


def _check_node(graph_module: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        kind = type(graph_module.get_submodule(str(node.target))).__name__
        raise ConfigError(
            f"{node.target} ({kind}) is not an ATen op: a graph with observers or fake-quantizers is converted "
            "before it is deployed (ConvertQuantized)"
        )
    position = _MODE_ARGUMENT.get(node.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if position is not None and len(node.args) > position and node.args[position]:
        raise ConfigError(
            f"{node.name} ({node.target}) is in training mode and the graph cannot be switched: "
            "call eval() on the model before it is captured, or use capture(), which switches"
        )
