"""The oracle of removal: what the model computes once indices are gone, computed without removing any."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchopt_passes.errors import ConfigError, ProofError
from torchopt_passes.graph.axes import Axes, Mask, analyse_axes, base_name
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.surgery import Removal, removed_atoms
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.verify import Inputs, StateInterpreter, evaluate, first_difference, relative_error

__all__ = ["evaluate_masked", "verify_removal"]


def verify_removal(
    before: fx.GraphModule, after: fx.GraphModule, removal: Removal, inputs: Any = None, *, tolerance: float = 1e-9
) -> float:
    """Prove that a graph with indices removed computes what the graph before computes without them.

    In float64 and eval mode: in the graph before, every weight of what leaves is zero, and what is computed from a
    whole axis (norms, means) is computed from the indices that stay; then outputs must be equal.

    Args:
        before: the captured graph before; untouched.
        after: the same graph after the removal; untouched.
        removal: what was removed: (fqn, dimension) -> indices, see ``plan.removal()`` of a channel plan.
        inputs: in any form of a call; by default those the graph was captured with.
        tolerance: largest relative error of an output that is allowed.

    Returns:
        The largest relative error of the outputs.

    Raises:
        ProofError: they differ; names the first node that does.
        PlanError: the removal is not closed.

    Math:
        max|y - y'| / max|y'| <= tolerance for each output y, with y' the masked one.
    """
    call = as_call(inputs) if inputs is not None else before.meta.get("example_inputs")
    if call is None:
        raise ConfigError("verify_removal needs inputs: the graph has no example inputs")
    axes = analyse_axes(before)
    removed = removed_atoms(axes, removal)
    error = relative_error(evaluate(after, call), evaluate_masked(axes, removed, call))
    if error <= tolerance:
        return error
    expected: dict[str, Any] = {}
    actual: dict[str, Any] = {}
    evaluate_masked(axes, removed, call, record=expected)
    evaluate(after, call, record=actual)
    where = first_difference(expected, actual, before.graph, tolerance)
    raise ProofError(f"the pruned graph differs from the masked one by {error:.1e} (allowed {tolerance:g}): {where}")


def evaluate_masked(
    axes: Axes,
    removed: Mask,
    inputs: Inputs,
    *,
    dtype: torch.dtype | None = torch.float64,
    record: dict[str, Any] | None = None,
) -> list[Any]:
    """Run a graph as if indices were gone, and return its flat outputs, narrower where indices of them are gone.

    Args:
        axes: the analysis of the graph.
        removed: bool by label: the atoms that leave.
        inputs: positional and keyword arguments.
        dtype: see `evaluate`.
        record: when given, receives the value of every node by name, without the indices that leave.
    """
    module = axes.graph_module
    state = _masked_state(axes, removed)
    values: dict[str, Any] | None = None if record is None else {}
    outputs = evaluate(
        module,
        inputs,
        dtype=dtype,
        state=state,
        record=values,
        interpreter=partial(_Masked, axes, removed),  # pyright: ignore
    )
    leaves = pytree.tree_leaves(module.graph.output_node().args[0], is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    if len(leaves) == len(outputs):  # both modes return the same
        outputs = [
            _compact(axes, removed, leaf if isinstance(leaf, fx.Node) else None, value)
            for leaf, value in zip(leaves, outputs, strict=True)
        ]
    if record is not None and values is not None:
        nodes = {node.name: node for node in module.graph.nodes}
        record.update({name: _compact(axes, removed, nodes.get(name), value) for name, value in values.items()})
    return outputs


def _masked_state(axes: Axes, removed: Mask) -> Mapping[str, torch.Tensor]:
    masked: dict[str, torch.Tensor] = {}
    for fqn, labels in axes.tensors.items():
        kept = [axes.kept(ids, removed) for ids in labels]
        if not all(mask.all() for mask in kept):
            masked[fqn] = get_tensor(axes.graph_module, fqn).detach().clone()
            for dim, mask in enumerate(kept):
                if not mask.all():
                    masked[fqn].index_fill_(dim, torch.from_numpy(np.flatnonzero(~mask)).to(masked[fqn].device), 0)
    return {name: masked[first] for name, first in aliases(axes.graph_module).items() if first in masked}


def _compact(axes: Axes, removed: Mask, node: fx.Node | None, value: Any) -> Any:
    labels = axes.values.get(node) if node is not None else None
    if not isinstance(labels, tuple | list):
        return value
    pairs = zip(labels if isinstance(labels, list) else [labels], pytree.tree_leaves(value), strict=False)
    made = [_select(tensor, {d: axes.kept(ids, removed) for d, ids in enumerate(one)}) for one, tensor in pairs]
    return made if isinstance(labels, list) else made[0]


def _select(tensor: torch.Tensor, kept: Mapping[int, Mask]) -> torch.Tensor:
    for dim, mask in kept.items():
        if not mask.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    return tensor


def _spread(tensor: torch.Tensor, kept: Mapping[int, Mask]) -> torch.Tensor:
    """Put what was computed on the kept indices back in place, zeros elsewhere."""
    for dim, mask in kept.items():
        shape = [len(mask) if d == dim else size for d, size in enumerate(tensor.shape)]
        places = torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)
        tensor = tensor.new_zeros(shape).index_copy(dim, places, tensor)
    return tensor


class _Masked(StateInterpreter):
    """Runs a graph; what is computed from a whole axis is computed from the indices that stay."""

    def __init__(self, axes: Axes, removed: Mask, *args: Any) -> None:
        super().__init__(*args)
        nodes: dict[str, fx.Node] = {node.name: node for node in axes.statistics}
        self._kept: dict[str, dict[int, Mask]] = {}
        for name, node in nodes.items():
            source: Any = next(n for n in node.all_input_nodes)
            masks = {dim: axes.kept(axes.values[source][dim], removed) for dim in axes.statistics[node]}
            if not all(mask.all() for mask in masks.values()):
                self._kept[name] = masks
        self._blocks = {n.name: int(axes.kept(ids, removed).sum()) for n, ids in axes.groups.items()}
        self._running: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._running = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = self._running
        kept = self._kept.get(node.name) if node is not None else None
        if node is None or kept is None:
            result = super().call_function(target, args, kwargs)
            # a weight that is zero altogether has no direction
            return torch.nan_to_num(result) if node is not None and base_name(node) == "_weight_norm" else result
        name = base_name(node)
        args = list(args)
        args[0] = _select(args[0], kept)
        if name == "batch_norm":
            return _spread(super().call_function(target, tuple(args), kwargs), kept)
        if name not in ("layer_norm", "rms_norm", "group_norm"):
            return super().call_function(target, tuple(args), kwargs)
        if name == "group_norm":
            args[1] = self._blocks[node.name]
            places = {0: kept[1]}
        else:
            rank, first = args[0].ndim, args[0].ndim - len(args[1])
            places = {dim - first: mask for dim, mask in kept.items()}
            args[1] = list(args[0].shape[first:rank])
        for place in (2, 3):
            if place < len(args) and isinstance(args[place], torch.Tensor):
                args[place] = _select(args[place], places)
        return _spread(super().call_function(target, tuple(args), kwargs), kept)
