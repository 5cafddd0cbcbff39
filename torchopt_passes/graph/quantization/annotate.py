"""Annotation: where a graph is rounded for a target, read from its ATen operations, not from module types.

Four steps, each a few lines: which operations become int8 (`operations.py`); which edges those read rounded; rounding
moves up through operations that only move values, to the value they came from; one edit for each place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.quantization.operations import Operation, Weight, find_operations
from torchopt_passes.graph.quantization.targets import FUSED_ACTIVATIONS, Target

__all__ = ["Annotation", "Place", "annotate"]

aten = torch.ops.aten
_ADDS = {aten.add.Tensor}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
# a value is the same on both sides (in eval mode): it is rounded once, in front
_SAME = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
}


# about zero they would leave half of the integers unused, and their zero point is 0 without it
_NOT_NEGATIVE = {aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.relu.default, aten.relu6.default}


@dataclass(frozen=True)
class Place:
    """One place where a value is rounded.

    Args:
        quantizer: name of its fake-quantizer; places with one name share it.
        node: name of the node whose value is rounded.
        users: names of the nodes that read it rounded.
        target: the user's name of it: the weight's fqn, or the node.
        reason: why it is rounded.
        weight: what is known of it when it is a weight.
        batch_norm: name of the batch norm that is folded into the weight, or ''.
        follow: the value was observed already at an earlier place of the same quantizer.
        bias_apart: the target wants the bias of this weight's operation added behind it.
        symmetric: the target wants this activation on a grid about zero.
    """

    quantizer: str
    node: str
    users: tuple[str, ...]
    target: str
    reason: str
    weight: Weight | None = None
    batch_norm: str = ""
    follow: bool = False
    bias_apart: bool = False
    symmetric: bool = False


@dataclass
class Annotation:
    """What the annotation decided for one graph and target.

    Args:
        operations: every matrix operation, each int8 or float with the reason.
        places: where values are rounded, in the order of the graph.
    """

    operations: list[Operation]
    places: list[Place] = field(default_factory=list[Place])

    @property
    def skips(self) -> list[Skip]:
        """The operations that stay float, each with its reason."""
        return [Skip(target=op.target, reason=op.why_float) for op in self.operations if op.why_float]


def annotate(
    graph_module: fx.GraphModule, graph: fx.Graph, target: Target, skipped_by: Callable[[str], str | None]
) -> Annotation:
    """Decide where a graph is rounded; touches nothing.

    Args:
        graph_module: owner of the parameters.
        graph: its graph with in-place ops replaced (a copy will do: nodes are named, not pointed at).
        target: what runs in int8.
        skipped_by: fqn or module path -> the skip pattern that covers it, or None.
    """
    result = Annotation(find_operations(graph_module, graph, target, skipped_by))
    chosen = [op for op in result.operations if not op.why_float]
    reads = _Reads()
    for op in chosen:
        for value in op.inputs:
            reads.add(value, op.node, f"input of {_called(op)}")
            if target.symmetric_products and op.weight is None:
                reads.symmetric.add(value)
    _rounded_sums(chosen, target, reads)
    _rounded_outputs(chosen, target, reads)
    reads.move_up(graph, target)
    result.places = [*_weight_places(chosen, target), *reads.places(graph)]
    return result


class _Reads:
    """Which users read which value rounded, why, and which values share a quantizer."""

    def __init__(self) -> None:
        self.users: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        self.reasons: dict[fx.Node, list[str]] = defaultdict(list)
        self.root: dict[fx.Node, fx.Node] = {}
        self.followers: set[fx.Node] = set()
        self.symmetric: set[fx.Node] = set()

    def add(self, value: fx.Node, user: fx.Node, reason: str) -> None:
        """Note that `user` reads `value` rounded."""
        self.users[value].add(user)
        if reason not in self.reasons[value]:
            self.reasons[value].append(reason)

    def all_rounded(self, value: fx.Node) -> bool:
        """Whether every user of a value that reads its numbers reads them rounded."""
        users = _readers(value)
        return bool(users) and users <= self.users.get(value, set())

    def find(self, value: fx.Node) -> fx.Node:
        """Return the value whose quantizer this one shares."""
        while value in self.root:
            value = self.root[value]
        return value

    def share(self, value: fx.Node, with_: fx.Node) -> None:
        """Let a value use the quantizer of another."""
        one, other = self.find(value), self.find(with_)
        if one is not other:
            self.root[one] = other

    def move_up(self, graph: fx.Graph, target: Target) -> None:
        """Round in front of operations that only move values; behind those of `target.follow` too, on one grid."""
        for node in reversed(list(graph.nodes)):
            if node.op != "call_function" or node.target not in _SAME | target.follow | _SPLITS:
                continue
            if node.target in _SPLITS:
                self._move_above_split(node, target)
            elif self.all_rounded(node) and not _pads_a_number(node) and not _moves_attention(node, target):
                self._move_above(node, follow=node.target in target.follow)

    def _move_above(self, node: fx.Node, *, follow: bool) -> None:
        sources = [n for n in _sources(node) if _is_float(n)]
        if not sources:
            return
        for source in sources:
            for reason in self.reasons[node]:
                self.add(source, node, reason)
            self.share(node, source)
        if follow:
            self.followers.add(node)
        else:
            del self.users[node]

    def _move_above_split(self, node: fx.Node, target: Target) -> None:
        parts = list(node.users)
        if aten.slice.Tensor in target.follow and parts and all(self.all_rounded(part) for part in parts):
            source = node.args[0]
            for part in parts if isinstance(source, fx.Node) and _is_float(source) else ():
                for reason in self.reasons[part]:
                    self.add(source, node, reason)  # pyright: ignore[reportArgumentType]
                self.share(part, source)  # pyright: ignore[reportArgumentType]
                self.followers.add(part)

    def places(self, graph: fx.Graph) -> Iterable[Place]:
        """Yield the places of activations, in the order of the graph."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        roots = {self.find(node) for node in self.symmetric}
        symmetric = {root for root in roots if root.target not in _NOT_NEGATIVE}
        for node in graph.nodes:
            users = self.users.get(node)
            if users:
                yield Place(
                    quantizer=f"act_{self.find(node).name}",
                    node=node.name,
                    users=tuple(user.name for user in sorted(users, key=order.__getitem__)),
                    target=node.name,
                    reason="; ".join(self.reasons[node]),
                    follow=node in self.followers,
                    symmetric=self.find(node) in symmetric,
                )


