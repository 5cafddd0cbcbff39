"""In-place ops of a captured graph, and their out-of-place twins: a value that is rewritten must not change later."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["make_out_of_place", "written_argument"]


def written_argument(node: fx.Node) -> fx.Node | None:
    """Return the value that an in-place op writes into, or None for any other node."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or not node.args:
        return None
    first = schema.arguments[0]
    if first.alias_info is None or not first.alias_info.is_write:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def make_out_of_place(graph: fx.Graph) -> list[str]:
    """Replace ``relu_``, ``add_`` and their like by ``relu``, ``add``: same values, same gradients, same node names.

    Captured training graphs keep the in-place ops of the source. Left alone are those that write into state (batch
    counters) or into a value with views, where the write must be seen through the view.

    Returns:
        The names of the nodes that were replaced.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(inplace=True))
        >>> graph_module = torch.export.export(model, (torch.ones(2),)).module()
        >>> make_out_of_place(graph_module.graph)
        ['relu_']
    """
    changed: list[str] = []
    for node in graph.nodes:
        written = written_argument(node)
        twin = _twin(node.target)
        if written is None or twin is None or written.op != "call_function" or _has_views(written):
            continue
        order = {n: i for i, n in enumerate(graph.nodes)}
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        node.target = twin
        changed.append(node.name)
    return changed


def _twin(op: object) -> object | None:
    """Return the functional overload of an in-place ATen operator, or None."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or not schema.name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::")[:-1], None)
    return getattr(packet, schema.overload_name or "default", None)


def _has_views(node: fx.Node) -> bool:
    """Whether the value is a view of another, or another is a view of it."""
    return _is_view(node) or any(_is_view(user) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in schema.returns)
