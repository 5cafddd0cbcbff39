"""How the channels of a value run through a graph, as far as a scale of each channel can be moved along with them.

Each channel gets a label, its number. Operations that only move values are run on the labels; operations that commute
with a positive scale of each channel let them through; where a weight reads them the path ends. Anything else blocks.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from torchopt_passes.graph.axes import base_name
from torchopt_passes.graph.batch_norm import BatchNorm
from torchopt_passes.graph.modes import select
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.tensors import aliases
from torchopt_passes.graph.weights import MATRIX_OPS, VIEW_OPS, input_dim, parameter_behind

__all__ = ["Axis", "BlockedError", "Bounded", "Facts", "Flow", "Reader", "upper_bound"]

_WORDS = {
    "moves": "view _unsafe_view reshape flatten unflatten permute transpose t squeeze unsqueeze expand slice select "
    "split split_with_sizes chunk unbind repeat repeat_interleave cat stack movedim roll flip pixel_shuffle "
    "channel_shuffle",
    "scaled": "relu leaky_relu dropout feature_dropout contiguous alias detach clone to neg",
    "functions": "relu6 hardtanh clamp clamp_min gelu silu mish elu selu celu sigmoid tanh softplus hardswish "
    "hardsigmoid",
    "pools": "max_pool avg_pool adaptive_avg_pool adaptive_max_pool upsample_nearest upsample_bilinear",
}
_MOVES, _SCALED, _FUNCTIONS, _POOLS = (frozenset(words.split()) for words in _WORDS.values())
_CLIPS: dict[str, tuple[Any, Any]] = {"relu6": (0, 6), "hardtanh": (-1, 1), "clamp": (None, None)}
_KEEP_NUMBERS = frozenset(("permute", "transpose", "flatten", "squeeze"))  # no size of channels stands in these


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter or buffer that holds channels.

    Args:
        fqn: its dotted name (the first one of a tied tensor).
        dim: the dimension.
        groups: blocks of dimension 0 that each hold their own part of the channels in `dim` (a grouped convolution's
            input channels).
    """

    fqn: str
    dim: int
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix operation that reads the channels.

    Args:
        node: its name.
        value: name of the node whose value it reads.
        read_dim: dimension of the channels in that value, from the end.
        axis: where its weight holds them.
        index: int64, shape [its input channels]: the channel that each of them is; -1 for one of another layer.
    """

    node: str
    value: str
    read_dim: int
    axis: Axis
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class Bounded:
    """A ReLU6 on the way of the channels.

    Args:
        node: its name.
        index: int64, the channel of each element, with sizes of 1 where it is the same; -1 for another layer's.
    """

    node: str
    index: torch.Tensor


class BlockedError(Exception):
    """A label meets something that no scale passes; says what."""


class Facts:
    """What is known of a graph before any channel is followed.

    Args:
        graph_module: owner of the parameters.
        graph: its graph with in-place ops replaced.
        sizes: name of a node -> what it computes on the example inputs: tensors without data, and numbers.
    """

    def __init__(self, graph_module: fx.GraphModule, graph: fx.Graph, sizes: dict[str, Any]) -> None:
        self.sizes = sizes
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.first = aliases(graph_module)
        self.parameters = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
        self.reads: dict[str, set[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            self.reads.setdefault(self.name(node), set()).update(self.users(node))

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Return what reads a node's numbers: not its size or its metadata, and not what nothing reads."""
        users = [u for u in node.users if u.op == "output" or _has_tensor(self.sizes[u.name])]
        return [u for u in users if u.op == "output" or u.users]

    def name(self, node: fx.Node) -> str:
        """Return the fqn of the parameter or buffer behind a node."""
        fqn = parameter_behind(node) or ""
        return self.first.get(fqn, fqn)

    def stored(self, weight: fx.Node) -> torch.Tensor:
        """Return the size of the parameter behind the views of a weight."""
        while weight.target in VIEW_OPS:
            weight = weight.args[0]  # pyright: ignore[reportAssignmentType]
        return self.sizes[weight.name]

    def operands(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """Return the weight and bias of a matrix operation; no weight when it is none, or on the left-hand side."""
        operands = KINDS[node.target]
        weight = node.args[operands.weight]
        if not isinstance(weight, fx.Node) or parameter_behind(weight) not in self.parameters:
            return None, None
        bias = node.args[operands.bias] if operands.bias is not None and operands.bias < len(node.args) else None
        return weight, bias if isinstance(bias, fx.Node) else None

    def axes(self, *nodes: Any) -> list[Axis]:
        """Return the channels of 1-D tensors; none when one of them is computed: it cannot be scaled."""
        found = [node for node in nodes if isinstance(node, fx.Node)]
        return [] if any(node.op != "get_attr" for node in found) else [Axis(self.name(node), 0) for node in found]


class Flow:
    """The channels of one value on their way, until weights read all of them.

    Args:
        facts: of the graph.
        start: the node that makes the channels.
        label: int64, as large as its value: the channel of each element.
        makers: what makes them; grows by what is added or multiplied on the way.
        copies: ask for channels that can be duplicated instead of scaled.
        through_relu6: let ReLU6 pass, as if it were ReLU.
    """

    def __init__(
        self,
        facts: Facts,
        start: fx.Node,
        label: torch.Tensor,
        makers: list[Axis],
        *,
        copies: bool,
        through_relu6: bool,
    ) -> None:
        self.facts, self.makers = facts, makers
        self._copies, self._through_relu6 = copies, through_relu6
        self._labels: dict[fx.Node, Any] = {start: label}
        self.readers: list[Reader] = []
        self.bounded: list[Bounded] = []
        self._start = start

    def follow(self) -> None:
        """Follow the channels to their readers.

        Raises:
            BlockedError: something on the way does not let a scale through.
        """
        order = self.facts.order
        pending = [(order[user], user) for user in self.facts.users(self._start)]
        heapq.heapify(pending)
        done: set[fx.Node] = set()
        while pending:
            _, node = heapq.heappop(pending)
            if node in done:
                continue
            done.add(node)
            label = self._step(node)
            if label is not None:
                self._labels[node] = label
                for user in self.facts.users(node):
                    heapq.heappush(pending, (order[user], user))
        if not self.readers:
            raise BlockedError("nothing reads its channels")
        self._check()

    def _check(self) -> None:
        """Refuse tensors that anything else reads: tied weights, modules that are called twice."""
        names = [axis.fqn for axis in self.makers] + [reader.axis.fqn for reader in self.readers]
        for name in names:
            if len(self.facts.reads[name]) > 1:
                raise BlockedError(f"{name} is used more than once: tied, or its module is called twice")
        if len(set(names)) != len(names):
            raise BlockedError(f"{next(n for n in names if names.count(n) > 1)} both makes and reads its channels")

    def _step(self, node: fx.Node) -> Any:
        """Return the labels of what a node computes; None when it is a reader and the path ends here."""
        if node.op == "output":
            raise BlockedError("its channels are an output of the model")
        name = base_name(node)
        labels = [self._labels[parent] for parent in node.all_input_nodes if parent in self._labels]
        shape: Any = getattr(self.facts.sizes[node.name], "shape", None)
        if node.target is operator.getitem:
            return labels[0][node.args[1]]
        if node.target in MATRIX_OPS and self._read(node):
            return None
        if node.target is select:
            return self._agreed(labels, node) if len(labels) == 2 else self._blocked(node)
        if name in _SCALED or (name in _FUNCTIONS and self._copies):
            return labels[0]
        if self._through_relu6 and upper_bound(node) is not None:
            self.bounded.append(Bounded(node.name, _narrowed(labels[0])))
            return labels[0]
        if name == "minimum" and not self._copies and self._has_bounds(node, labels[0]):
            return labels[0]
        if name in _MOVES:
            return self._move(node, name)
        pool = name.rstrip("123d")
        if pool in _POOLS:
            spatial = int(name.removeprefix(pool)[0])
            return _one_position(labels[0], range(-spatial, 0), node).expand(shape)
        if name in ("mean", "constant_pad_nd", "pad"):
            return self._positions(node, labels[0], name, shape)
        norm = BatchNorm.of(node) if self._copies else None
        if norm is not None and norm.statistics is not None:
            self.makers += self.facts.axes(norm.gamma, norm.beta, *norm.statistics)
            return labels[0]
        if name in ("mul", "div", "add", "sub") and shape is not None:
            return self._arithmetic(node, name).expand(shape)
        if name in ("matmul", "bmm", "scaled_dot_product_attention") and not self._copies:
            return self._attended(node, name)
        return self._blocked(node)

    def _blocked(self, node: fx.Node) -> Any:
        raise BlockedError(f"its channels go into {base_name(node)} ({node.name}), which no scale passes")

    def _read(self, node: fx.Node) -> bool:
        value = node.args[KINDS[node.target].activation]
        weight, _ = self.facts.operands(node)
        if weight is None or not isinstance(value, fx.Node) or value not in self._labels:
            return False
        dim, stored = input_dim(node, parameter_behind(weight) or ""), self.facts.stored(weight)
        if dim is None:
            raise BlockedError(f"the weight of {node.name} is reshaped on its way")
        convolution = "conv" in str(node.target)
        read = 1 - stored.ndim if convolution else -1
        rows = self._labels[value].movedim(read, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if not bool((rows == rows[:1]).all()):
            raise BlockedError(f"{node.name} reads different channels at different positions")
        index = rows[0].clone()
        if convolution and dim == 0 and len(index) != stored.shape[0]:
            raise BlockedError(f"{node.name} is a transposed convolution in groups")
        if not convolution and stored.ndim != 2:
            raise BlockedError(f"the weight of {node.name} is a stack of matrices")
        groups = len(index) // int(stored.shape[1]) if convolution and dim == 1 else 1
        axis = Axis(self.facts.name(weight), dim, groups)
        self.readers.append(Reader(node.name, value.name, read, axis, index))
        return True

    def _move(self, node: fx.Node, name: str) -> Any:
        """Run the operation on labels; what other layers make is -1."""
        if self._copies and name not in _KEEP_NUMBERS:
            raise BlockedError(f"the sizes in {name} ({node.name}) would have to change")

        def value(parent: fx.Node) -> Any:
            size = self.facts.sizes[parent.name]
            if parent in self._labels:
                return self._labels[parent]
            return torch.full(size.shape, -1) if isinstance(size, torch.Tensor) else size

        run: Any = torch.reshape if name in ("view", "_unsafe_view") else node.target
        return run(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def _positions(self, node: fx.Node, label: torch.Tensor, name: str, shape: Any) -> torch.Tensor:
        """Pass a mean over positions, or zeros around them."""
        if name == "mean":
            dims: Any = node.args[1] if len(node.args) > 1 else None
            if dims is None:
                return self._blocked(node)
            first = _one_position(label, dims, node)
            return first.expand(shape) if len(shape) == label.ndim else first.squeeze(tuple(dims))
        rest = node.args[2:]
        mode, fill = (
            ("constant", (rest or (0,))[0]) if name == "constant_pad_nd" else (*rest, *("constant", 0)[len(rest) :])
        )
        if mode != "constant" or fill not in (0, None):
            return self._blocked(node)
        changed = [dim for dim, size in enumerate(shape) if size != label.shape[dim]]
        return _one_position(label, changed, node).expand(shape)

    def _arithmetic(self, node: fx.Node, name: str) -> torch.Tensor:
        left, right = (self._labels.get(n) if isinstance(n, fx.Node) else None for n in node.args[:2])
        label = left if left is not None else right
        if left is not None and right is not None:
            if name in ("add", "sub"):
                return self._agreed([left, right], node)
            raise BlockedError(f"{name} ({node.name}) multiplies its channels with each other")
        if self._copies or label is None:
            raise BlockedError(f"its channels meet another value in {name} ({node.name})")
        if name == "mul" or (name == "div" and left is not None):
            return label
        other = node.args[1] if left is not None else node.args[0]
        if name == "add" and isinstance(other, fx.Node) and other.op == "get_attr":
            place = torch.arange(label.shape[-1]).expand(label.shape)
            if self.facts.sizes[other.name].shape == label.shape[-1:] and torch.equal(label, place):
                self.makers += self.facts.axes(other)  # a bias that is added apart
                return label
        what = "a sum with others" if name in ("add", "sub") and isinstance(other, fx.Node) else name
        raise BlockedError(f"its channels go into {what} ({node.name}), which no scale passes")

    def _has_bounds(self, node: fx.Node, label: torch.Tensor) -> bool:
        """Whether a minimum is with a buffer of one bound for each channel, which then makes the channels too."""
        other = node.args[1]
        if not isinstance(other, fx.Node) or other.op != "get_attr":
            return False
        index = _narrowed(label)
        own = index.numel() == index.shape[0] and torch.equal(index.flatten(), torch.arange(len(index)))
        if not own or self.facts.sizes[other.name].shape != index.shape:
            return False
        self.makers.append(Axis(self.facts.name(other), 0))
        return True

    def _attended(self, node: fx.Node, name: str) -> torch.Tensor:
        """Follow the values of attention: a weighted mean over positions."""
        value: Any = node.args[2 if name == "scaled_dot_product_attention" else 1]
        if [parent for parent in node.all_input_nodes if parent in self._labels] != [value]:
            raise BlockedError(f"its channels are multiplied with other activations by {name} ({node.name})")
        label = _one_position(self._labels[value], (-2,), node)
        shape = self.facts.sizes[node.name].shape
        if name == "scaled_dot_product_attention" and label.shape[-3] != shape[-3]:
            label = label.repeat_interleave(shape[-3] // label.shape[-3], dim=-3)
        return label.expand(shape)

    def _agreed(self, labels: list[torch.Tensor], node: fx.Node) -> torch.Tensor:
        if labels[0].shape != labels[1].shape or not torch.equal(labels[0], labels[1]):
            raise BlockedError(f"its channels meet others of its own in {base_name(node)} ({node.name})")
        return labels[0]


def upper_bound(node: fx.Node) -> float | None:
    """Return u of an operation that computes min(max(x, 0), u), as ReLU6 does; None for any other."""
    name = base_name(node)
    if name not in _CLIPS or str(node.target).endswith(".Tensor"):
        return None
    given = (*node.args[1:3], *_CLIPS[name][len(node.args) - 1 :])
    low, high = (node.kwargs.get(key, value) for key, value in zip(("min", "max"), given, strict=True))
    return float(high) if low == 0 and isinstance(high, int | float) and high > 0 else None


def _narrowed(label: torch.Tensor) -> torch.Tensor:
    """Return labels with a size of 1 in each dimension along which they are the same, without such leading ones."""
    for dim in range(label.ndim):
        first = label.narrow(dim, 0, 1)
        label = first if bool((label == first).all()) else label
    while label.ndim > 1 and label.shape[0] == 1:
        label = label[0]
    return label


def _one_position(label: torch.Tensor, dims: Any, node: fx.Node) -> torch.Tensor:
    """Return labels at one index of some dimensions, along which they must be the same."""
    for dim in [dims] if isinstance(dims, int) else dims:
        first = label.narrow(dim, 0, 1)
        if not bool((label == first).all()):
            raise BlockedError(f"{base_name(node)} ({node.name}) mixes its channels")
        label = first
    return label


def _has_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_tensor(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, torch.Tensor)
