"""A weight that is stored as packed indices and a codebook, and computed from them in every forward.

The same few names hold it on the source module (a parametrization of ``torch.nn.utils.parametrize``) and in a captured
graph (the same operations as nodes). For ``fc.weight`` the state dict has, in place of ``fc.weight``:

- ``fc.parametrizations.weight.original0``: the codebook, float (groups, levels), a parameter that trains;
- ``fc.parametrizations.weight.0.indices``: the packed indices, uint8, a buffer;
- with outliers: ``fc.parametrizations.weight.original1``, their values (a parameter), and
  ``fc.parametrizations.weight.0.outliers``, their flat positions, int32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.codebooks import look_up
from torchopt_passes.functional.packing import unpack
from torchopt_passes.graph.state import get_state, remove_unused_state
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor

__all__ = [
    "CodebookWeight",
    "Layout",
    "decode",
    "share_codebook",
    "store_in_graph",
    "store_in_module",
    "stored_parameters",
]


@dataclass(frozen=True)
class Layout:
    """How the values of a weight lie in groups, each with levels of its own.

    Args:
        shape: of the weight.
        channel_dim: the dimension whose indices are groups; None for one group.
        group_size: so many values of a channel are a group; 0 for all of them. The last group of a channel is filled up
            with copies of its last value.
    """

    shape: tuple[int, ...]
    channel_dim: int | None = None
    group_size: int = 0

    @property
    def per_channel(self) -> int:
        """How many groups a channel has."""
        return -(-self._length // self.group_size) if self.group_size else 1

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return 1 if self.channel_dim is None else self.shape[self.channel_dim] * self.per_channel

    @property
    def size(self) -> int:
        """How many values a group has."""
        return self.group_size or self._length

    @property
    def padded(self) -> bool:
        """Whether the last groups are filled up."""
        return self.per_channel * self.size != self._length

    @property
    def _length(self) -> int:
        count = math.prod(self.shape)
        return count if self.channel_dim is None else count // max(self.shape[self.channel_dim], 1)

    def to_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as (groups, size).

        Example:
            >>> Layout((2, 3), channel_dim=0, group_size=2).to_rows(torch.arange(6).view(2, 3))
            tensor([[0, 1],
                    [2, 2],
                    [3, 4],
                    [5, 5]])
        """
        if self.channel_dim is None:
            return weight.reshape(1, -1)
        channels = weight.movedim(self.channel_dim, 0).reshape(self.shape[self.channel_dim], -1)
        if self.padded:
            missing = self.per_channel * self.size - self._length
            channels = torch.cat([channels, channels[:, -1:].expand(-1, missing)], dim=1)
        return channels.reshape(self.groups, self.size)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the weight of (groups, size): the inverse of `to_rows`."""
        if self.channel_dim is None:
            return rows.reshape(self.shape)
        channels = rows.reshape(self.shape[self.channel_dim], -1)
        if self.padded:
            channels = channels[:, : self._length]
        rest = [size for dim, size in enumerate(self.shape) if dim != self.channel_dim]
        return channels.reshape(self.shape[self.channel_dim], *rest).movedim(0, self.channel_dim)


def decode(
    codebook: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor | None = None,
    outliers: torch.Tensor | None = None,
    *,
    layout: Layout,
    bits: int,
    keep_zero: bool,
) -> torch.Tensor:
    """Return the weight that a codebook and indices stand for.

    Args:
        codebook: (groups, levels), floating.
        indices: packed, uint8.
        values: of the outliers, (m,), or None.
        outliers: flat positions of the outliers, (m,) int32, or None.
        layout: of the weight.
        bits: of an index.
        keep_zero: index 0 is zero, which is no part of the codebook: no training moves it.

    Example:
        >>> from torchopt_passes.functional.packing import pack
        >>> indices = pack(torch.tensor([0, 1, 2, 1]), bits=2)
        >>> decode(torch.tensor([[-1.0, 1.0]]), indices, layout=Layout((2, 2)), bits=2, keep_zero=True)
        tensor([[ 0., -1.],
                [ 1., -1.]])
    """
    levels = nn.functional.pad(codebook, (1, 0)) if keep_zero else codebook
    rows = unpack(indices, bits, layout.groups * layout.size).view(layout.groups, layout.size)
    weight = layout.from_rows(look_up(levels, rows))
    if values is None or outliers is None:
        return weight
    return weight.reshape(-1).index_copy(0, outliers.long(), values).view(layout.shape)


class CodebookWeight(nn.Module):
    """The parametrization of a weight by a codebook (and the values of outliers); the indices are fixed.

    Args:
        indices: packed, uint8.
        layout: of the weight.
        bits: of an index.
        levels: of the codebook, without the zero.
        keep_zero: index 0 is zero.
        outliers: flat positions, int32, or None.

    Math:
        w_i = c[a(i)], so dL/dc_k is the sum of dL/dw_i over the cluster a(i) = k.
    """

    indices: torch.Tensor
    outliers: torch.Tensor | None

    def __init__(
        self,
        indices: torch.Tensor,
        *,
        layout: Layout,
        bits: int,
        levels: int,
        keep_zero: bool,
        outliers: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        if outliers is not None:
            self.register_buffer("outliers", outliers)
        else:
            self.outliers = None
        self.layout, self.bits, self.levels, self.keep_zero = layout, bits, levels, keep_zero

    def forward(self, codebook: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight."""
        return decode(
            codebook,
            self.indices,
            values,
            self.outliers,
            layout=self.layout,
            bits=self.bits,
            keep_zero=self.keep_zero,
        )

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the codebook nearest to a dense weight, its clusters' means: assigning to the weight sets it."""
        rows = self.layout.to_rows(weight.detach())
        first = int(self.keep_zero)
        size = self.levels + first
        index = unpack(self.indices, self.bits, rows.numel()).view(rows.shape).long()
        sums = torch.zeros(len(rows), size, dtype=torch.float64, device=rows.device).scatter_add_(
            1, index, rows.double()
        )
        counts = torch.zeros_like(sums).scatter_add_(1, index, torch.ones_like(rows, dtype=torch.float64))
        codebook = (sums / counts.clamp(min=1))[:, first:].to(weight.dtype)
        if self.outliers is None:
            return (codebook,)
        return codebook, weight.detach().reshape(-1)[self.outliers.long()].clone()

    def extra_repr(self) -> str:
        """Describe it."""
        return f"shape={self.layout.shape}, bits={self.bits}, levels={self.levels}, keep_zero={self.keep_zero}"


