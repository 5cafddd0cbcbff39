"""Index dataflow: which indices of which axes belong together, through a whole captured graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchopt_passes._compat import fake_tensor_mode, flat_inputs, is_operator, output_spec_of
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.align import user_line
from torchopt_passes.graph.graph_state import GraphState
from torchopt_passes.graph.inference import named_outputs
from torchopt_passes.graph.inplace import written_argument
from torchopt_passes.graph.labels import Ids, Labels
from torchopt_passes.graph.modes import select
from torchopt_passes.graph.tensors import aliases, named_tensors

__all__ = [
    "Axes",
    "AxisLabels",
    "Call",
    "MacTerm",
    "Mask",
    "Rule",
    "analyse_axes",
    "base_name",
    "forget_axes",
    "live_nodes",
]

Mask = npt.NDArray[np.bool_]
"""Of labels or of the indices of an axis: bool for each."""

_KNOWN = "_known_axes"
"""The attribute of a module that keeps its last analysis."""

AxisLabels = tuple[Ids, ...]
"""The labels of a tensor: one array for each axis, as long as the axis."""

Rule = Callable[["Call"], Any]
"""How an operation moves labels: returns the labels of its output (a list of them, where it gives a list)."""


@dataclass(frozen=True)
class MacTerm:
    """A matrix product: its MACs are the product of a constant and of the sizes of the axes it runs over.

    Args:
        node: the operation.
        constant: number of MACs for one index of each axis (kernel sizes).
        axes: labels of the axes.
    """

    node: fx.Node
    constant: int
    axes: AxisLabels


class Axes:
    """What is known of a graph's axes.

    Attributes:
        labels: which labels leave together, and which never leave.
        tensors: fqn of each parameter and buffer that the graph reads (the first one of a tied tensor) -> its labels.
        values: node -> the labels of what it computes: a tuple of axes, a list of those, or None.
        sizes: node -> what it computes on the example inputs: tensors without data, and numbers.
        statistics: node -> the axes of its (first) input that it computes one number from, of what stays.
        groups: node -> the labels of its blocks (groups of a convolution or a group norm).
        lookups: node -> the labels of the axis that it takes constant indices of.
        macs: the matrix products.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.labels = Labels()
        self.tensors: dict[str, AxisLabels] = {}
        self.values: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, Any] = _sizes(graph_module)
        self.statistics: dict[fx.Node, tuple[int, ...]] = {}
        self.groups: dict[fx.Node, Ids] = {}
        self.lookups: dict[fx.Node, Ids] = {}
        self.macs: list[MacTerm] = []

    def copy(self) -> Axes:
        """Return an analysis whose labels can be locked without this one's being so."""
        other = copy.copy(self)
        other.labels = self.labels.copy()
        return other

    def kept(self, ids: Ids, removed: Mask) -> Mask:
        """Return which indices of an axis stay, bool, when the atoms of `removed` (bool by label) leave."""
        if not ids.any():
            return np.ones(len(ids), bool)
        return ~np.any(removed[self.labels.factors(ids)], axis=1)


def analyse_axes(graph_module: fx.GraphModule, free_outputs: Sequence[str] = ("*",)) -> Axes:
    """Follow the labels of every axis through a captured graph.

    Args:
        graph_module: a captured graph with example inputs; nothing is computed, and it is left as it is.
        free_outputs: globs on the names of outputs that may get narrower; the others are locked.

    Returns:
        The labels of everything; what no rule describes is locked, with node, operation and the user's line.

    Raises:
        ConfigError: the graph has no example inputs, holds fake-quantizers, or a glob matches no output.
    """
    if graph_module.meta.get("example_inputs") is None:
        raise ConfigError("the graph has no example inputs: capture(model, ...) keeps them")
    axes = _followed(graph_module)
    output = graph_module.graph.output_node()
    for name, labels in _outputs(axes, output, free_outputs):
        for ids in labels:
            axes.labels.lock(ids, f"an output of the model ({name})")
    return axes


def forget_axes(graph_module: fx.GraphModule) -> None:
    """Let go of the analysis that is kept with a graph, when it is of no use any more."""
    graph_module.__dict__.pop(_KNOWN, None)


def _followed(graph_module: fx.GraphModule) -> Axes:
    """Return the analysis of a graph, outputs not locked; what was found for the same graph before is used again.

    A plan, its proof and its surgery ask for it one after the other. It is kept with the module, and good for as long
    as the nodes and their arguments, the shapes of the tensors, and the values of the integer ones (constant indices)
    are what they were.
    """
    state = GraphState.of(graph_module)
    known: tuple[GraphState, Axes] | None = graph_module.__dict__.get(_KNOWN)
    if known is None or not known[0].same(state):
        known = graph_module.__dict__[_KNOWN] = (state, _follow(graph_module))
    return known[1].copy()


