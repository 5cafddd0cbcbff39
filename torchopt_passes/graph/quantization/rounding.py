"""What the passes that choose how weights are rounded share: which weights, the edit, and the proof."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import PassError
from torchopt_passes.functional.affine import along
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.rescale import SetTensor
from torchopt_passes.graph.quantization.weight_layers import WeightLayer, find_layers
from torchopt_passes.graph.tensors import get_tensor
from torchopt_passes.graph.verify import Inputs, evaluate

__all__ = ["PreparedLayer", "RoundingPass", "prepared_layers"]


@dataclass(frozen=True)
class PreparedLayer:
    """A layer whose weight is rounded by a calibrated fake-quantizer.

    Args:
        layer: the operation and its parameter.
        quantizer: the fake-quantizer.
        weight: the parameter's value.
        factor: what the batch norm behind it multiplies each output channel by, shaped to multiply the weight.
    """

    layer: WeightLayer
    quantizer: FakeQuantizer
    weight: torch.Tensor
    factor: torch.Tensor

    @property
    def folded(self) -> torch.Tensor:
        """The weight that is rounded: with its batch norm folded in."""
        return self.weight * self.factor

    @property
    def dim(self) -> int | None:
        """The dimension of the weight that steps vary along."""
        return self.quantizer.channel_dim

    @property
    def step(self) -> torch.Tensor:
        """The steps of the grid, shaped to multiply the weight."""
        return along(self.quantizer.scale.detach().float(), self.weight.ndim, self.dim)

    def round(self, folded: torch.Tensor) -> torch.Tensor:
        """Return the nearest values of the grid, still folded."""
        q = self.quantizer
        return torch.round(folded / self.step).clamp(q.quant_min, q.quant_max) * self.step

    def unfold(self, folded: torch.Tensor) -> torch.Tensor:
        """Return a rounded weight as the parameter: w = q step / s."""
        return (folded / self.factor).to(self.weight.dtype)

    @property
    def on_grid(self) -> bool:
        """Whether the weight lies on its grid already."""
        return bool(((self.round(self.folded) - self.folded).abs() <= 1e-4 * self.step).all())


def prepared_layers(
    graph_module: fx.GraphModule, graph: fx.Graph, context: PassContext, name: str
) -> tuple[list[PreparedLayer], list[Skip]]:
    """Return the layers whose weights can be rounded, in order, and the others with their reasons.

    Raises:
        PassError: a fake-quantizer of a weight has no range yet.
    """
    quantizers = dict(fake_quantizers(graph_module))
    found: list[PreparedLayer] = []
    skips: list[Skip] = []
    empty: list[str] = []
    for layer in find_layers(graph_module, graph):
        pattern = context.skipped_by(layer.fqn) or context.skipped_by(layer.quantizer)
        quantizer = quantizers.get(layer.quantizer)
        if pattern is not None:
            reason = f"skip pattern {pattern!r}"
        elif quantizer is None or layer.rounding is None:
            reason = "float: no fake-quantizer rounds it"
        elif quantizer.fitted_to_value:
            reason = "its grid is fitted to each value: QuantizeWeights rounds groups by GPTQ"
        elif not quantizer.signed:
            reason = "its grid is not symmetric"
        elif layer.why_not:
            reason = layer.why_not
        elif not quantizer.has_range:
            empty.append(layer.fqn)
            continue
        else:
            prepared = _prepared(graph_module, layer, quantizer, layer.rounding)
            if not prepared.on_grid:
                found.append(prepared)
                continue
            reason = "nothing to do: it lies on its grid already"
        skips.append(Skip(target=layer.fqn, reason=reason))
    if empty:
        raise PassError(f"{name}: {len(empty)} weights have no range: {', '.join(empty[:3])}: run Calibrate first")
    if not found and not skips:
        reason = "nothing to do: the graph has no weights on fake-quantizers (InsertFakeQuant and Calibrate come first)"
        skips.append(Skip(target="graph", reason=reason))
    return found, skips


def _prepared(
    graph_module: fx.GraphModule, layer: WeightLayer, quantizer: FakeQuantizer, rounding: fx.Node
) -> PreparedLayer:
    weight = get_tensor(graph_module, layer.fqn).detach()
    factor = torch.ones([1] * weight.ndim)
    if len(rounding.args) > 1:
        gamma, var = (
            get_tensor(graph_module, str(n.target)).detach() if isinstance(n, fx.Node) else None
            for n in rounding.args[1:3]
        )
        if var is not None:
            factor = along(quantizer.channel_scale(gamma, var), weight.ndim, quantizer.weight_dim)
    return PreparedLayer(layer, quantizer, weight, factor)


def set_weight(prepared: PreparedLayer, folded: torch.Tensor, reason: str, numbers: dict[str, float]) -> SetTensor:
    """Return the edit that gives a layer its rounded weight."""
    behind = "" if bool((prepared.factor == 1).all()) else ", with the batch norm behind it divided out"
    uses = f", by its first of {prepared.layer.uses} uses" if prepared.layer.uses > 1 else ""
    moved = float((folded != prepared.round(prepared.folded)).float().mean())
    return SetTensor(
        target=prepared.layer.fqn,
        reason=f"{prepared.quantizer.bits}-bit grid: {reason}{uses}{behind}",
        numbers={"bits": float(prepared.quantizer.bits), **numbers, "share_not_nearest": moved},
        value=prepared.unfold(folded).cpu(),
    )


class RoundingPass(GraphPass):
    """Base of passes that set weights to values of their grids; the proof is that rounding leaves those alone."""

    claim = "the chosen weights lie on their grids: rounding them changes no output"

    def expect(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        inputs: Inputs,
        *,
        dtype: torch.dtype | None,
        record: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run the graph before with the new weights and their fake-quantizers off."""
        state = {edit.target: edit.value for edit in plan.edits if isinstance(edit, SetTensor)}
        chosen = {layer.quantizer for layer in find_layers(graph_module) if layer.fqn in state}
        with _weights_rounded(graph_module, but=chosen):
            return evaluate(graph_module, inputs, dtype=dtype, state=state, record=record)

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Round all weights and no activation, which would take the last bit of a sum to another step."""
        return _weights_rounded(graph_module, but=set())


@contextmanager
def _weights_rounded(graph_module: fx.GraphModule, but: set[str]) -> Generator[None]:
    weights = {layer.quantizer for layer in find_layers(graph_module)} - but
    before = {name: quantizer.enabled for name, quantizer in fake_quantizers(graph_module)}
    for name, quantizer in fake_quantizers(graph_module):
        quantizer.enable(name in weights)
    try:
        yield
    finally:
        for name, quantizer in fake_quantizers(graph_module):
            quantizer.enable(before[name])
