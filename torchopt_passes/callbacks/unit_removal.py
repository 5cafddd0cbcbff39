"""Masked units leave a trained model for good, and the proof that they did nothing in it any more."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchopt_passes.callbacks.sharded import is_sharded
from torchopt_passes.callbacks.unit_groups import UnitGroup
from torchopt_passes.errors import CallbackError, ConfigError, PlanError
from torchopt_passes.graph.axes import analyse_axes
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.prune_channels import PruneChannels, removal_of
from torchopt_passes.graph.removal_proof import evaluate_masked
from torchopt_passes.graph.snapshot import Snapshot
from torchopt_passes.graph.surgery import removed_atoms
from torchopt_passes.graph.tracing import no_cache
from torchopt_passes.graph.verify import Inputs, evaluate, in_eval_mode, relative_error

__all__ = ["graph_of", "inputs_of", "rehearse_removal", "remove_units"]

logger = logging.getLogger(__name__)

Masks = Mapping[UnitGroup, torch.Tensor]
"""Each group that loses units -> bool, shape (group.size,), True for a unit that stays."""

_GRAPH_TOLERANCE, _SOURCE_TOLERANCE, _OWN_TOLERANCE = 1e-9, 1e-5, 1e-3


def inputs_of(model: nn.Module, given: Any) -> Inputs:
    """Return example inputs of a model, on its device.

    Args:
        model: the student.
        given: in any form of a call; None for those of a captured graph.

    Raises:
        ConfigError: there are none.
    """
    if given is None and isinstance(model, fx.GraphModule):
        given = model.meta.get("example_inputs")
    if given is None:
        raise ConfigError(
            f"to find the channel groups of a {type(model).__name__}, give example_inputs=: a batch, as the model is "
            "called with it"
        )
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), as_call(given))


def graph_of(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the graph of a model under training, with its very parameters: itself, where it is one.

    Raises:
        CaptureError: it cannot be captured.
        CallbackError: it is sharded.
    """
    if any(map(is_sharded, model.parameters())):
        raise CallbackError(
            "units cannot leave a model whose weights are in parts on several ranks (fully_shard): train it with "
            "DistributedDataParallel, or prune it before it is sharded"
        )
    if isinstance(model, fx.GraphModule):
        return model
    with _bare(model):
        return capture(model, *inputs, dynamic=False)  # used on these inputs alone, and open sizes take twice as long


def rehearse_removal(model: nn.Module, graph_module: fx.GraphModule, masks: Masks, inputs: Inputs) -> None:
    """Mask units in a copy of a model and remove them, so that what cannot be done is known before training.

    Raises:
        CallbackError: as `remove_units`.
    """
    twin = copy.deepcopy(graph_module)  # its source with it
    with torch.no_grad():
        for group, mask in masks.items():
            group.zero(twin, mask)
    remove_units(twin if model is graph_module else twin.meta["source"], twin, masks, inputs)


def remove_units(
    model: nn.Module,
    graph_module: fx.GraphModule,
    masks: Masks,
    inputs: Inputs,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plan:
    """Remove units, whose slices are zero, from a model in place, and prove that it computes what it did.

    Args:
        model: a captured graph, or the user's own module.
        graph_module: the graph; that of the user's module shares its parameters.
        masks: what stays. Where a norm or a mean is computed over the units of a group, it is expected to be that of
            those that stay.
        inputs: to prove on.
        optimizer: of the model; its state is cut too, where that can be done.

    Returns:
        What was removed.

    Raises:
        CallbackError: the model computes something else without the units; it is as it was before.

    Math:
        max|y - y'| / max|y'| <= tolerance in eval mode, with y the outputs after and y' those before: 1e-9 in float64
        for a graph; 1e-5 for a module in float64, 1e-3 in its own dtype where its code does not run in float64.
    """
    keep = {g.group.name: tuple(mask.nonzero().flatten().tolist()) for g, mask in masks.items()}
    plan = PruneChannels(keep=keep).plan(graph_module, PassContext(example_inputs=inputs))
    stuck = next((edit for edit in plan.edits if not edit.on_source), None)
    if stuck is not None and model is not graph_module:
        raise CallbackError(
            f"{stuck.reason}. Way out: train the captured graph, capture(model, ...), in place of the module"
        )
    expected = _masked(graph_module, plan, inputs) if any(g.spanned for g in masks) else evaluate(graph_module, inputs)
    snapshot = Snapshot(model, optimizer)
    lost = _apply(plan, model, optimizer)
    try:
        outputs, tolerance = _outputs(model, inputs)
        error = relative_error(outputs, expected)
        if error > tolerance:
            raise CallbackError(
                f"without the masked units {type(model).__name__} computes something else than with them (relative "
                f"error {error:.1e}, {tolerance:g} allowed), in spite of zero weights: leave groups out with skip=; "
                "nothing was removed"
            )
    except BaseException:
        snapshot.restore()
        raise
    if lost and optimizer is not None:
        _refuse_steps(optimizer, lost)
    return plan


def _apply(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    """Apply a plan, to the optimizer too; returns why that was not possible, empty if it was."""
    if optimizer is None:
        plan.apply(model)
        return ""
    try:
        plan.apply(model, optimizer)
        return ""
    except PlanError as error:
        reason = str(error)
    plan.apply(model)
    return reason


def _refuse_steps(optimizer: torch.optim.Optimizer, reason: str) -> None:
    """Tell that the optimizer has the state of the larger model; a step with it would fail on shapes, or be wrong."""
    logger.warning("the optimizer is not that of the smaller model: make a new one to train on (%s)", reason)

    def refuse(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise CallbackError(
            f"{type(optimizer).__name__} has the state of a model whose units have left since: make a new optimizer to "
            f"train the smaller one on ({reason})"
        )

    optimizer.register_step_pre_hook(refuse)


def _masked(graph_module: fx.GraphModule, plan: Plan, inputs: Inputs) -> list[Any]:
    axes = analyse_axes(graph_module)
    return evaluate_masked(axes, removed_atoms(axes, removal_of(plan)), inputs)


def _outputs(model: nn.Module, inputs: Inputs) -> tuple[list[Any], float]:
    """Run a model in eval mode, in float64 where it can; return its flat outputs and how exact they are."""
    if isinstance(model, fx.GraphModule):
        return evaluate(model, inputs), _GRAPH_TOLERANCE
    try:
        wide = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        return _run(copy.deepcopy(model).double(), wide), _SOURCE_TOLERANCE
    except Exception:  # a cast inside the user's code
        return _run(copy.deepcopy(model), inputs), _OWN_TOLERANCE


def _run(model: nn.Module, inputs: Inputs) -> list[Any]:
    args, kwargs = inputs
    with _bare(model), no_cache(model), in_eval_mode(model):
        return pytree.tree_leaves(model(*args, **kwargs))


@contextmanager
def _bare(model: nn.Module) -> Generator[None]:
    """Take away the autocast that Accelerate puts around `forward`, as an attribute of the instance."""
    own = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        yield
    finally:
        if own is not None:
            model.__dict__["forward"] = own
