"""The matrix operations of a captured graph, each int8 or float with the reason, for one target."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from torchopt_passes.graph.batch_norm import BatchNorm, foldable_into
from torchopt_passes.graph.quantization.fake_quantizer import is_fake_quant
from torchopt_passes.graph.quantization.targets import KINDS, Operands, Target
from torchopt_passes.graph.tensors import aliases

__all__ = ["Operation", "Weight", "find_operations", "is_static", "module_path", "weight_name"]

aten = torch.ops.aten
_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations\.([^.]+)\..*$")
_QDQ = "quantized_decomposed."
# the weight is still that weight behind these; transposes move its output dimension
_TRANSPARENT = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default}


@dataclass(frozen=True)
class Weight:
    """The weight operand of a matrix operation.

    Args:
        node: where it is rounded: the parameter's node, or the last node of a computed weight.
        user: the node that reads it there.
        fqn: the parameter's first name; of a computed weight see `weight_name`.
        channel_dim: its output dimension at `node`.
        computed: whether it is made from parameters by more than transposes (weight standardization, weight norm).
    """

    node: fx.Node
    user: fx.Node
    fqn: str
    channel_dim: int
    computed: bool = False


@dataclass(frozen=True)
class Operation:
    """A matrix operation of the graph.

    Args:
        node: its node.
        operands: where its operands lie.
        weight: its weight; None for a product of two activations, and for attention, which multiplies queries by keys.
        batch_norm: the batch norm behind it that is folded into the weight when it is converted.
        why_float: why it stays float; empty when it becomes int8.
    """

    node: fx.Node
    operands: Operands
    weight: Weight | None = None
    batch_norm: BatchNorm | None = None
    why_float: str = ""

    @property
    def target(self) -> str:
        """The user's name of it: its weight, or the module around it and the node."""
        if self.weight is not None:
            return self.weight.fqn
        path = module_path(self.node)
        return f"{path}: {self.node.name}" if path else self.node.name

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The activations that it multiplies."""
        positions = (self.operands.activation,) if self.weight else (self.operands.activation, self.operands.weight)
        return tuple(n for n in (self.node.args[p] for p in positions) if isinstance(n, fx.Node))


def find_operations(
    graph_module: fx.GraphModule, graph: fx.Graph, target: Target, skipped_by: Callable[[str], str | None]
) -> list[Operation]:
    """Return every matrix operation of `graph` in order, judged for a target.

    Args:
        graph_module: owner of the parameters.
        graph: its graph, in-place ops replaced.
        target: what runs in int8.
        skipped_by: fqn or module path -> the skip pattern that covers it, or None.
    """
    names = aliases(graph_module)
    found: list[Operation] = []
    for node in graph.nodes:
        operands = KINDS.get(node.target) if node.op == "call_function" else None
        if operands is None:
            continue
        weight = _weight(node, operands, names)
        reason = _why_float(graph_module, node, operands, weight, target, skipped_by)
        norm = None if reason or weight is None else _batch_norm(node)
        found.append(Operation(node, operands, weight, norm, reason))
    return found


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module of the source that a node comes from, or ''."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def is_static(node: fx.Node, seen: dict[fx.Node, bool] | None = None) -> bool:
    """Whether a value depends on parameters and buffers alone: no input, nothing random, nothing written in place."""
    seen = {} if seen is None else seen
    if node not in seen:
        schema = getattr(node.target, "_schema", None)
        pure = schema is None or not (schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags)  # pyright: ignore
        own = node.op == "get_attr" or (node.op == "call_function" and pure and bool(node.all_input_nodes))
        seen[node] = own and all(is_static(parent, seen) for parent in node.all_input_nodes)
    return seen[node]


def _weight(node: fx.Node, operands: Operands, names: dict[str, str]) -> Weight | None:
    value = node.args[operands.weight] if operands.weight < len(node.args) else None
    if operands.kind == "attention" or not isinstance(value, fx.Node) or not is_static(value):
        return None
    shape = getattr(value.meta.get("val"), "shape", ())
    dim = operands.channel_dim % len(shape) if shape else max(operands.channel_dim, 0)
    start, user, moved = _behind(value, node, dim)
    if start.op == "get_attr":
        return Weight(start, user, names.get(str(start.target), str(start.target)), moved)
    return Weight(value, node, weight_name(value, names), dim, computed=True)


def _behind(value: fx.Node, user: fx.Node, dim: int) -> tuple[fx.Node, fx.Node, int]:
    """Follow transposes back to the parameter: its node, who reads it, and where the output dimension is there."""
    while value.op == "call_function":
        if value.target in _TRANSPARENT:
            pass
        elif value.target is aten.t.default:
            dim = 1 - dim
        elif value.target is aten.transpose.int:
            ndim = value.meta["val"].ndim
            first, second = (int(d) % ndim for d in value.args[1:3])  # pyright: ignore[reportArgumentType]
            dim = {first: second, second: first}.get(dim, dim)
        elif value.target is aten.permute.default:
            order = value.args[1]
            dim = int(order[dim]) % len(order)  # pyright: ignore
        else:
            break
        value, user = value.args[0], value  # pyright: ignore[reportAssignmentType]
    return value, user, dim


def weight_name(value: fx.Node, names: Mapping[str, str] | None = None) -> str:
    """Return the name of a weight: its parameter's, or that of the first one it is computed from.

    A parametrized weight (weight norm, a codebook) goes by the name that it has in the source module.

    Args:
        value: a node.
        names: fqn -> the first name of that tensor, for tied weights.
    """
    pending, seen = [value], set[fx.Node]()
    while pending:
        node = pending.pop(0)
        if node.op == "get_attr":
            name = str(node.target)
            return _PARAMETRIZATION.sub(r"\1\2", (names or {}).get(name, name))
        pending += [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(node.all_input_nodes)
    return value.name


def _why_float(
    graph_module: fx.GraphModule,
    node: fx.Node,
    operands: Operands,
    weight: Weight | None,
    target: Target,
    skipped_by: Callable[[str], str | None],
) -> str:
    what = str(node.target).removeprefix("aten.")
    for name in (weight.fqn if weight else "", module_path(node), node.name):
        pattern = skipped_by(name) if name else None
        if pattern is not None:
            return f"float: skip pattern {pattern!r}"
    operand_nodes = [
        n for n in (node.args[p] for p in (operands.activation, operands.weight)) if isinstance(n, fx.Node)
    ]
    behind = [_behind(n, node, 0)[0] for n in operand_nodes]
    if any(is_fake_quant(graph_module, n) for n in behind):
        return "nothing to do: fake-quantized already"
    if any(str(n.target).startswith(_QDQ) for n in behind):
        return "nothing to do: int8 already"
    if operands.kind in target.no_kernel:
        return f"float: target {target.name!r} {target.no_kernel[operands.kind]} ({what})"
    if not _floating(operand_nodes):
        return f"float: {what} of {', '.join(_dtypes(operand_nodes))} has no int8 kernel"
    if operands.kind == "matmul" and weight is None and _inner_size(operand_nodes[0]) == 1:
        return f"float: {what} is an outer product: there is nothing to sum in int8"
    if operands.kind == "matmul" and weight is None and not target.dynamic_matmul:
        left = operand_nodes[0] if operand_nodes else None
        if left is not None and is_static(left):
            return f"float: target {target.name!r} has no int8 kernel for a weight on the left-hand side ({what})"
        return f"float: target {target.name!r} has no int8 kernel for a product of two activations ({what})"
    if operands.kind not in ("matmul", "attention") and weight is None:
        return f"float: the weight of {what} is computed from the model's input"
    return ""


def _inner_size(left: fx.Node) -> object:
    value = left.meta.get("val")
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else None


def _floating(nodes: list[fx.Node]) -> bool:
    return all(d == "float32" for d in _dtypes(nodes)) if nodes else False


def _dtypes(nodes: list[fx.Node]) -> list[str]:
    values = [node.meta.get("val") for node in nodes]
    return [str(v.dtype).removeprefix("torch.") for v in values if isinstance(v, torch.Tensor)]


def _batch_norm(node: fx.Node) -> BatchNorm | None:
    users = [user for user in node.users if user.target is not aten.sym_size.int]
    norm = BatchNorm.of(users[0]) if len(users) == 1 else None
    return norm if norm is not None and foldable_into(norm)[0] is node else None
