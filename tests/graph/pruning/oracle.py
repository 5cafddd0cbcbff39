"""The oracle of removal, independent of the library: the unpruned eager model in which what left counts for nothing.

What leaves is set to zero in a float64 copy of the model, and what spans channels (see `Keeping`) computes over the
others alone. That is the smaller model exactly, as long as every removed channel meets a weight, or another zero: the
blocks of random networks are made so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import torchopt_passes as top
from tests.graph.pruning.norms import Keeping
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.verify import evaluate

__all__ = ["TOLERANCE", "Pruned", "Removed", "check_removal", "difference", "removed_indices", "tensors", "without"]

TOLERANCE = 1e-9
Removed = dict[tuple[str, int], set[int]]
"""(fqn, dimension) -> the indices that leave."""


@dataclass(frozen=True)
class Pruned:
    """What one removal was.

    Args:
        groups: all groups that were found.
        units: that could leave.
        removed: that left.
        error: largest relative error of the outputs, both batch sizes.
    """

    groups: tuple[ChannelGroup, ...]
    units: int
    removed: int
    error: float


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by every name they have."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def removed_indices(edits: Iterable[Any]) -> Removed:
    """Return what the removals among a plan's edits remove."""
    removed: Removed = {}
    for edit in edits:
        if edit.kind == "remove_indices":
            removed.setdefault((edit.target, edit.dim), set()).update(edit.indices)
    return removed


def without(model: nn.Module, removed: Removed) -> nn.Module:
    """Return a float64 copy of the model, in eval mode, in which the removed indices count for nothing."""
    twin = copy.deepcopy(model).double().eval()
    state = tensors(twin)
    gone = {(id(state[fqn]), dim): sorted(indices) for (fqn, dim), indices in removed.items() if fqn in state}
    for module in twin.modules():
        if isinstance(module, Keeping):
            tensor, dim = module.axis()
            left = gone.get((id(tensor), dim))
            if left:
                kept = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill_(0, torch.tensor(left), False)
                module.kept = kept.nonzero().flatten()
    with torch.no_grad():
        for (fqn, dim), indices in removed.items():
            # a tensor that only the graph has is a constant of it; integers are positions, which are renumbered
            if fqn in state and state[fqn].is_floating_point():
                state[fqn].index_fill_(dim, torch.tensor(sorted(indices)), 0.0)
    return twin


def difference(actual: Any, expected: Any) -> float:
    """Return the largest max|a - b| / max|b| of two equal lists of tensors; infinite where shapes differ or NaN."""
    error = 0.0
    actual, expected = [y.detach().double() for y in _flat(actual)], [y.detach().double() for y in _flat(expected)]
    if len(actual) != len(expected):
        return float("inf")
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        error = max(error, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6))
    return error


def check_removal(
    model: nn.Module,
    inputs_of: Callable[[int], tuple[torch.Tensor, ...]],
    batch: int,
    choose: Callable[[Sequence[ChannelGroup]], Mapping[str, Sequence[int]]],
) -> Pruned:
    """Capture, find groups, remove units of them, and compare with the oracle; asserts.

    Args:
        inputs_of: example inputs by batch size.
        batch: the size to capture with.
        choose: the units that stay, by name of the group; the groups it does not name stay whole.
    """
    original, inputs = copy.deepcopy(model), inputs_of(batch)
    graph = top.capture(model, inputs, prove=False)
    before = {name: tuple(tensor.shape) for name, tensor in tensors(graph).items()}
    groups = tuple(top.find_channel_groups(graph))
    units = sum(group.size for group in groups if group.locked is None)
    keep = {name: tuple(staying) for name, staying in choose(groups).items()}
    if not keep:
        return Pruned(groups, units, 0, 0.0)
    plan = top.PruneChannels(keep=keep)(graph, top.PassContext()).plan
    removed = removed_indices(plan.edits)
    assert removed == _asked(groups, keep), "the plan removes something else than what was asked for"
    _check_shapes(graph, before, removed)
    oracle = without(original, removed)
    sizes = [batch, batch + 1] if 0 in graph.meta["dynamic_dims"].get("x", ()) else [batch]
    error = 0.0
    for size in sizes:
        args = inputs_of(size)
        with torch.no_grad():
            expected = oracle(*[x.double() if x.is_floating_point() else x for x in args])
            error = max(error, difference(evaluate(graph, (args, {})), expected))
            assert error <= TOLERANCE, f"batch {size}: relative error {error:.1e}"
            assert difference(graph.eval()(*args), expected) < 1e-2, f"batch {size}: wrong in float32"
    _check_training(graph, inputs)
    left = sum(group.size - len(keep[group.name]) for group in groups if group.name in keep)
    return Pruned(groups, units, left, error)


def _asked(groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> Removed:
    asked: Removed = {}
    for group in groups:
        for unit in set(group.units) - set(keep.get(group.name, group.units)):
            for part in group.slices[unit]:
                asked.setdefault((part.fqn, part.dim), set()).update(part.indices)
    return asked


def _check_shapes(graph: nn.Module, before: dict[str, tuple[int, ...]], removed: Removed) -> None:
    after = {name: tuple(tensor.shape) for name, tensor in tensors(graph).items()}
    for (fqn, dim), indices in removed.items():
        assert after[fqn][dim] == before[fqn][dim] - len(indices), f"{fqn}: {before[fqn]} became {after[fqn]}"


def _check_training(graph: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    graph.train()
    graph.zero_grad()
    loss = sum(y.square().mean() for y in _flat(graph(*inputs)))
    assert isinstance(loss, torch.Tensor)
    if not loss.requires_grad:
        return  # a network without parameters
    loss.backward()
    for name, parameter in graph.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        assert grad.shape == parameter.shape and bool(grad.isfinite().all()), f"{name}: wrong gradient"


def _flat(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