def _rounded_sums(chosen: list[Operation], target: Target, reads: _Reads) -> None:
    """Round the operands of residual sums behind convolutions, so that the sum is fused or runs in int8."""
    convs = [op for op in chosen if op.operands.kind.startswith("conv")]
    tails = {(op.batch_norm.node if op.batch_norm else op.node): op for op in convs}
    fused: set[fx.Node] = set()
    for tail, op in reversed(tails.items()):
        for add in _readers(tail):
            if add.target not in _ADDS or add in fused or not _same_shapes(add):
                continue
            fused.add(add)
            for operand in (n for n in add.args[:2] if isinstance(n, fx.Node)):
                if target.rounded_adds == "both" or operand is not tail:
                    reads.add(operand, add, f"operand of the sum {add.name} behind {_called(op)}")
            if target.rounded_adds == "both":
                _round_output(add, f"output of the sum {add.name} behind {_called(op)}", reads)


def _rounded_outputs(chosen: list[Operation], target: Target, reads: _Reads) -> None:
    for op in chosen:
        if op.operands.kind in target.rounded_outputs:
            _round_output(op.batch_norm.node if op.batch_norm else op.node, f"output of {_called(op)}", reads)


def _round_output(node: fx.Node, reason: str, reads: _Reads) -> None:
    tail = _behind_activation(node)
    for user in _readers(tail):
        reads.add(tail, user, reason)


def _weight_places(chosen: list[Operation], target: Target) -> Iterable[Place]:
    """Yield one place for each weight; a weight that is tied or used twice is one quantizer."""
    seen: dict[tuple[object, ...], str] = {}
    taken: set[str] = set()
    users: dict[tuple[str, str], list[str]] = {}
    places: dict[tuple[str, str], Place] = {}
    for op in chosen:
        weight = op.weight
        if weight is None:
            continue
        norm = op.batch_norm
        own = (weight.node.name if weight.computed else weight.fqn, weight.channel_dim)
        key = (*own, str(norm.gamma), str(norm.var), norm.eps) if norm else own
        first = key not in seen
        name = seen.setdefault(key, _free(_identifier(weight.fqn), taken))
        taken.add(name)
        spot = (name, weight.node.name)
        if spot in places:
            users[spot].append(weight.user.name)
        else:
            users[spot] = [weight.user.name]
            behind = f", with the batch norm {norm.node.name} folded in" if norm else ""
            reason = f"weight of {_called(op)}{behind}"
            norm_name = norm.node.name if norm else ""
            places[spot] = Place(
                quantizer=name,
                node=weight.node.name,
                users=(),
                target=weight.fqn,
                reason=reason,
                weight=weight,
                batch_norm=norm_name,
                follow=not first,
                bias_apart=op.operands.kind in target.bias_apart,
            )
    for spot, place in places.items():
        unique = tuple(dict.fromkeys(users[spot]))
        yield replace(place, users=unique)


def _behind_activation(node: fx.Node) -> fx.Node:
    """Return the activation that rounding absorbs when it is the only reader, else the node itself."""
    readers = _readers(node)
    reader = next(iter(readers)) if len(readers) == 1 else node
    return reader if reader.target in FUSED_ACTIVATIONS else node


def _readers(node: fx.Node) -> set[fx.Node]:
    return {user for user in node.users if user.target is not aten.sym_size.int}


def _pads_a_number(node: fx.Node) -> bool:
    """Return whether a node surrounds a value with a number that need not be on its grid, unlike 0."""
    mode, value = "constant", None
    if node.target is aten.pad.default:
        mode, value = (*node.args[2:], *("constant", None)[len(node.args) - 2 :])
    elif node.target is aten.constant_pad_nd.default:
        value = node.args[2] if len(node.args) > 2 else None
    return mode == "constant" and value not in (None, 0)


def _moves_attention(node: fx.Node, target: Target) -> bool:
    """Return whether a node moves what an attention kernel gives: such a kernel returns floats, moved as wanted."""
    if "attention" not in target.int8:
        return False
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in _SAME | target.follow:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.target is aten.scaled_dot_product_attention.default


def _sources(node: fx.Node) -> list[fx.Node]:
    first = node.args[0]
    items = first if isinstance(first, list | tuple) else [first]
    return [item for item in items if isinstance(item, fx.Node)]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _same_shapes(add: fx.Node) -> bool:
    operands = [n for n in add.args[:2] if isinstance(n, fx.Node)]
    if len(operands) != 2 or not all(_is_float(n) for n in operands):
        return False
    left, right = (n.meta["val"].shape for n in operands)
    return len(left) == len(right) and all(str(a) == str(b) for a, b in zip(left, right, strict=True))


def _called(op: Operation) -> str:
    return f"{op.operands.kind} {op.node.name}"


def _identifier(fqn: str) -> str:
    """Return a parameter's name as a submodule's: ``0.weight`` starts with a digit, ``b-0.weight`` has a hyphen."""
    name = re.sub(r"\W", "_", fqn)
    return name if name.isidentifier() else f"_{name}"


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