def _follow(graph_module: fx.GraphModule) -> Axes:
    from torchopt_passes.graph.axis_rules import rule_of

    axes = Axes(graph_module)
    first = aliases(graph_module)
    tensors = dict(named_tensors(graph_module))
    for node in live_nodes(graph_module.graph):
        if node.op == "get_attr":
            fqn = first[str(node.target)]
            if fqn not in axes.tensors:
                axes.tensors[fqn] = _state_labels(axes.labels, tensors[fqn])
            axes.values[node] = axes.tensors[fqn]
        elif node.op == "placeholder":
            axes.values[node] = _fixed(axes.sizes[node])
        elif node.op == "call_module":
            raise ConfigError(f"{node.target} is a fake-quantizer: remove channels before InsertFakeQuant")
        elif node.op != "output":
            axes.values[node] = _apply(Call(axes, node), rule_of(node))
    return axes


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that the outputs are computed from or that write into something, in order."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        keep = node.op in ("output", "placeholder") or written_argument(node) is not None
        if keep or any(user in live for user in node.users):
            live.add(node)
    return [node for node in graph.nodes if node in live]


def base_name(node: fx.Node) -> str:
    """Return the name of an operation without namespace, overload and the mark of in-place ones: ``"relu"``."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


class Call:
    """One operation, as a rule sees it.

    Args:
        axes: what is known so far.
        node: the operation.
    """

    def __init__(self, axes: Axes, node: fx.Node) -> None:
        self.axes, self.node, self.table = axes, node, axes.labels
        schema: Any = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        self._args: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        self._defaults = {a.name: a.default_value for a in schema.arguments} if schema is not None else {}

    def arg(self, name: str, default: Any = None) -> Any:
        """Return an argument as it stands in the graph."""
        value = self._args.get(name)
        return value if value is not None else self._defaults.get(name, default)

    def number(self, name: str) -> Any:
        """Return an argument as numbers: sizes that are nodes as they are on the example inputs."""
        return self.concrete(self.arg(name))

    def concrete(self, value: Any) -> Any:
        """Return a value of the graph with nodes replaced by what they are on the example inputs."""
        return map_arg(value, lambda node: self.axes.sizes[node])

    def labels(self, name: str) -> AxisLabels | None:
        """Return the labels of a tensor argument, or None when it is not given."""
        value = self.arg(name)
        return self.of(value) if isinstance(value, fx.Node) else None

    def of(self, node: fx.Node) -> AxisLabels:
        """Return the labels of a tensor in the graph."""
        return self.axes.values[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor in the graph."""
        return tuple(int(size) for size in self.axes.sizes[node].shape)

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensor arguments, those in lists included, in order."""
        return [node for node in self.node.all_input_nodes if isinstance(self.axes.sizes[node], torch.Tensor)]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the (first) output."""
        return tuple(int(size) for size in next(_tensors_in(self.axes.sizes[self.node])).shape)

    @cached_property
    def _place(self) -> str:
        line = user_line(self.node, own=True)
        return f"{self.node.name} ({self.node.target}){f' at {line}' if line else ''}"

    def why(self, what: str) -> str:
        """Return a reason: what, at which node, and the user's line."""
        return f"{what}, in {self._place}"

    def lock(self, ids: Ids | Sequence[Ids], what: str) -> None:
        """Lock labels, for a reason."""
        for one in [ids] if isinstance(ids, np.ndarray) else ids:
            if one.any():
                self.table.lock(one, self.why(what))

    def unify(self, left: Ids, right: Ids) -> None:
        """Say that two axes lose the same indices."""
        if left is right or not (left.any() or right.any()):
            return
        self.table.unify(left, right, self.why("meets an axis that keeps its size"))

    def split(self, ids: Ids, *shape: int) -> list[Ids]:
        """See an axis as several."""
        if not ids.any():
            return [np.zeros(size, np.int64) for size in shape]
        return self.table.split(ids.reshape(shape), self.why("splits an axis whose parts do not match"))

    def align(self, tensors: Sequence[AxisLabels], shape: Sequence[int]) -> AxisLabels:
        """Unify tensors that are broadcast to a shape, and return the labels of the result."""
        result: list[Ids] = []
        for axis, size in enumerate(shape):
            place = axis - len(shape)
            meeting = [t[place] for t in tensors if len(t) >= -place and len(t[place]) == size]
            for other in meeting[1:]:
                self.unify(meeting[0], other)
            labelled = next((ids for ids in meeting if ids.any()), None)
            result.append(labelled if labelled is not None else np.zeros(size, np.int64))
        return tuple(result)

    def count(self, axes: Sequence[Ids], constant: int = 1) -> None:
        """Note the MACs of a matrix product."""
        self.axes.macs.append(MacTerm(self.node, constant, tuple(axes)))


