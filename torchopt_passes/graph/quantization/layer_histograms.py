"""How the values of each layer lie on their grid: histograms of weights and inputs, in steps of the grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import along
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer
from torchopt_passes.graph.quantization.layer_report import layers_of
from torchopt_passes.graph.quantization.layer_rounding import LayerRunner
from torchopt_passes.graph.tensors import matching_pattern
from torchopt_passes.progress import track

__all__ = ["LayerHistogram", "layer_histograms"]


@dataclass(frozen=True, kw_only=True)
class LayerHistogram:
    """The values of one operand, in steps of its grid: x / s + z, so that its levels are the integers.

    With a scale for each channel, each value counts in the steps of its own channel. A batch norm is folded in.

    Args:
        layer: the weight's fqn, or the node of a product.
        operand: ``"weight"``, ``"input"``, or ``"input 2"`` for the second of a product.
        bits: of the grid.
        low: smallest integer of the grid.
        high: largest integer.
        step: size of a step in the value's own unit, the largest of all channels.
        counts: values in each bin; the outer bins hold what lies beyond them too.
        edges: of the bins, one more than `counts`, in steps.
        clipped: share of the values that lie beyond the outer levels by more than half a step.
    """

    layer: str
    operand: str
    bits: int
    low: int
    high: int
    step: float
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    clipped: float


def layer_histograms(
    reference: fx.GraphModule,
    prepared: fx.GraphModule,
    batches: Iterable[Any],
    *,
    layers: tuple[str, ...] = ("*",),
    bins: int = 256,
) -> tuple[LayerHistogram, ...]:
    """Count how the weights and the inputs of each rounded layer lie on their grids.

    Args:
        reference: the float graph; names the layers.
        prepared: that graph with calibrated fake-quantizers; it runs unrounded, and is as before afterwards.
        batches: each a tensor, a tuple of positional or a dict of keyword arguments; they stream.
        layers: globs on names of layers.
        bins: of each histogram; they reach a quarter of the grid beyond its ends.

    Returns:
        Of each layer the weight, then the input(s), in the order of the graph.

    Raises:
        ConfigError: the graph has no fake-quantizers, no layer matches, or there is no batch.
    """
    if bins < 1:
        raise ConfigError(f"layer_histograms: bins must be >= 1, not {bins}")
    known, operations = layers_of(reference, prepared)
    wanted = [layer for layer in known if matching_pattern(layer.name, layers)]
    runner = LayerRunner(prepared, wanted)
    found: dict[tuple[str, str], _Counts] = {}
    for layer in wanted:
        weight = runner.weight(layer.nodes[0])
        for position, quantizer in runner.quantizers(layer.nodes[0]).items():
            if quantizer.fitted_to_value:
                continue  # there is no one grid to draw
            second = position == operations[layer.nodes[0]].operands.weight
            operand = ("weight" if weight else "input 2") if second else "input"
            found[layer.name, operand] = _Counts(bins)
        if weight is not None and not weight.quantizer.fitted_to_value:
            found[layer.name, "weight"].add(weight.exact, weight.quantizer)
    if not found:
        raise ConfigError(f"layers {layers} match no rounded layer; there are {[layer.name for layer in known]}")

    def watch(name: str, position: int, value: torch.Tensor, quantizer: FakeQuantizer) -> None:
        if quantizer.fitted_to_value:
            return
        kind = next(op.operands for layer in wanted if layer.name == name for op in [operations[layer.nodes[0]]])
        found[name, "input" if position == kind.activation else "input 2"].add(value, quantizer)

    runner.watch = watch
    with runner.measuring():
        for batch in track(batches, "Counting values"):
            runner.outputs(batch)
    if any(counts.quantizer is None for counts in found.values()):
        raise ConfigError("layer_histograms got no batch: batches is empty (a generator that was used up?)")
    order = sorted(found, key=lambda key: ([layer.name for layer in wanted].index(key[0]), key[1] != "weight", key[1]))
    return tuple(found[key].histogram(*key) for key in order)


@dataclass
class _Counts:
    bins: int
    counts: list[int] = field(default_factory=list[int])
    quantizer: FakeQuantizer | None = None
    clipped: int = 0

    def edges(self, quantizer: FakeQuantizer) -> torch.Tensor:
        low, high = quantizer.quant_min, quantizer.quant_max
        margin = (high - low) / 4
        return torch.linspace(low - margin, high + margin, self.bins + 1, dtype=torch.float64)

    def add(self, value: torch.Tensor, quantizer: FakeQuantizer) -> None:
        self.quantizer = quantizer
        scale, zero = quantizer.scale.double(), quantizer.zero_point.double()
        if quantizer.channel_dim is not None:
            scale, zero = (along(t, value.ndim, quantizer.channel_dim) for t in (scale, zero))
        steps = value.detach().double() / scale + zero
        self.clipped += int(((steps < quantizer.quant_min - 0.5) | (steps > quantizer.quant_max + 0.5)).sum())
        places = torch.bucketize(steps.flatten().cpu(), self.edges(quantizer)[1:-1], right=True)
        found = torch.bincount(places, minlength=self.bins).tolist()
        self.counts = [a + b for a, b in zip(self.counts or [0] * self.bins, found, strict=True)]

    def histogram(self, layer: str, operand: str) -> LayerHistogram:
        if self.quantizer is None:
            raise ConfigError(f"{layer}: {operand} was never seen")
        return LayerHistogram(
            layer=layer,
            operand=operand,
            bits=self.quantizer.bits,
            low=self.quantizer.quant_min,
            high=self.quantizer.quant_max,
            step=float(self.quantizer.scale.max()),
            counts=tuple(self.counts),
            edges=tuple(self.edges(self.quantizer).tolist()),
            clipped=self.clipped / max(sum(self.counts), 1),
        )
