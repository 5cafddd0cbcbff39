"""Importance from gradients: of the loss on batches of data, or those that the user's own backward left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance, units
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.channels import ChannelGroup, GroupAxis
from torchopt_passes.graph.pruning.weight_scores import axis_scores
from torchopt_passes.graph.tensors import get_tensor
from torchopt_passes.graph.verify import in_eval_mode
from torchopt_passes.progress import track

__all__ = ["gradient_scores"]

_WAYS_OUT = (
    "importance from gradients needs a loss: capture the model with labels= (or what makes it return a loss) and give "
    "PassContext(calibration=[batch, ...]) with batches that hold them; or call backward() on your own loss before, so "
    "that the parameters hold .grad"
)


def gradient_scores(
    graph_module: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    axes: Mapping[str, Sequence[GroupAxis]],
    context: PassContext,
    name: str,
) -> dict[str, list[torch.Tensor]]:
    """Return what the gradients of each axis tell about the units of a group.

    The loss is differentiated in eval mode. Parameters, frozen ones included, are read through other tensors with the
    same memory: their ``.grad`` and ``requires_grad`` stay as they are, as do buffers, mode and random state.

    Args:
        graph_module: a captured graph.
        groups: groups of its channels.
        axes: name of the group -> the axes that count.
        context: its `calibration` holds batches on which the model returns a loss. Without it, or when the model
            returns none, the parameters' ``.grad`` is taken. Scores are means over the batches: they alone are kept.
        name: ``"taylor"`` (``|sum w g|`` of each unit) or ``"fisher"`` (``1/2 sum w^2 g^2``).

    Returns:
        Name of the group -> scores of each axis that has a gradient, each (group.size,).

    Raises:
        ConfigError: there is neither a loss nor a gradient, or no batch.
    """
    wanted = {axis.fqn for group in groups for axis in axes[group.name]}
    if not wanted:
        return {group.name: [] for group in groups}
    totals: dict[tuple[str, int], torch.Tensor] = {}
    count = 0
    with in_eval_mode(graph_module):
        for found in _gradients(graph_module, wanted, context):
            count += 1
            for group in groups:
                for place, axis in enumerate(axes[group.name]):
                    if axis.fqn in found:
                        scores = _axis(get_tensor(graph_module, axis.fqn), found[axis.fqn], axis, group.size, name)
                        totals[group.name, place] = totals.get((group.name, place), 0.0) + scores
    return {
        group.name: [
            totals[group.name, place] / count for place in range(len(axes[group.name])) if (group.name, place) in totals
        ]
        for group in groups
    }


def _gradients(
    graph_module: fx.GraphModule, wanted: set[str], context: PassContext
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield fqn -> gradient for each batch; once the user's own where there is no loss."""
    own = {fqn: gradient for fqn in wanted if (gradient := get_tensor(graph_module, fqn).grad) is not None}
    if context.calibration is None:
        if not own:
            raise ConfigError(_WAYS_OUT)
        yield _dense(own)
        return
    count = 0
    for batch in track(context.calibration, "Scoring channels"):
        count += 1
        found = _backward(graph_module, wanted, *as_call(batch))
        if found is None and not own:
            raise ConfigError(f"the model returned no loss on context.calibration: {_WAYS_OUT}")
        yield _dense(own if found is None else found)
        if found is None:
            return
    if not count:
        raise ConfigError("context.calibration is empty (a generator that was used up?)")


def _backward(
    graph_module: fx.GraphModule, wanted: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor] | None:
    with torch.enable_grad():
        leaves = {fqn: parameter.detach() for fqn, parameter in graph_module.named_parameters()}
        read = {fqn: leaf.requires_grad_() for fqn, leaf in leaves.items() if fqn in wanted}
        buffers = {name: buffer.clone() for name, buffer in graph_module.named_buffers()}
        loss = _loss(torch.func.functional_call(graph_module, leaves | buffers, args, kwargs))
        if loss is None or not loss.requires_grad:
            return None
        found: Any = torch.autograd.grad(loss.sum(), list(read.values()), allow_unused=True)
    return {fqn: gradient for fqn, gradient in zip(read, found, strict=True) if gradient is not None}


def _loss(output: Any) -> torch.Tensor | None:
    """Return the loss in a model's output: its field ``loss``, the scalar that leads a tuple, or a scalar itself."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "_fields"):
        output = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        output = getattr(output, "loss", None)
    scalar = isinstance(output, torch.Tensor) and output.numel() == 1 and output.is_floating_point()
    return output if scalar else None


def _axis(weight: torch.Tensor, gradient: torch.Tensor, axis: GroupAxis, size: int, name: str) -> torch.Tensor:
    rows = units.channel_rows(weight, axis.dim)
    slopes = units.channel_rows(gradient.to(weight.device), axis.dim)
    terms = importance.taylor_terms(rows, slopes) if name == "taylor" else importance.squared_gradient(rows, slopes)
    return axis_scores(terms, axis, size).abs()


def _dense(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {fqn: g.to_dense() if g.layout is not torch.strided else g for fqn, g in found.items()}
