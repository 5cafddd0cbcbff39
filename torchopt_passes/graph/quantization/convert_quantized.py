"""ConvertQuantized: a calibrated or trained graph of fake-quantizers becomes an int8 graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.folding import exact_means
from torchopt_passes.graph.quantization.lowering import lower
from torchopt_passes.graph.quantization.places import check_ranges, chosen_places
from torchopt_passes.graph.quantization.state import fake_quant_on
from torchopt_passes.graph.quantization.value_quantizer import ValueQuantizer

__all__ = ["ConvertQuantized", "LowerQuantizer"]


class LowerQuantizer(Edit):
    """Replace a fake-quantizer by integer ops; a weight becomes integers, its batch norm is folded into it.

    Args:
        quantizer: its name in the graph, such as ``"fake_quant.conv1_weight"``.
        fold_weights: store weights as integers; else keep floats that the graph rounds.
    """

    on_source = False

    quantizer: str
    fold_weights: bool = True

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without that fake-quantizer, or one that has no range."""
        quantizer = dict(fake_quantizers(module)).get(self.quantizer)
        if quantizer is None:
            raise PlanError(f"the graph has no fake-quantizer {self.quantizer!r}")
        if not quantizer.has_range:
            raise PlanError(f"{self.quantizer!r} has seen no data")

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Any]) -> None:
        """Lower them all: a weight's integers can take its name once all its float uses are gone."""
        if not isinstance(module, fx.GraphModule):
            raise PlanError("only a captured graph can be converted")
        for fold_weights in (True, False):
            names = [edit.quantizer for edit in edits if edit.fold_weights is fold_weights]
            if names:
                lower(module, names, fold_weights=fold_weights)


class ConvertQuantized(GraphPass):
    """Turn fake-quantizers into the integer arithmetic that they stand for.

    Activations get quantize and dequantize ops, weights are stored as int8 (above 8 bits int16) under their own name
    with ``<name>_scale`` and ``<name>_zero_point`` beside them (that of a plain product x W, such as GPT-2's
    ``Conv1D``, transposed: int8 kernels exist for linears alone), batch norms are folded into the convolution or
    linear in front of them and their state is gone. Grids that are fitted to each value become operations in float
    around the same integers (by row), or casts to the narrow floats that weights are then stored in.
    ``on_copy(ConvertQuantized())`` keeps the prepared graph.

    Args:
        fold_weights: store weights as int8 (ONNX, Inductor); False keeps float weights that the graph rounds, which
            converters that look for a rounding op on the weight want (OpenVINO, LiteRT).

    Raises:
        PassError: a fake-quantizer has seen no data; names its place.

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference", equations 1 and 14.

    Proof:
        The converted graph equals the prepared graph in eval mode with rounding on, in float64 between the float32
        roundings to the grid, so that a value on the border of two steps falls to the same side. The stored bias is
        rounded to float32, so the batch norms before get the mean that gives exactly that bias.
    """

    claim = "outputs equal those of the fake-quantized graph"
    tolerance = 1e-6

    fold_weights: bool = True

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Lower every fake-quantizer that no skip pattern covers."""
        context = context or PassContext()
        places, skips = chosen_places(graph_module, context)
        check_ranges(self.name, places, "run Calibrate, or train with observers on")
        edits = [self._edit(place.name, place.target, place.quantizer) for place in places]
        return Plan(tuple(edits), tuple(skips))

    def referring(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Round in the graph before."""
        return fake_quant_on(graph_module)

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the running means with which the batch norms before give exactly the stored biases, in float64."""
        lowered = {edit.quantizer for edit in plan.edits if isinstance(edit, LowerQuantizer)}
        return exact_means(graph_module, lowered)

    def _edit(self, name: str, target: str, quantizer: FakeQuantizer) -> LowerQuantizer:
        numbers = {"bits": float(quantizer.bits)}
        if isinstance(quantizer, ValueQuantizer):
            reason = f"{quantizer.kind}, fitted to each value, in float operations"
        else:
            what = f"stored as {quantizer.dtype}".replace("torch.", "") if quantizer.exact else "quantize, dequantize"
            reason = f"{quantizer.bits}-bit grid: {what}"
            numbers |= {"step": float(quantizer.scale.max()), "zero_point": float(quantizer.zero_point.max())}
        return LowerQuantizer(
            target=target,
            reason=reason,
            numbers=numbers,
            quantizer=name,
            fold_weights=self.fold_weights,
        )

    def _precision(self, graph_module: fx.GraphModule) -> tuple[torch.dtype | None, float]:
        del graph_module
        return torch.float64, self.tolerance
