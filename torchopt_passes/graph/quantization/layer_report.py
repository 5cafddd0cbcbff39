"""What quantization did to each layer: bits, ranges, noise of its own and at the output, or why it stayed float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.compare import LayerSqnr, layer_sqnr
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.layer_rounding import Layer, LayerRunner, group_layers
from torchopt_passes.graph.quantization.operations import Operation, find_operations
from torchopt_passes.graph.quantization.targets import get_target
from torchopt_passes.graph.verify import sqnr

__all__ = ["LayerReport", "Range", "layer_report", "layers_of"]

Range = tuple[float, float]
"""Smallest and largest value."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer of a quantized graph; of a product of two activations, "weight" is its second operand.

    Args:
        layer: the weight's fqn, the node of a product, or the number of an output.
        kind: the operation, such as ``"conv2d"``; ``"output"`` for what the model returns.
        weight_bits: bits of the weight, None for float.
        activation_bits: bits of the input, None for float.
        weight_range: smallest and largest value that the weight's grid holds, over all channels, its batch norm
            folded in.
        activation_range: the same of the input's grid.
        weight_sqnr: signal-to-quantization-noise ratio of the weight alone, in dB; infinite when nothing was lost.
        sqnr: that of the layer's result, the noise of the layers in front of it included.
        output_sqnr: that of the model's outputs when this layer alone is rounded; of an output, the same as `sqnr`.
        why_float: why it is float; empty when it is not.
    """

    layer: str
    kind: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_range: Range | None = None
    activation_range: Range | None = None
    weight_sqnr: float | None = None
    sqnr: float | None = None
    output_sqnr: float | None = None
    why_float: str = ""


def layer_report(
    reference: fx.GraphModule, prepared: fx.GraphModule, inputs: Any = None, *, plan: Plan | None = None
) -> tuple[LayerReport, ...]:
    """Report every matrix operation of a graph and its quantized form, then the outputs.

    Runs the reference once, and the prepared graph once and once for each layer. Both are as before afterwards.

    Args:
        reference: the float graph.
        prepared: that graph with calibrated fake-quantizers (before `ConvertQuantized`), trained or not.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``; by
            default those the reference was captured with.
        plan: of `InsertFakeQuant`, which says why a layer was left in float; without it the report cannot always say.

    Returns:
        One row for each layer in the order of the graph, then one for each floating output.

    Formula: SQNR = 10 log10(sum y^2 / sum (y' - y)^2) dB, y the float value and y' the rounded one.

    Raises:
        ConfigError: the second graph has no fake-quantizers, or there are no inputs.
    """
    call = as_call(inputs) if inputs is not None else reference.meta.get("example_inputs")
    if call is None:
        raise ConfigError("layer_report needs inputs: the reference graph has no example inputs")
    layers, operations = layers_of(reference, prepared)
    compared = layer_sqnr(reference, prepared, call)
    noise = {row.node: row.sqnr for row in compared if row.kind != "output"}
    reasons = {skip.target: skip.reason for skip in plan.skips} if plan is not None else {}
    runner = LayerRunner(prepared, layers)
    rows: list[LayerReport] = []
    with runner.measuring():
        exact = _floats(runner.outputs(call)[0])
        for layer in layers:
            operation = operations[layer.nodes[0]]
            found = [value for node in layer.nodes if (value := noise.get(node)) is not None]
            row = LayerReport(layer=layer.name, kind=operation.operands.kind, sqnr=min(found, default=None))
            quantizers = runner.quantizers(layer.nodes[0])
            if quantizers:
                rows.append(_rounded(row, operation, quantizers, runner, layer, exact, call))
            else:
                rows.append(_float(row, operation, reasons))
    return (*rows, *(_output(row) for row in compared if row.kind == "output"))


def layers_of(reference: fx.GraphModule, prepared: fx.GraphModule) -> tuple[tuple[Layer, ...], dict[str, Operation]]:
    """Return the layers that a float graph and its prepared form have in common, and their operations by node.

    Raises:
        ConfigError: the prepared graph has no fake-quantizers.
    """
    if next(fake_quantizers(prepared), None) is None:
        raise ConfigError("the graph has no fake-quantizers: report on it behind Calibrate, before ConvertQuantized")
    # any target's table will do: operations and weights are the same in all, and what is rounded is in the graph
    found = find_operations(reference, reference.graph, get_target("onnx"), lambda name: None)
    twins = {node.name: node.target for node in in_one_mode(prepared.graph, training=False).nodes}
    kept = [op for op in found if twins.get(op.node.name) is op.node.target]
    return group_layers(_unjudged(kept)), {op.node.name: op for op in kept}


def _unjudged(operations: Iterable[Operation]) -> Iterable[Operation]:
    for op in operations:
        yield Operation(op.node, op.operands, op.weight, op.batch_norm)


def _rounded(
    row: LayerReport,
    operation: Operation,
    quantizers: dict[int, FakeQuantizer],
    runner: LayerRunner,
    layer: Layer,
    exact: list[torch.Tensor],
    call: Any,
) -> LayerReport:
    weight = runner.weight(layer.nodes[0])
    left, right = (quantizers.get(p) for p in (operation.operands.activation, operation.operands.weight))
    runner.rounded = {layer.name}
    outputs = _floats(runner.outputs(call)[0])
    return LayerReport(
        layer=row.layer,
        kind=row.kind,
        weight_bits=right.bits if right else None,
        activation_bits=left.bits if left else None,
        weight_range=_range(right),
        activation_range=_range(left),
        weight_sqnr=sqnr(weight.rounded, weight.exact) if weight else None,
        sqnr=row.sqnr,
        output_sqnr=sqnr(_flat(outputs), _flat(exact)) if exact else None,
    )


def _float(row: LayerReport, operation: Operation, reasons: dict[str, str]) -> LayerReport:
    known = reasons.get(operation.target) or operation.why_float
    why = known or "float: it has no fake-quantizer (the plan of InsertFakeQuant, plan=, says why)"
    return LayerReport(layer=row.layer, kind=row.kind, sqnr=row.sqnr, why_float=why)


def _output(row: LayerSqnr) -> LayerReport:
    return LayerReport(layer=row.node, kind="output", sqnr=row.sqnr, output_sqnr=row.sqnr)


def _range(quantizer: FakeQuantizer | None) -> Range | None:
    """Return what the grid holds: (q_min - z) s to (q_max - z) s, over all channels."""
    if quantizer is None or quantizer.fitted_to_value or not quantizer.has_range:
        return None
    low = (quantizer.quant_min - quantizer.zero_point) * quantizer.scale
    high = (quantizer.quant_max - quantizer.zero_point) * quantizer.scale
    return float(low.min()), float(high.max())


def _floats(outputs: list[Any]) -> list[torch.Tensor]:
    return [value for value in outputs if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
