"""Batch norms that are folded when a graph is converted: what each multiplies and adds, in float64, and its removal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from torchopt_passes.errors import PassError
from torchopt_passes.functional.affine import batch_norm_scale, fold_batch_norm
from torchopt_passes.graph.batch_norm import BatchNorm
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.state import erase_unused, forget_batches

__all__ = [
    "can_be_linear",
    "exact_means",
    "fold_shift",
    "make_linear",
    "norms_behind",
    "operations_behind",
    "scale_of",
    "split_bias",
    "static_value",
]

aten = torch.ops.aten


def operations_behind(node: fx.Node) -> list[fx.Node]:
    """Return the matrix operations that a weight goes into, through transposes."""
    found: list[fx.Node] = []
    pending = list(node.users)
    while pending:
        user = pending.pop(0)
        if user.target in KINDS:
            found.append(user)
        else:
            pending += list(user.users)
    return found


def norms_behind(node: fx.Node) -> list[tuple[fx.Node, BatchNorm]]:
    """Return each operation that a folded weight goes into, with its batch norm."""
    found: list[tuple[fx.Node, BatchNorm]] = []
    for operation in operations_behind(node):
        norm = next((n for n in (BatchNorm.of(u) for u in operation.users) if n is not None), None)
        if norm is None:
            raise PassError(f"the batch norm behind {operation.name} is gone: its weight cannot be folded")
        found.append((operation, norm))
    return found


def can_be_linear(operation: fx.Node, weight: fx.Node) -> bool:
    """Whether an operation computes x W (+ b) with a 2-D weight that is read directly, so that it can be a linear."""
    if operation.kwargs or operation.target not in (aten.addmm.default, aten.mm.default, aten.matmul.default):
        return False
    bias = _bias(operation)
    one_dim = bias is None or getattr(bias.meta.get("val"), "ndim", 0) == 1
    return one_dim and operation.args[KINDS[operation.target].weight] is weight and weight.meta["val"].ndim == 2


def make_linear(operation: fx.Node) -> None:
    """Turn x W (+ b) into a linear; the caller transposes the weight: int8 kernels exist for that layout alone."""
    operands = KINDS[operation.target]
    x, weight, bias = operation.args[operands.activation], operation.args[operands.weight], _bias(operation)
    operation.target = aten.linear.default
    operation.args = (x, weight) if bias is None else (x, weight, bias)


def split_bias(operation: fx.Node) -> None:
    """Let a linear of 2-D values get its bias from an addition behind it; leave any other operation as it is."""
    bias, value = _bias(operation), operation.meta.get("val")
    if operation.target is not aten.linear.default or bias is None or getattr(value, "ndim", 0) != 2:
        return
    operation.args = operation.args[:2]
    with operation.graph.inserting_after(operation):
        total = operation.graph.call_function(aten.add.Tensor, (operation, bias))
    total.meta = dict(operation.meta)
    operation.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def scale_of(graph_module: fx.GraphModule, norm: BatchNorm) -> torch.Tensor:
    """Return what a batch norm multiplies each channel by: s = gamma / sqrt(var + eps), float64, shape [C]."""
    return batch_norm_scale(_value(graph_module, norm.gamma), _required(graph_module, norm.var, norm), norm.eps)


def shift_of(graph_module: fx.GraphModule, operation: fx.Node, norm: BatchNorm) -> torch.Tensor:
    """Return the bias of an operation with its batch norm folded in, in the dtype of the running mean, shape [C]."""
    mean = _required(graph_module, norm.mean, norm)
    _, shift = fold_batch_norm(
        torch.ones(len(mean), 1, dtype=mean.dtype, device=mean.device),
        _value(graph_module, _bias(operation)),
        gamma=_value(graph_module, norm.gamma),
        beta=_value(graph_module, norm.beta),
        mean=mean,
        var=_required(graph_module, norm.var, norm),
        eps=norm.eps,
    )
    return shift.to(static_value(graph_module, norm.mean).dtype)


def fold_shift(
    graph_module: fx.GraphModule,
    operation: fx.Node,
    norm: BatchNorm,
    *,
    owner: str,
    add: Callable[[str, torch.Tensor], fx.Node],
) -> None:
    """Let an operation take its batch norm's shift as its bias, and remove the batch norm.

    Args:
        graph_module: owner of the tensors.
        operation: convolution or linear, its weight folded.
        norm: the batch norm behind it.
        owner: dotted path of the module that gets the bias when there is none.
        add: makes the node of a new tensor, from its name and value.
    """
    position = KINDS[operation.target].bias
    if position is None:
        raise PassError(f"{operation.name} takes no bias: its batch norm cannot be folded")
    args = [*operation.args, *([None] * (position + 1 - len(operation.args)))]
    old, shift = _bias(operation), shift_of(graph_module, operation, norm)
    name = str(old.target) if old is not None else f"{owner}.bias".removeprefix(".")
    with graph_module.graph.inserting_before(operation):
        args[position] = add(name, shift)
    operation.args = tuple(args)
    norm.node.replace_all_uses_with(operation)
    forget_batches(graph_module, norm)
    erase_unused(norm.node)
    if old is not None:
        erase_unused(old)


def exact_means(graph_module: fx.GraphModule, names: set[str]) -> dict[str, torch.Tensor]:
    """Return, for each batch norm that lowering folds, the running mean with which it gives exactly the stored bias.

    Formula: mean = b - (b' - beta) / s for the stored b' and s = gamma / sqrt(var + eps); float64, by fqn.

    Args:
        graph_module: a prepared graph.
        names: the fake-quantizers that are lowered.
    """
    found: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or node.target not in names or len(node.args) == 1:
            continue
        for operation, norm in norms_behind(node):
            scale, shift = scale_of(graph_module, norm), shift_of(graph_module, operation, norm).double()
            bias, beta = _value(graph_module, _bias(operation)), _value(graph_module, norm.beta)
            mean = (0.0 if bias is None else bias) - (shift if beta is None else shift - beta) / scale
            # a channel with gamma 0 is beta, whatever its mean is
            old = _required(graph_module, norm.mean, norm)
            found[str(getattr(norm.mean, "target", ""))] = torch.where(scale == 0, old, mean)
    return found


def static_value(graph_module: fx.GraphModule, node: Any) -> Any:
    """Return the value of a node that depends on parameters and buffers alone; anything else as it is."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(graph_module.get_submodule(owner), name).detach()
    with torch.no_grad():
        arguments = map_arg(node.args, lambda n: static_value(graph_module, n))
        options = map_arg(node.kwargs, lambda n: static_value(graph_module, n))
        return node.target(*arguments, **options)  # pyright: ignore[reportCallIssue]


def _bias(operation: fx.Node) -> fx.Node | None:
    position = KINDS[operation.target].bias
    bias = operation.args[position] if position is not None and position < len(operation.args) else None
    return bias if isinstance(bias, fx.Node) else None


def _value(graph_module: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    return None if node is None else static_value(graph_module, node).double()


def _required(graph_module: fx.GraphModule, node: fx.Node | None, norm: BatchNorm) -> torch.Tensor:
    value = _value(graph_module, node)
    if value is None:
        raise PassError(f"{norm.node.name} keeps no running statistics: it cannot be folded")
    return value
