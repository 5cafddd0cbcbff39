"""A test for your own model: is channel removal exact on it? Call it from pytest."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

from torchopt_passes.errors import TorchOptError
from torchopt_passes.graph.base import PassContext, PassResult
from torchopt_passes.graph.capture import CapturedModule, capture
from torchopt_passes.graph.pruning.prune_channels import PruneChannels, removal_of
from torchopt_passes.graph.removal_proof import verify_removal
from torchopt_passes.graph.saving import save_captured
from torchopt_passes.graph.verify import Inputs, evaluate, relative_error

__all__ = ["assert_removal_is_exact"]

_FRESH = """
import sys, torch
from safetensors.torch import save_file
from torchopt_passes.graph.saving import load_captured
from torchopt_passes.graph.verify import evaluate
graph = load_captured(sys.argv[1])
outputs = evaluate(graph, graph.meta["example_inputs"])
save_file({str(i): v.contiguous() for i, v in enumerate(outputs) if isinstance(v, torch.Tensor)}, sys.argv[2])
"""


def assert_removal_is_exact(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    pruning: PruneChannels | None = None,
    context: PassContext | None = None,
    tolerance: float = 1e-9,
) -> PassResult:
    """Prune a model and check all that a removal promises.

    The pruned graph equals the masked model in float64, on the inputs and on twice as many; train mode gives a finite
    gradient to every parameter that had one; eval mode after train mode is what it was; and a process that loads the
    saved graph computes the same.

    Args:
        model: your model; it is left as it is.
        args: positional example inputs.
        kwargs: keyword example inputs.
        pruning: how to prune; by default half of every group.
        context: data for it.
        tolerance: largest relative error against the masked model, in float64.

    Returns:
        The result of the pass, for more checks of your own.

    Raises:
        AssertionError: a promise is broken, or there is nothing to remove; says which.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> assert_removal_is_exact(model, (torch.randn(3, 4),)).report.modified
        True
    """
    pruning = pruning or PruneChannels(ratio=0.5)
    try:
        graph = capture(copy.deepcopy(model), args, kwargs)
        before = copy.deepcopy(graph)
        trained = _trained(before)
        result = pruning(graph, context)
        if not result.plan:
            raise AssertionError(f"nothing can be removed from {type(model).__name__}:\n{result.report}")
        inputs: Inputs = graph.meta["example_inputs"]
        for call in (inputs, _twice(inputs, graph)):
            verify_removal(before, graph, removal_of(result.plan), call, tolerance=tolerance)
    except TorchOptError as error:
        raise AssertionError(f"{type(model).__name__}: {error}") from error
    first = evaluate(graph, inputs)
    lost = [name for name in trained - _trained(graph) if name in dict(graph.named_parameters())]
    if lost:
        raise AssertionError(f"pruned, {lost[:3]} get no finite gradient of their shape in train mode")
    if relative_error(evaluate(graph, inputs), first) > 0.0:
        raise AssertionError("eval mode after train mode computes something else")
    error = relative_error(_in_fresh_process(graph), [value for value in first if isinstance(value, torch.Tensor)])
    if error > tolerance:
        raise AssertionError(f"saved and loaded in a new process, the outputs differ by {error:.1e}")
    return result


def _trained(graph: CapturedModule) -> set[str]:
    """Return the parameters that get a finite gradient of their own shape; nothing is changed."""
    twin = copy.deepcopy(graph).train()
    args, kwargs = twin.meta["example_inputs"]
    outputs = [v for v in pytree.tree_leaves(twin(*args, **kwargs)) if isinstance(v, torch.Tensor) and v.requires_grad]
    torch.autograd.backward([value.float().square().mean() for value in outputs])
    grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    return {n for n, g in grads.items() if g is not None and g.shape == shapes[n] and bool(g.isfinite().all())}


def _twice(inputs: Inputs, graph: CapturedModule) -> Inputs:
    """Return inputs of twice the batch, where the graph takes them."""
    dims = graph.meta["dynamic_dims"]
    if not all(0 in places for places in dims.values()):
        return inputs

    def double(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, value.flip(0)]) if value.ndim else value

    return pytree.tree_map_only(torch.Tensor, double, inputs)


def _in_fresh_process(graph: CapturedModule) -> list[torch.Tensor]:
    with tempfile.TemporaryDirectory() as made:
        folder, answer = Path(made) / "graph", Path(made) / "outputs.safetensors"
        save_captured(graph, folder)
        command = [sys.executable, "-c", _FRESH, str(folder), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"saved, it cannot be loaded in a new process: {done.stderr.strip()[-500:]}")
        outputs = load_file(answer)
    return [outputs[key] for key in sorted(outputs, key=int)]
