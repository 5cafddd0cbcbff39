"""The Hessian of each layer's output error, from the inputs that it has once the layers before it are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from torchopt_passes.functional.gptq import add_hessian
from torchopt_passes.graph.quantization.walk import Walk
from torchopt_passes.graph.quantization.weight_layers import WeightLayer
from torchopt_passes.progress import track

__all__ = ["layer_hessians"]


def layer_hessians(walk: Walk, layers: Iterable[WeightLayer], label: str) -> Iterator[tuple[WeightLayer, torch.Tensor]]:
    """Walk from layer to layer; yield each with its Hessian H = 2 X X^T, shape [groups, columns, columns], float32.

    The caller gives the walk the rounded weight (`Walk.set`) before it asks for the next layer. Linears that read one
    value (query, key and value) share one Hessian.

    Args:
        walk: where it starts.
        layers: of the walk's graph, in its order.
        label: for the progress bar.

    Source:
        Frantar et al. 2022, "GPTQ", section 3; convolutions by their patches.
    """
    seen: tuple[fx.Node, torch.Tensor] | None = None
    for layer in track(list(layers), label):
        walk.advance(layer.operation)
        source = layer.operation.args[layer.operands.activation]
        if seen is None or seen[0] is not source or layer.is_convolution:
            hessian = _hessian(walk, layer)
            seen = (source, hessian) if isinstance(source, fx.Node) and not layer.is_convolution else None
        else:
            hessian = seen[1]
        yield layer, hessian


@torch.no_grad()
def _hessian(walk: Walk, layer: WeightLayer) -> torch.Tensor:
    hessian = torch.zeros(())
    for batch in range(len(walk.values)):
        inputs = layer.columns(walk.input(batch, layer.operation, layer.operands.activation)).float()
        if not batch:
            hessian = inputs.new_zeros(len(inputs), inputs.shape[2], inputs.shape[2])
        for one, rows in zip(hessian, inputs, strict=True):
            add_hessian(one, rows)
    return hessian
