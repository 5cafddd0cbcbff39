"""ReestimateBatchNorm: measure the statistics of batch norms anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm, batch_norms
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_inputs import (
    ChannelMoments,
    levels,
    required,
    several_times,
    watch_values,
)
from torchopt_passes.graph.quantization.rescale import SetTensor
from torchopt_passes.graph.tensors import aliases, get_tensor

__all__ = ["ReestimateBatchNorm"]


class ReestimateBatchNorm(GraphPass):
    """Give every batch norm the mean and variance that its input has now: after pruning, rounding or masking.

    Mean and variance are exact over all the data (pooled, in float64), not a moving average of batches. On a graph
    with fake-quantizers they are measured with rounding as it is switched; `Calibrate` again afterwards: the grid of a
    weight with a batch norm behind it depends on the variance.

    Args:
        order: ``"layer_by_layer"`` measures each batch norm with those in front of it set already, in as many runs over
            the data as batch norms follow each other: afterwards each holds exactly the statistics of its input.
            ``"batch_statistics"`` takes one run, in which batch norms normalize by the batch as in training, so it
            depends a little on how the data is cut into batches.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.2.2; Wu and
        Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise statistics).

    Proof:
        Outputs equal those of the graph before with the new statistics.

    Example:
        >>> ReestimateBatchNorm(max_batches=8).recipe()
        {'reestimate_batch_norm': {'max_batches': 8}}
    """

    claim = "outputs equal those of the graph before with the new statistics"

    order: Literal["layer_by_layer", "batch_statistics"] = "layer_by_layer"
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a number of batches that is none."""
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"ReestimateBatchNorm: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Measure the statistics; nothing of the graph is touched."""
        context = context or PassContext()
        norms, skips = _norms(graph_module, context)
        if not norms:
            return Plan(skips=tuple(skips))
        state = self._measure(graph_module, norms, context)
        edits: list[Edit] = []
        for path, uses in norms.items():
            changes = _changes(graph_module, uses[0], state)
            if not changes:
                skips.append(Skip(target=path, reason="nothing to do: it has these statistics already"))
            for fqn, value, relative in changes:
                numbers = {"values": float(state[f"{fqn}#count"]), "relative_change": relative}
                reason = f"measured over {int(state[f'{fqn}#count'])} values of each channel"
                edits.append(SetTensor(target=fqn, reason=reason, numbers=numbers, value=value))
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the new statistics."""
        del graph_module
        return {edit.target: edit.value for edit in plan.edits if isinstance(edit, SetTensor)}

    def _measure(
        self, graph_module: fx.GraphModule, norms: Mapping[str, list[BatchNorm]], context: PassContext
    ) -> dict[str, torch.Tensor]:
        """Return the new statistics by fqn, and how many values they are of by ``fqn#count``."""
        state: dict[str, torch.Tensor] = {}
        nodes = {use.node: path for path, uses in norms.items() for use in uses}
        layered = self.order == "layer_by_layer"
        for group in levels(graph_module, nodes) if layered else [list(norms)]:
            moments = {path: ChannelMoments(1) for path in group}
            # two norms may read one value, and one norm two values
            watching: dict[str, list[ChannelMoments]] = defaultdict(list)
            for path in group:
                for use in norms[path]:
                    watching[str(use.node.args[0])].append(moments[path])
            watches = {name: _All(found) for name, found in watching.items()}
            watch_values(
                graph_module,
                (several_times if layered else required)(context.calibration, self.name),
                watches,
                state=state,
                max_batches=self.max_batches,
                batch_statistics=not layered,
                what="Measuring batch norms",
            )
            for path in group:
                for node, value in zip(
                    norms[path][0].statistics or (), (moments[path].mean, moments[path].var), strict=True
                ):
                    fqn = str(node.target)
                    state[fqn] = value.to(get_tensor(graph_module, fqn).dtype)
                    state[f"{fqn}#count"] = torch.tensor(moments[path].count)
        return state


class _All:
    def __init__(self, moments: list[ChannelMoments]) -> None:
        self._moments = moments

    def __call__(self, value: torch.Tensor) -> None:
        for moments in self._moments:
            moments(value)


def _norms(graph_module: fx.GraphModule, context: PassContext) -> tuple[dict[str, list[BatchNorm]], list[Skip]]:
    """Return the batch norms that keep statistics, by the path of their module, and the others."""
    first = aliases(graph_module)
    found: dict[str, list[BatchNorm]] = defaultdict(list)
    skips: list[Skip] = []
    for norm in batch_norms(graph_module.graph):
        if norm.statistics is None:
            skips.append(Skip(target=norm.node.name, reason="it keeps no running statistics"))
            continue
        mean = str(norm.statistics[0].target)
        path = first.get(mean, mean).rpartition(".")[0]
        pattern = context.skipped_by(path or mean)
        if pattern is not None:
            skips.append(Skip(target=path or mean, reason=f"skip pattern {pattern!r}"))
        else:
            found[path].append(norm)
    return found, skips


def _changes(
    graph_module: fx.GraphModule, norm: BatchNorm, state: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor, float]]:
    """Return the statistics that change: fqn, new value and by how much, relative to the largest."""
    found: list[tuple[str, torch.Tensor, float]] = []
    for node in norm.statistics or ():
        fqn = str(node.target)
        old, new = get_tensor(graph_module, fqn), state[fqn]
        if not torch.equal(old, new.to(old)):
            change = float((new.to(old) - old).abs().max() / old.abs().max().clamp(min=1e-12))
            found.append((fqn, new.cpu(), change))
    return found
