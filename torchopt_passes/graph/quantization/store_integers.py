"""StoreIntegers: the edit that stores a weight as integers: torchao's tensors in a source, operations in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import integer_weight, tell_transformers
from torchopt_passes.errors import PlanError
from torchopt_passes.functional.groupwise import GroupGrid, group_bounds
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.state import free_name, store
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor

__all__ = ["StoreIntegers"]

aten = torch.ops.aten


class StoreIntegers(Edit):
    """Store a weight as integers, with a scale and a zero point for each group of each row: w = s (q - z).

    On the source module it becomes a tensor of torchao's under every name it has (tied weights stay tied), which runs
    in ``nn.Linear`` and ``nn.Embedding``; a Transformers model is told, so that ``save_pretrained`` and
    ``from_pretrained`` work. On a captured graph it becomes an int8 buffer of its name, with ``<name>_scale`` (and
    ``<name>_zero_point``) beside it, and operations that compute it.

    Args:
        integers: int8, shape of the weight; within `bits`.
        scale: shape [out, groups].
        zero_point: shape [out, groups]; None for a symmetric grid.
        bits: 2 to 8.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    bits: int
    zero_point: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns in a group."""
        return self.integers.shape[1] // self.scale.shape[1]

    def check(self) -> None:
        """Refuse tensors that do not belong together."""
        q, scale = self.integers, self.scale
        if q.dtype is not torch.int8 or q.ndim != 2 or q.numel() == 0:
            raise PlanError(f"{self.target}: the integers must be int8 in two dimensions, not {q.dtype} in {q.ndim}")
        if not 2 <= self.bits <= 8:
            raise PlanError(f"{self.target}: bits must be 2 to 8, not {self.bits}")
        low, high = group_bounds(self.bits)
        if int(q.min()) < low or int(q.max()) > high:
            raise PlanError(f"{self.target}: integers from {int(q.min())} to {int(q.max())} are no {self.bits} bits")
        if scale.ndim != 2 or len(scale) != len(q) or not scale.shape[1] or q.shape[1] % scale.shape[1]:
            raise PlanError(f"{self.target}: scales of shape {tuple(scale.shape)} do not fit {tuple(q.shape)}")
        if self.zero_point is not None and self.zero_point.shape != scale.shape:
            raise PlanError(f"{self.target}: zero points must have the shape of the scales, {tuple(scale.shape)}")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that weight, of another shape, or one that is no weight of a linear or embedding."""
        weight = get_tensor(module, self.target)
        if tuple(weight.shape) != tuple(self.integers.shape):
            raise PlanError(f"{self.target} has shape {tuple(weight.shape)}, its integers {tuple(self.integers.shape)}")
        if not weight.is_floating_point():
            raise PlanError(f"{self.target} is stored as {weight.dtype} already")
        if isinstance(module, fx.GraphModule):
            return
        for owner, name in self._owners(module):
            if not isinstance(owner, nn.Linear | nn.Embedding) or name != "weight":
                raise PlanError(
                    f"{self.target} belongs to a {type(owner).__name__}: only nn.Linear and nn.Embedding run it"
                )

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Any]) -> None:
        """Store them all."""
        for edit in edits:
            if isinstance(module, fx.GraphModule):
                edit._into_graph(module)
            else:
                edit._into_module(module)
        if not isinstance(module, fx.GraphModule):
            tell_transformers(module, edits[0].bits, edits[0].group_size)

    def grid(self) -> GroupGrid:
        """Return the grid of the integers."""
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        return GroupGrid(self.scale, zero, *group_bounds(self.bits), self.group_size)

    def value(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that they stand for."""
        zero = 0 if self.zero_point is None else self.zero_point.to(dtype).unsqueeze(-1)
        groups = self.integers.to(dtype).unflatten(1, (-1, self.group_size))
        return ((groups - zero) * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def _owners(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        first = aliases(module)
        mine = first.get(self.target)
        return [find_owner(module, name) for name, other in first.items() if other == mine]

    def _into_module(self, module: nn.Module) -> None:
        weight, owners = get_tensor(module, self.target), self._owners(module)
        in_embedding = any(isinstance(owner, nn.Embedding) for owner, _ in owners)
        stored = integer_weight(
            self.integers.to(weight.device),
            self.scale.to(weight.device),
            None if self.zero_point is None else self.zero_point.to(weight.device),
            bits=self.bits,
            dtype=weight.dtype,
            in_linear=not in_embedding,
        )
        parameter = nn.Parameter(stored, requires_grad=False)
        for owner, name in owners:
            owner._parameters[name] = parameter

    def _into_graph(self, graph_module: fx.GraphModule) -> None:
        weight, first = get_tensor(graph_module, self.target), aliases(graph_module)
        names = [name for name, other in first.items() if other == first[self.target]]
        readers = [node for node in graph_module.graph.find_nodes(op="get_attr") if node.target in names]
        for owner, name in self._owners(graph_module):
            owner._parameters.pop(name, None)
        store(graph_module, self.target, self.integers.to(weight.device), parameter=False)
        extra: list[str] = []
        for suffix, tensor in (("scale", self.scale), ("zero_point", self.zero_point)):
            if tensor is not None:
                extra.append(free_name(graph_module, f"{self.target}_{suffix}"))
                value = tensor.to(device=weight.device, dtype=weight.dtype).unsqueeze(-1)
                store(graph_module, extra[-1], value, parameter=False)
        for node in readers:
            self._compute(graph_module.graph, node, weight.dtype, extra)

    def _compute(self, graph: fx.Graph, node: fx.Node, dtype: torch.dtype, extra: list[str]) -> None:
        rows, columns = self.integers.shape
        value: Any = node.meta.get("val")
        with graph.inserting_before(node):
            stored = graph.get_attr(self.target)
            scale, *zero_point = [graph.get_attr(name) for name in extra]
            steps = [(aten.to.dtype, (dtype,)), (aten.view.default, ([rows, -1, self.group_size],))]
            steps += [(aten.sub.Tensor, (zero,)) for zero in zero_point]
            steps += [(aten.mul.Tensor, (scale,)), (aten.view.default, ([rows, columns],))]
            last = stored
            for target, args in steps:
                last = graph.call_function(target, (last, *args))
                last.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
                if value is not None:
                    grouped = value.view(rows, -1, self.group_size)
                    last.meta["val"] = (
                        value if target is aten.to.dtype or last.args[1:] == ([rows, columns],) else grouped
                    )
            if value is not None:
                stored.meta["val"] = value.to(torch.int8)
                for extra_node in (scale, *zero_point):
                    extra_node.meta["val"] = value.view(rows, -1, self.group_size)[..., :1]
        node.replace_all_uses_with(last)
        graph.erase_node(node)
