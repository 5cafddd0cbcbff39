"""What a model computes under ``torch.no_grad``: a graph of its own for torch.export, a part of ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from torchopt_passes._compat import is_operator

__all__ = ["inline_no_grad"]

aten = torch.ops.aten
_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_no_grad(module: fx.GraphModule) -> None:
    """Bring the parts under ``torch.no_grad`` into the graph; what leaves them, or is written in place, is detached.

    So no gradient goes through them, as in the source, and passes see their weights. A part that holds one under
    ``torch.autocast`` is left as it is.

    Args:
        module: an exported graph; changed in place.

    Example:
        >>> class Scaled(torch.nn.Module):
        ...     def forward(self, x):
        ...         with torch.no_grad():
        ...             size = x.abs().max()
        ...         return x / size
        >>> exported = torch.export.export(Scaled(), (torch.ones(2),))
        >>> module = exported.module()
        >>> inline_no_grad(module)
        >>> [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        ['aten.abs.default', 'aten.max.default', 'aten.detach.default', 'aten.div.Tensor']
    """
    for node in module.graph.find_nodes(op="call_function", target=_REGION):
        enabled, region, *inputs = cast("tuple[Any, ...]", node.args)
        body: fx.Graph = getattr(module, region.target).graph
        if not enabled and not body.find_nodes(op="get_attr"):
            _inline(module.graph, node, body, inputs)
            module.graph.erase_node(region)
            delattr(module, region.target)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.Graph, inputs: list[Any]) -> None:
    places: dict[Any, Any] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    given: Any = body.output_node().args[0]
    with graph.inserting_before(node):
        for one in (one for one in body.nodes if one.op == "call_function"):
            writes = is_operator(one.target) and one.target._schema.is_mutable
            take = (lambda value: _detached(places[value])) if writes else places.__getitem__
            places[one] = graph.node_copy(one, take)
        outputs = [_detached(places.get(one, one)) for one in given]
    for user in list(node.users):  # each takes one output
        user.replace_all_uses_with(outputs[cast("int", user.args[1])], propagate_meta=False)
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(value: Any) -> Any:
    """Return a node without a gradient; whole numbers and sizes have none."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(found, torch.Tensor) or not (found.is_floating_point() or found.is_complex()):
        return value
    made = value.graph.call_function(aten.detach.default, (value,), name="detach")
    made.meta = {**value.meta, "val": found.detach()}
    return made
