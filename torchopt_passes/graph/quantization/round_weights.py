"""RoundWeights: GPTQ on a prepared, calibrated graph."""

from __future__ import annotations

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.gptq import gptq, output_error
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_hessians import layer_hessians
from torchopt_passes.graph.quantization.rounding import PreparedLayer, RoundingPass, prepared_layers, set_weight
from torchopt_passes.graph.quantization.walk import Walk, walking

__all__ = ["RoundWeights"]


class RoundWeights(RoundingPass):
    """Round the weights of linears and convolutions by GPTQ, on the grids that calibration chose.

    Layer by layer in the order of the graph: the Hessian of a layer's output error comes from the inputs that it has
    once all layers before it, and the activations, are rounded. Each column's rounding error is made up for by the
    columns still to come. The weight of a layer with a batch norm behind it is rounded on the grid of the folded
    weight and stored unfolded.

    Run it after `Calibrate`; ranges stay as they are. The plan applies to the source module too.

    Args:
        act_order: round the input channels with the largest second moment first.
        damping: added to the Hessian's diagonal, as a share of its mean.
        max_batches: at most so many batches of the context's `calibration`; None takes all. All of them are in memory
            with one layer's activations.

    Source:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers";
        convolutions by their patches, as in Frantar & Alistarh 2022, "Optimal Brain Compression".

    Proof:
        The chosen weights lie on their grids: with the new weights, rounding them or not gives the same outputs.

    Example:
        >>> RoundWeights(act_order=False).recipe()
        {'round_weights': {'act_order': False}}
    """

    act_order: bool = True
    damping: float = 0.01
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a damping that is none and a number of batches that is none."""
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"RoundWeights: damping must be in (0, 1], not {self.damping}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"RoundWeights: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Walk through the layers; see the class."""
        context = context or PassContext()
        layers, skips = prepared_layers(graph_module, Walk(graph_module, []).graph, context, "RoundWeights")
        if not layers:
            return Plan(skips=tuple(skips))
        edits: list[Edit] = []
        with walking(graph_module, context.calibration, "RoundWeights", self.max_batches) as batches:
            walk = Walk(graph_module, batches)
            layers, _ = prepared_layers(graph_module, walk.graph, context, "RoundWeights")
            hessians = layer_hessians(walk, [prepared.layer for prepared in layers], "Rounding weights")
            for prepared, (_, hessian) in zip(layers, hessians, strict=True):
                folded, numbers = self._round(prepared, hessian)
                edits.append(set_weight(prepared, folded, "GPTQ", numbers))
                walk.set(prepared.layer.fqn, prepared.unfold(folded))
        return Plan(tuple(edits), tuple(skips))

    def _round(self, prepared: PreparedLayer, hessian: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        layer, quantizer = prepared.layer, prepared.quantizer
        weight = layer.matrix(prepared.folded.float())
        step = prepared.step.expand_as(prepared.weight) if prepared.dim is not None else prepared.step
        steps = layer.matrix(step)[..., :1] if prepared.dim is not None else step.reshape(1, 1, 1)
        rounded = torch.empty_like(weight)
        before = after = size = 0.0
        for group in range(len(weight)):
            scale = steps[min(group, len(steps) - 1)]

            def nearest(columns: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
                return torch.round(columns / scale).clamp(quantizer.quant_min, quantizer.quant_max) * scale

            rounded[group] = gptq(
                weight[group],
                hessian[group],
                lambda _columns, _index, nearest=nearest: nearest,
                act_order=self.act_order,
                damping=self.damping,
            )
            before += output_error(weight[group] - nearest(weight[group]), hessian[group])
            after += output_error(weight[group] - rounded[group], hessian[group])
            size += output_error(weight[group], hessian[group])
        numbers = {"error_nearest": before / max(size, 1e-30), "error": after / max(size, 1e-30)}
        return layer.weight(rounded, prepared.weight.float()), numbers
