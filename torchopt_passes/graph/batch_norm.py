"""Batch norms of a captured graph: their arguments by name, and the convolution or linear in front of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["BatchNorm", "batch_norms", "foldable_into", "freeze_batch_norms"]

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchNorm:
    """One batch norm of a graph.

    Args:
        node: its node.
        gamma: the node of its weight, or None.
        beta: the node of its bias, or None.
        mean: the node of its running mean, or None.
        var: the node of its running variance, or None.
        eps: as in the module.
    """

    node: fx.Node
    gamma: fx.Node | None
    beta: fx.Node | None
    mean: fx.Node | None
    var: fx.Node | None
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> BatchNorm | None:
        """Read a node; None when it is no batch norm."""
        if node.op != "call_function" or node.target is not aten.batch_norm.default:
            return None
        tensors = [arg if isinstance(arg, fx.Node) else None for arg in node.args[1:5]]
        return cls(node, *tensors, eps=float(node.args[7]))  # pyright: ignore[reportArgumentType]

    @property
    def statistics(self) -> tuple[fx.Node, fx.Node] | None:
        """The nodes of running mean and variance, or None when it keeps none."""
        return None if self.mean is None or self.var is None else (self.mean, self.var)


def batch_norms(graph: fx.Graph) -> list[BatchNorm]:
    """Return every batch norm of a graph, in order."""
    found = (BatchNorm.of(node) for node in graph.nodes)
    return [norm for norm in found if norm is not None]


def foldable_into(norm: BatchNorm) -> tuple[fx.Node | None, str]:
    """Return the convolution or linear that a batch norm in eval mode can be folded into, or None and the reason."""
    before = norm.node.args[0]
    name = str(getattr(before, "target", ""))
    if not isinstance(before, fx.Node) or not (name.startswith("aten.conv") or name == "aten.linear.default"):
        return None, "no convolution or linear is directly in front of it"
    if norm.statistics is None:
        return None, "it keeps no running statistics"
    users = [user for user in before.users if user.target is not aten.sym_size.int]
    if users != [norm.node]:
        return None, f"the result of {before.name} is used by others too"
    value = before.meta.get("val")
    if name == "aten.linear.default" and getattr(value, "ndim", 2) != 2:
        return None, f"it does not normalize the output features of {before.name}"
    return before, ""


def freeze_batch_norms(graph_module: fx.GraphModule, frozen: bool) -> int:
    """Make every batch norm use, and not update, its running statistics in training mode too, or undo that.

    The mark is in the node's meta, where copies keep it and the switch of modes reads it.

    Args:
        graph_module: a captured graph.
        frozen: whether they are frozen from now on.

    Returns:
        How many batch norms keep statistics that can be frozen.
    """
    norms = [norm for norm in batch_norms(graph_module.graph) if norm.statistics is not None]
    for norm in norms:
        norm.node.meta["bn_frozen"] = frozen
    graph_module.train(graph_module.training)
    return len(norms)
