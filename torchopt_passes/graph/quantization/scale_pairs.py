"""Which tensors make the channels of a value, and which alone read them: between the two a scale can be moved.

Dividing what makes the channels by a scale and multiplying what reads them by it changes nothing, wherever every path
between them commutes with a positive scale (`scale_flow.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes._compat import copy_graph
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.axes import Axes, base_name
from torchopt_passes.graph.batch_norm import BatchNorm, foldable_into
from torchopt_passes.graph.inplace import make_out_of_place
from torchopt_passes.graph.quantization.scale_flow import Axis, BlockedError, Bounded, Facts, Flow, Reader
from torchopt_passes.graph.weights import MATRIX_OPS, input_dim, parameter_behind

__all__ = ["Axis", "Reader", "Site", "find_sites"]


@dataclass(frozen=True, eq=False)
class Site:
    """A layer or norm, what its channels go into, and whether a scale can be moved between them.

    Args:
        name: fqn of the first tensor that makes the channels, or the node.
        node: name of the operation.
        size: number of channels.
        makers: what makes the channels: weight and bias.
        readers: what reads them.
        bounded: the ReLU6 on the way (none unless they were allowed).
        why_not: why no scale can be moved; empty when it can.
    """

    name: str
    node: str
    size: int
    makers: tuple[Axis, ...] = ()
    readers: tuple[Reader, ...] = ()
    bounded: tuple[Bounded, ...] = ()
    why_not: str = ""

    @property
    def fqns(self) -> tuple[str, ...]:
        """Everything that would be changed."""
        return tuple(axis.fqn for axis in (*self.makers, *(reader.axis for reader in self.readers)))

    @property
    def partners(self) -> str:
        """The weights that read the channels, for people."""
        return ", ".join(reader.axis.fqn for reader in self.readers)

    def per_channel(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Return the largest of what each reader tells about its input channels, for each channel; shape [size].

        Args:
            values: for each reader, shape [its input channels], not negative.
        """
        result = torch.zeros(self.size, dtype=values[0].dtype)
        for reader, value in zip(self.readers, values, strict=True):
            own = reader.index >= 0
            result = result.scatter_reduce(0, reader.index[own], value[own], "amax")
        return result


def find_sites(graph_module: fx.GraphModule, *, copies: bool = False, through_relu6: bool = False) -> list[Site]:
    """Return every layer and norm of a graph with what reads its channels, in order; touches nothing.

    Args:
        graph_module: a captured graph without fake-quantizers, with example inputs.
        copies: ask for channels that can be duplicated instead: every function of one value lets them through, norms
            over channels do not.
        through_relu6: let ReLU6 pass, as if it had no bound.

    Raises:
        ConfigError: the graph has no example inputs, or holds fake-quantizers.
    """
    if graph_module.meta.get("example_inputs") is None:
        raise ConfigError("the graph has no example inputs: capture(model, ...) keeps them")
    if any(node.op == "call_module" for node in graph_module.graph.nodes):
        raise ConfigError("the graph has fake-quantizers: this pass comes before InsertFakeQuant")
    sizes = {node.name: value for node, value in Axes(graph_module).sizes.items()}
    graph = copy_graph(graph_module.graph)
    make_out_of_place(graph)
    finder = _Finder(Facts(graph_module, graph, sizes), copies, through_relu6)
    return [site for node in graph.nodes for site in finder.sites_at(node)]


class _Finder:
    """Finds what makes channels, and follows them."""

    def __init__(self, facts: Facts, copies: bool, through_relu6: bool) -> None:
        self.facts, self.copies, self.through_relu6 = facts, copies, through_relu6

    def sites_at(self, node: fx.Node) -> Iterator[Site]:
        """Yield the site that a node starts, if it makes channels."""
        found = self._maker(node) if node.op == "call_function" else None
        if found is None:
            return
        makers, dim = found
        shape = tuple(int(size) for size in self.facts.sizes[node.name].shape)
        name, size = makers[0].fqn if makers else node.name, shape[dim]
        if not makers:
            yield Site(name, node.name, size, why_not=f"{base_name(node)} {node.name} has no weight of its own")
            return
        place = [1] * len(shape)
        place[dim] = size
        label = torch.arange(size).reshape(place).expand(shape)
        flow = Flow(self.facts, node, label, makers, copies=self.copies, through_relu6=self.through_relu6)
        try:
            flow.follow()
        except BlockedError as reason:
            yield Site(name, node.name, size, why_not=str(reason))
            return
        yield Site(name, node.name, size, tuple(flow.makers), tuple(flow.readers), tuple(flow.bounded))

    def _maker(self, node: fx.Node) -> tuple[list[Axis], int] | None:
        """Return what makes the channels of a node (nothing where it has no weight) and their dimension, or None."""
        if node.target in MATRIX_OPS:
            return self._matrix_maker(node)
        if self.copies:
            return None  # a norm's channels are copied with those of the layer in front of it
        norm = BatchNorm.of(node)
        if norm is not None:
            return (self.facts.axes(norm.gamma, norm.beta) if norm.gamma else [], 1)
        name = base_name(node)
        if name in ("layer_norm", "rms_norm", "group_norm"):
            weights: Any = (*node.args[2:4], None, None)
            weight, bias = weights[:2] if name != "rms_norm" else (weights[0], None)
            own = weight is not None and (name == "group_norm" or len(node.args[1]) == 1)  # pyright: ignore
            return (self.facts.axes(weight, bias) if own else [], 1 if name == "group_norm" else -1)
        if name == "mul" and (weight := self._scale_operand(node)) is not None:
            return self.facts.axes(weight), -1
        return None

    def _matrix_maker(self, node: fx.Node) -> tuple[list[Axis], int] | None:
        weight, bias = self.facts.operands(node)
        if weight is None:
            return None
        users = self.facts.users(node)
        norm = BatchNorm.of(users[0]) if len(users) == 1 else None
        if norm is not None and foldable_into(norm)[0] is not None and not self.copies:
            return None  # the batch norm behind it takes the scale
        dim, stored = input_dim(node, parameter_behind(weight) or ""), self.facts.stored(weight)
        convolution = "conv" in str(node.target)
        if dim is None or (stored.ndim != 2 and not convolution):
            return [], -1
        place = 1 - stored.ndim if convolution else -1
        if int(self.facts.sizes[node.name].shape[place]) != int(stored.shape[1 - dim]):
            return [], place  # a transposed convolution in groups
        return [Axis(self.facts.name(weight), 1 - dim), *(self.facts.axes(bias) if bias is not None else [])], place

    def _scale_operand(self, node: fx.Node) -> fx.Node | None:
        """Return the 1-D parameter by which a value is multiplied channel by channel, as RMS norms do."""
        for one, other in (node.args[:2], node.args[1::-1]):
            if isinstance(one, fx.Node) and one.op == "get_attr" and isinstance(other, fx.Node):
                weight, value = self.facts.sizes[one.name], self.facts.sizes[other.name]
                own = str(one.target) in self.facts.parameters and other.op != "get_attr"
                if own and weight.ndim == 1 < value.ndim and weight.shape[0] == value.shape[-1] > 1:
                    return one
        return None