def _apply(call: Call, rule: Rule | None) -> Any:
    node, axes = call.node, call.axes
    if node.target is select:
        return _select(call)
    if node.op == "call_function" and not is_operator(node.target):
        source: Any = axes.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None  # pyright: ignore
        place: Any = node.args[1] if isinstance(source, list) else None
        return source[place] if isinstance(source, list) else None
    numbers = next(_tensors_in(axes.sizes[node]), None) is None
    if numbers and (rule is None or not call.tensors):
        known = not call.tensors or node.target is torch.ops.aten.sym_stride.int
        return None if known else _unknown(call, "a number that depends on data")
    if rule is None:
        return _unknown(call, "no rule describes this operation")
    try:
        result = rule(call)
    except Exception as error:  # a rule that meets what it was not made for: not knowing is locking
        return _unknown(call, f"its rule failed ({type(error).__name__}: {error})")
    if numbers:
        return None
    expected = [tuple(t.shape) for t in _tensors_in(axes.sizes[node])]
    given = [tuple(len(ids) for ids in value) for value in (result if isinstance(result, list) else [result])]
    return result if given == expected else _unknown(call, f"its rule gave {given} for {expected}")


def _select(call: Call) -> Any:
    """Train mode and eval mode compute the same thing in two ways."""
    train, evaluation = call.node.args[:2]
    ours: Any = call.axes.values.get(train) if isinstance(train, fx.Node) else None  # pyright: ignore
    theirs: Any = call.axes.values.get(evaluation) if isinstance(evaluation, fx.Node) else None  # pyright: ignore
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return call.align([ours, theirs], call.out_shape)
    return ours if ours is not None else theirs


def _unknown(call: Call, what: str) -> Any:
    for node in call.tensors:
        value = call.axes.values.get(node)
        for one in value if isinstance(value, list) else [value or ()]:
            call.lock(one, what)
    return _fixed(call.axes.sizes[call.node])


def _fixed(value: Any) -> Any:
    """Return the labels of a value whose axes all keep their size."""
    if isinstance(value, torch.Tensor):
        return tuple(np.zeros(int(size), np.int64) for size in value.shape)
    return [_fixed(item) for item in value] if isinstance(value, list | tuple) else None


def _state_labels(labels: Labels, tensor: torch.Tensor) -> AxisLabels:
    if not tensor.is_floating_point():
        return _fixed(tensor)
    return tuple(labels.fresh(n) if n > 1 else np.zeros(n, np.int64) for n in tensor.shape)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def _outputs(axes: Axes, output: fx.Node, free: Sequence[str]) -> list[tuple[str, AxisLabels]]:
    """Return name and labels of the outputs that keep their sizes."""
    leaves = pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    spec = output_spec_of(axes.graph_module.graph)
    tree = pytree.tree_unflatten(leaves, spec) if spec is not None else output.args[0]
    named = [(name, axes.values.get(leaf)) for name, leaf in named_outputs(tree) if isinstance(leaf, fx.Node)]
    for pattern in free:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ConfigError(f"free_outputs {pattern!r} matches no output: they are {[name for name, _ in named]}")
    return [
        (name, labels)
        for name, labels in named
        if isinstance(labels, tuple) and not any(fnmatchcase(name, pattern) for pattern in free)
    ]


def _sizes(graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
    flat = flat_inputs(graph_module, *graph_module.meta["example_inputs"])
    mode = fake_tensor_mode()
    inputs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, flat)
    interpreter = _Sizes(graph_module, mode)
    with torch.no_grad(), mode:
        interpreter.run(*inputs, enable_io_processing=False)
    return interpreter.found


class _Sizes(fx.Interpreter):
    """Runs a graph on tensors without data, and keeps what every node computes."""

    def __init__(self, module: fx.GraphModule, mode: Any) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._mode = mode
        self._state: dict[str, Any] = {}
        self.found: dict[fx.Node, Any] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self._state:
            value = super().get_attr(target, args, kwargs)
            self._state[target] = self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        return self._state[target]

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = value = super().run_node(n)
        return value
