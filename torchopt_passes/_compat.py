"""The one place for private APIs of torch, torchao and transformers; tests/test_compat.py tells when they move."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["flat_inputs"]


def flat_inputs(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments as the flat list of the graph's placeholders.

    An exported module's code flattens its arguments by a spec that lies in the graph's private code generator; an
    interpreter of the graph needs the same flattening.
    """
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return [*args, *kwargs.values()]
    spec = info.in_spec
    names = list(spec.child(1).context) if spec.num_children == 2 else []
    if set(names) == set(kwargs):
        kwargs = {name: kwargs[name] for name in names}
    return pytree.tree_leaves((args, kwargs))