def stored_parameters(fqn: str) -> tuple[str, str]:
    """Return the names of the codebook and of the values of outliers of a stored weight.

    Example:
        >>> stored_parameters("fc.weight")[0]
        'fc.parametrizations.weight.original0'
    """
    path, _, name = fqn.rpartition(".")
    prefix = f"{path}.parametrizations.{name}".removeprefix(".")
    return f"{prefix}.original0", f"{prefix}.original1"


def store_in_module(module: nn.Module, fqn: str, weight: CodebookWeight, tensors: Sequence[torch.Tensor]) -> None:
    """Replace a parameter of a module, under all its names, by a codebook.

    Args:
        module: the source module.
        fqn: the parameter.
        weight: made for it.
        tensors: the codebook, and the values of the outliers.
    """
    (owner, name), *others = _owners(module, fqn)
    parametrize.register_parametrization(owner, name, weight, unsafe=True)
    first: nn.Module = owner.parametrizations[name]  # pyright: ignore
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            first.get_parameter(f"original{index}").copy_(tensor)
    for other, attribute in others:
        share_codebook(first, other, attribute)


def share_codebook(first: nn.Module, owner: nn.Module, name: str) -> None:
    """Let another name of a tied weight have the codebook of its first name.

    Args:
        first: the parametrization under the first name.
        owner: the module that has the other name.
        name: the other name there; a parameter.
    """
    # Transformers leaves what a module names here out of its files: one of tied tensors stays
    owner._tied_weights_keys = {f"parametrizations.{name}": "of another module"}  # pyright: ignore
    parametrize.register_parametrization(owner, name, first.get_submodule("0"), unsafe=True)
    owner.parametrizations[name] = first  # pyright: ignore


