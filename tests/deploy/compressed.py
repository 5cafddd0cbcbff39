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
from torchopt_passes.graph.pruning import PruneChannels
from torchopt_passes.graph.quantization import Calibrate, ClusterWeights, ConvertQuantized, InsertFakeQuant


def graph_of(name: str) -> fx.GraphModule:
    module, inputs = get(name)
    return capture(copy.deepcopy(module), kwargs={k: v for k, v in inputs.items() if k != "labels"})


@cache
def compressed(name: str, target: str, kind: str) -> fx.GraphModule:
    """Return the graph of a source: ``int8``, ``pruned qat`` (channels halved, then trained int8) or ``clustered``."""
    graph = graph_of(name)
    inputs = graph.meta["example_inputs"][1]
    context = PassContext(calibration=[inputs])
    if kind == "clustered":
        ClusterWeights(bits=4)(graph, context)
        return graph
    if kind == "pruned qat":
        PruneChannels(ratio=0.5)(graph, context)
    InsertFakeQuant(target=target, reduce_range=saturates(target))(graph, context)
    if kind == "pruned qat":
        train(graph.train(), inputs)
    else:
        Calibrate()(graph, context)
    ConvertQuantized()(graph.eval(), context)
    return graph


def train(graph: fx.GraphModule, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.01)
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        graph(**{name: torch.randn_like(value) for name, value in inputs.items()}).square().mean().backward()
        optimizer.step()
