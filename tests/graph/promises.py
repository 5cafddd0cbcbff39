"""What `capture` promises, each promise one check that returns how far the graph is from the source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchopt_passes.graph.capture import CapturedModule, release

__all__ = [
    "copied",
    "deterministic",
    "drops",
    "in_eval",
    "in_train",
    "names_and_objects",
    "reference",
    "released",
    "two_steps",
]

Inputs = dict[str, Any]
Case = tuple[tuple[Any, ...], Inputs]


class _NoLayerDropDraws(TorchFunctionMode):
    """Transformers draws a number per layer to compare with ``layerdrop=0``; a graph has no use for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand and args in (([],), ((),)):
            return torch.tensor(1.0)
        return func(*args, **(kwargs or {}))


def reference(model: nn.Module) -> nn.Module:
    """Return a copy of the source to compare with; a cache of keys and values is no output of a graph."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    return twin


def in_eval(graph: nn.Module, source: nn.Module, case: Case) -> float:
    """Return the largest difference of the outputs in eval mode."""
    graph.eval()
    source.eval()
    with torch.no_grad():
        return distance(graph(*case[0], **case[1]), source(*case[0], **case[1]))


def deterministic(graph: nn.Module, case: Case) -> bool:
    """Return whether eval mode gives the same bits whatever the random state."""
    graph.eval()
    outputs: list[Any] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(graph(*case[0], **case[1]))
    return distance(*outputs) == 0


def in_train(graph: nn.Module, source: nn.Module, case: Case, *, seed: int = 3) -> tuple[float, float]:
    """Return the largest difference of the outputs, and of the gradients, in train mode with the same random numbers.

    Gradients are compared relative to the largest of the parameter, in units of 1 where that is smaller.
    """
    found: list[tuple[Any, dict[str, torch.Tensor]]] = []
    for model in (source, graph):
        model.train()
        model.zero_grad()
        output = _seeded(model, case, seed)
        scalar(output).backward()
        found.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (ours, our_grads), (theirs, their_grads) = found
    if our_grads.keys() != their_grads.keys():
        return distance(ours, theirs), float("inf")
    largest = [(a - their_grads[n]).abs().max() / a.abs().max().clamp(min=1) for n, a in our_grads.items()]
    return distance(ours, theirs), float(max(largest))


def drops(graph: nn.Module, case: Case) -> bool:
    """Return whether train mode, after eval mode, gives other outputs with other random numbers."""
    graph.eval()
    graph.train()
    with torch.no_grad(), _kept_buffers(graph):
        first = _seeded(graph, case, 0)
        # stochastic depth of a small batch may well draw the same twice
        return any(distance(first, _seeded(graph, case, seed)) > 0 for seed in range(1, 6))


def copied(graph: CapturedModule, case: Case) -> bool:
    """Return whether a deepcopy is the same model, alone: bits, ties and mode of its own."""
    graph.train()
    twin = copy.deepcopy(graph).eval()
    if any(a is b for a, b in zip(graph.parameters(), twin.parameters(), strict=True)):
        return False
    if not graph.training or _ties(graph) != _ties(twin) or [*graph.state_dict()] != [*twin.state_dict()]:
        return False
    graph.eval()
    with torch.no_grad():
        if distance(twin(*case[0], **case[1]), graph(*case[0], **case[1])) != 0:
            return False
        for parameter in twin.parameters():
            parameter.zero_()
    return any(bool(p.any()) for p in graph.parameters())


def two_steps(
    make: Callable[[nn.Module], torch.optim.Optimizer], graph: nn.Module, source: nn.Module, case: Case
) -> float:
    """Return the largest difference of parameters and buffers after two optimizer steps of both."""
    for model in (source, graph):
        model.train()
        optimizer = make(model)
        for seed in (5, 6):
            optimizer.zero_grad()
            scalar(_seeded(model, case, seed)).backward()
            optimizer.step()
        model.zero_grad()
    return distance(graph.state_dict(), source.state_dict())


def names_and_objects(graph: CapturedModule, model: nn.Module) -> bool:
    """Return whether the graph has the model's state: names, order aside, the same objects, and nothing more."""
    ours, theirs = dict(_tensors(graph)), dict(_tensors(model))
    extra = [n for n in ours if n not in theirs and n in graph.state_dict()]
    same = all(n in ours and ours[n] is t for n, t in theirs.items() if isinstance(t, nn.Parameter))
    buffers = all(
        n in ours and ours[n].data_ptr() == t.data_ptr() for n, t in theirs.items() if n in model.state_dict()
    )
    return not extra and same and buffers and set(graph.state_dict()) == set(model.state_dict())


def released(graph: CapturedModule, model: nn.Module, case: Case) -> bool:
    """Return whether `release` gives the source back, and it computes what the graph does."""
    graph.eval()
    source = release(graph)
    return source is model and in_eval(graph, reference(source), case) <= 1e-6


def scalar(output: Any) -> torch.Tensor:
    """Return the loss of an output, or the mean square of its floating tensors."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack([t.square().mean() for t in leaves]).sum()


def distance(left: Any, right: Any) -> float:
    """Return the largest absolute difference of two outputs; infinite when class, structure or shapes differ."""
    a, a_spec = pytree.tree_flatten(left)
    b, b_spec = pytree.tree_flatten(right)
    if type(left) is not type(right) or a_spec != b_spec:
        return float("inf")
    return max((_leaf_distance(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _leaf_distance(x: Any, y: Any) -> float:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return 0.0 if type(x) is type(y) and x == y else float("inf")
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if torch.equal(x, y):
        return 0.0
    return float(torch.nan_to_num((x.double() - y.double()).abs(), nan=float("inf")).max())


def _seeded(model: nn.Module, case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    with _NoLayerDropDraws():
        return model(*case[0], **case[1])


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    state = {n: b.clone() for n, b in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _ties(module: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)
