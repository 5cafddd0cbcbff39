"""Graphs as a user brings them to a runtime: calibrated, trained with rounding, pruned, clustered."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import fx

from tests.deploy.sources import get
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.inference import named_outputs
from torchopt_passes.graph.pruning import PruneChannels
from torchopt_passes.graph.quantization import Calibrate, ClusterWeights, ConvertQuantized, InsertFakeQuant


def graph_of(name: str) -> fx.GraphModule:
    module, inputs = get(name)
    return capture(copy.deepcopy(module), kwargs={k: v for k, v in inputs.items() if k != "labels"})


@cache
def compressed(name: str, target: str, kind: str) -> fx.GraphModule:
    """Return the graph of a source, compressed for a target.

    Args:
        name: of the source: ``plain`` or ``bert``.
        target: whose grids are used.
        kind: ``int8`` (calibrated), ``qat`` (int8, trained), ``pruned qat`` (half of the channels, then int8, trained)
            or ``clustered`` (16 values a weight).
    """
    graph = graph_of(name)
    inputs = graph.meta["example_inputs"][1]
    context = PassContext(calibration=[inputs])
    if kind == "clustered":
        ClusterWeights(bits=4)(graph, context)
        return graph
    if kind == "pruned qat":
        PruneChannels(ratio=0.5)(graph, context)
    InsertFakeQuant(target=target, reduce_range=saturates(target))(graph, context)
    if kind == "int8":
        Calibrate()(graph, context)
    else:
        train(graph.train(), inputs)
    ConvertQuantized()(graph.eval(), context)
    return graph


def train(graph: fx.GraphModule, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.01)
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        call = {key: torch.randn_like(x) if x.is_floating_point() else x for key, x in inputs.items()}
        (result,) = (value for _, value in named_outputs(graph(**call)))
        result.square().mean().backward()
        optimizer.step()


def inputs_of(name: str, batch: int) -> dict[str, torch.Tensor]:
    """Return a call of a source that was not seen at export, at any batch."""
    _, example = get(name)
    generator = torch.Generator().manual_seed(batch)
    rows = torch.arange(batch) % 2
    return {
        key: torch.randn(batch, *value.shape[1:], generator=generator) if value.is_floating_point() else value[rows]
        for key, value in example.items()
        if key != "labels"
    }
