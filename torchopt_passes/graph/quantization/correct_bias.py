"""CorrectBias: take the mean error that rounding brings out of the biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm, foldable_into
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers, is_fake_quant
from torchopt_passes.graph.quantization.layer_inputs import ChannelMoments, several_times, watch_values
from torchopt_passes.graph.quantization.operations import module_path
from torchopt_passes.graph.quantization.rescale import SetTensor
from torchopt_passes.graph.quantization.state import fake_quant_off, fake_quant_on
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.weights import parameter_behind
from torchopt_passes.progress import track

__all__ = ["CorrectBias"]

CORRECTED = "bias_corrected"
"""The key of a node's meta that tells that its bias was corrected: a second time would correct twice."""


class CorrectBias(GraphPass):
    """Shift the bias of every rounded convolution and linear so that its channels have the mean they had in float.

    Works on a graph that `InsertFakeQuant` prepared and `Calibrate` gave its ranges. Layers are corrected in order,
    each with those in front of it corrected, in one walk over the data. What is corrected is the bias, or the bias of
    the batch norm behind where the layer has none; the batch norm stays in place.

    A corrected graph has other float biases: with rounding off it is no longer the model before.

    Args:
        max_batches: at most so many batches of the context's `calibration`; None takes all. All of them are in memory
            with one layer's activations.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 and
        appendix D (empirical): b' = b + E[y] - E[y_quantized] for each channel.

    Proof:
        Outputs equal those of the graph before with the new biases. The mean error that is left is in the numbers.

    Example:
        >>> CorrectBias(max_batches=8).recipe()
        {'correct_bias': {'max_batches': 8}}
    """

    claim = "outputs equal those of the graph before with the new biases"

    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a number of batches that is none."""
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"CorrectBias: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Measure the mean of every layer in float and rounded; nothing of the graph is touched."""
        context = context or PassContext()
        places, skips = _places(graph_module, context)
        if not places:
            return Plan(skips=tuple(skips))
        batches = several_times(context.calibration, "CorrectBias")
        with fake_quant_off(graph_module):
            wanted = self._means(graph_module, places, batches, {})
        state: dict[str, torch.Tensor] = {}
        errors: dict[str, torch.Tensor] = {}
        with fake_quant_on(graph_module):
            with walking(graph_module, batches, "CorrectBias", self.max_batches) as inputs:
                walk = Walk(graph_module, inputs)
                ahead = sorted(places, key=lambda place: walk.position[walk.twin(place.node)])
                for place in track(ahead, "Correcting biases"):
                    errors[place.bias] = wanted[place.bias] - _mean(walk, place)
                    old = get_tensor(graph_module, place.bias).detach()
                    state[place.bias] = (old.double() + errors[place.bias].to(old.device)).to(old.dtype)
                    walk.set(place.bias, state[place.bias])
            left = self._means(graph_module, places, batches, state)
        edits: list[Edit] = []
        for place in places:
            error, rest = errors[place.bias], wanted[place.bias] - left[place.bias]
            edits.append(
                SetTensor(
                    target=place.bias,
                    reason=f"mean error of {place.operation.name} over the calibration data",
                    numbers={"mean_error": float(error.abs().mean()), "mean_error_left": float(rest.abs().mean())},
                    value=state[place.bias].cpu(),
                    mark=CORRECTED,
                    marked=(place.operation.name,),
                )
            )
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the new biases."""
        del graph_module
        return {edit.target: edit.value for edit in plan.edits if isinstance(edit, SetTensor)}

    def _means(
        self,
        graph_module: fx.GraphModule,
        places: Iterable[_Place],
        batches: Iterable[Any],
        state: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        moments = {place.bias: (place, ChannelMoments(place.dim)) for place in places}
        watches = {place.node.name: found for place, found in moments.values()}
        watch_values(
            graph_module, batches, watches, state=state, max_batches=self.max_batches, what="Correcting biases"
        )
        return {fqn: found.mean for fqn, (_, found) in moments.items()}


def _mean(walk: Walk, place: _Place) -> torch.Tensor:
    """Return the mean of each channel of a layer in the walk, which moves up to it."""
    node, moments = walk.twin(place.node), ChannelMoments(place.dim)
    walk.advance(node)
    with torch.no_grad():
        for batch in range(len(walk.values)):
            moments(walk.run(batch, node, node, {})[node])
    return moments.mean


@dataclass(frozen=True)
class _Place:
    """One bias: the operation, the node whose mean it shifts, and the dimension of its channels."""

    operation: fx.Node
    node: fx.Node
    bias: str
    dim: int


def _places(graph_module: fx.GraphModule, context: PassContext) -> tuple[list[_Place], list[Skip]]:
    first = aliases(graph_module)
    ranged = all(quantizer.has_range for _, quantizer in fake_quantizers(graph_module))
    places: list[_Place] = []
    skips: list[Skip] = []
    reads = [first.get(str(n.target), "") for n in graph_module.graph.find_nodes(op="get_attr") for _ in n.users]
    for node in graph_module.graph.nodes:
        if node.target not in KINDS:
            continue
        weight = parameter_behind(node.args[KINDS[node.target].weight])
        name = first.get(weight or "") or f"{module_path(node)}: {node.name}"
        place = _place(graph_module, node, first)
        pattern = next((p for p in map(context.skipped_by, (name, place.bias if place else name)) if p), None)
        if pattern is not None:
            skips.append(Skip(target=name, reason=f"skip pattern {pattern!r}"))
        elif not any(is_fake_quant(graph_module, parent) for parent in node.all_input_nodes):
            skips.append(Skip(target=name, reason="float: nothing of it is rounded"))
        elif node.meta.get(CORRECTED):
            skips.append(Skip(target=name, reason="nothing to do: corrected already"))
        elif not ranged:
            raise ConfigError("the graph has fake-quantizers without a range: Calibrate comes before CorrectBias")
        elif place is None:
            skips.append(Skip(target=name, reason="it has no bias, and no batch norm with a bias is behind it"))
        elif reads.count(place.bias) > 1:
            skips.append(Skip(target=name, reason=f"{place.bias} is used more than once"))
        else:
            places.append(place)
    return places, skips


def _place(graph_module: fx.GraphModule, node: fx.Node, first: Mapping[str, str]) -> _Place | None:
    position = KINDS[node.target].bias
    bias = node.args[position] if position is not None and position < len(node.args) else None
    own, operation = first.get(str(getattr(bias, "target", ""))), node
    if bias is None:
        norms = [norm for norm in map(BatchNorm.of, node.users) if norm is not None]
        norm = next((n for n in norms if foldable_into(n)[0] is node), None)
        own = first.get(str(norm.beta.target)) if norm is not None and norm.beta is not None else None
        node = norm.node if norm is not None else node
    if own is None or get_tensor(graph_module, own).ndim != 1:
        return None
    weight: Any = operation.args[KINDS[operation.target].weight]
    return _Place(operation, node, own, 1 - weight.meta["val"].ndim if "conv" in str(operation.target) else -1)