def store_in_graph(
    graph_module: fx.GraphModule, fqn: str, weight: CodebookWeight, tensors: Sequence[torch.Tensor]
) -> None:
    """Replace a parameter of a captured graph, under all its names, by the operations that compute it.

    Args:
        graph_module: the captured graph; the caller lints and recompiles it.
        fqn: the parameter.
        weight: made for it.
        tensors: the codebook, and the values of the outliers.
    """
    graph, before = graph_module.graph, get_state(graph_module)
    parameter, names = get_tensor(graph_module, fqn), aliases(graph_module)
    reads = [n for n in graph.find_nodes(op="get_attr") if names.get(str(n.target)) == names[fqn]]
    if not reads:
        raise PlanError(f"the graph does not read {fqn}")
    holder = _holder(parameter, weight, tensors)
    for number, (owner, name) in enumerate(_owners(graph_module, fqn)):
        if "parametrizations" not in owner._modules:
            owner.add_module("parametrizations", nn.Module())
        owner.get_submodule("parametrizations").add_module(name, _twin(holder) if number else holder)
    prefix = stored_parameters(fqn)[0].removesuffix(".original0")
    state = {f"{prefix}.{name}": tensor.detach() for name, tensor in holder.named_parameters()}
    state |= {f"{prefix}.{name}": buffer for name, buffer in holder.named_buffers()}
    order = {node: position for position, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(reads, key=order.__getitem__)):
        computed = _insert(graph, weight, state)
    computed.meta |= {key: value for key, value in reads[0].meta.items() if key in ("val", "nn_module_stack")}
    for node in reads:
        node.replace_all_uses_with(computed)
        graph.erase_node(node)
    remove_unused_state(graph_module, before)


def _insert(graph: fx.Graph, weight: CodebookWeight, state: dict[str, torch.Tensor]) -> fx.Node:
    """Add the nodes that read the state and compute the weight; return the last."""
    names = list(state)
    # parameters come before buffers: codebook, values, indices, outliers
    places = (0, 1) if len(names) == 2 else (0, 2, 1, 3)
    arguments = tuple((tuple(t.shape), t.dtype, t.device) for t in (state[names[place]] for place in places))
    made: dict[fx.Node, fx.Node] = {}
    inputs = iter(places)
    for node in _traced(arguments, weight.layout, weight.bits, weight.keep_zero).nodes:
        if node.op == "output":
            return made[node.args[0]]
        if node.op == "placeholder":
            made[node] = graph.create_node("get_attr", names[next(inputs)])
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = {"val": node.meta["val"]}
    raise PlanError("the weight's computation has no output")


@lru_cache(maxsize=64)
def _traced(
    arguments: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...], layout: Layout, bits: int, keep_zero: bool
) -> fx.Graph:
    """Return the operations of `decode`; the layers of a model have few different shapes."""
    tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in arguments]
    compute = partial(decode, layout=layout, bits=bits, keep_zero=keep_zero)
    return make_fx(compute, tracing_mode="fake", pre_dispatch=True)(*tensors).graph


def _holder(parameter: torch.Tensor, weight: CodebookWeight, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """Return a bare module with the names that a parametrization has."""
    holder, inner = nn.Module(), nn.Module()
    for index, tensor in enumerate(tensors):
        value = tensor.to(parameter.device, parameter.dtype).clone()
        holder.register_parameter(f"original{index}", nn.Parameter(value, requires_grad=parameter.requires_grad))
    for name, buffer in weight.named_buffers():
        inner.register_buffer(name, buffer)
    holder.add_module("0", inner)
    return holder


def _twin(holder: nn.Module) -> nn.Module:
    """Return the holder for another name of a tied weight: the same parameters, and a copy of the indices.

    A captured graph clones tied parameters in its state dict, which safetensors wants, but not tied buffers.
    """
    other = nn.Module()
    other._parameters = dict(holder._parameters)
    other.add_module("0", copy.deepcopy(holder.get_submodule("0")))
    return other


def _owners(module: nn.Module, fqn: str) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold a parameter, and its names there: several when it is tied."""
    names = aliases(module)
    found = [find_owner(module, name) for name, first in names.items() if first == names[fqn]]
    return list(dict.fromkeys(found))
