"""What a layer costs at a width: bytes of its weight, and multiply-accumulates times bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.calls import batch_size
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.quantization.layer_rounding import Layer
from torchopt_passes.graph.quantization.operations import Operation
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode
from torchopt_passes.search.sensitivity import FLOAT, Width

__all__ = ["LayerCosts", "count_macs", "layer_costs"]


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """The figures of one layer that its cost at a width follows from.

    Args:
        values: how many numbers its weight has; 0 without a weight.
        scales: how many scales a rounded weight has.
        itemsize: bytes of one of its float numbers.
        kept: whether others read the weight in float too (an embedding tied to it, say): then both are stored.
    """

    values: int = 0
    scales: int = 0
    itemsize: int = 4
    kept: bool = False

    def bytes(self, width: Width) -> int:
        """Return the bytes of the weight: ceil(values * bits / 8) and 4 for each scale; of float its own."""
        whole = self.values * self.itemsize
        if width[0] == FLOAT or not self.values:
            return whole
        return math.ceil(self.values * width[0] / 8) + 4 * self.scales + (whole if self.kept else 0)


def layer_costs(
    graph_module: fx.GraphModule, operations: Iterable[Operation], *, per_channel: bool
) -> dict[str, LayerCosts]:
    """Return the costs of the weights of a graph's matrix operations, by fqn.

    Args:
        graph_module: a captured float graph.
        operations: as `InsertFakeQuant.annotate` found them; those that stay float count as other readers.
        per_channel: whether a weight has a scale for each output channel.
    """
    rounded = [op for op in operations if op.weight is not None and not op.why_float]
    reads: dict[str, set[tuple[str, str]]] = {}
    found: dict[str, LayerCosts] = {}
    for op in rounded:
        if op.weight is not None:
            reads.setdefault(op.weight.fqn, set()).add((op.weight.node.name, op.weight.user.name))
    names = aliases(graph_module)
    for op in rounded:
        weight = op.weight
        if weight is None or weight.fqn in found:
            continue
        tensor = get_tensor(graph_module, weight.fqn)
        own = [n for n in graph_module.graph.nodes if n.op == "get_attr" and names.get(str(n.target)) == weight.fqn]
        edges = {(node.name, user.name) for node in own for user in node.users}
        found[weight.fqn] = LayerCosts(
            values=tensor.numel(),
            scales=int(weight.node.meta["val"].shape[weight.channel_dim]) if per_channel else 1,
            itemsize=tensor.element_size(),
            kept=not weight.computed and bool(edges - reads[weight.fqn]),
        )
    return found


def count_macs(graph_module: fx.GraphModule, layers: Iterable[Layer], context: PassContext) -> dict[str, int]:
    """Return the multiply-accumulates of each layer for one sample, counted by running the example inputs.

    Raises:
        ConfigError: there are no example inputs.
    """
    inputs = context.inputs_for(graph_module)
    if inputs is None:
        raise ConfigError("counting MACs needs inputs: PassContext(example_inputs=(args, kwargs))")
    counter = _Counter(graph_module, layers)
    with in_eval_mode(graph_module), buffers_kept(graph_module):
        counter.run(*flat_inputs(graph_module, *inputs), enable_io_processing=False)
    return {name: round(macs / batch_size(inputs)) for name, macs in counter.macs.items()}


class _Counter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, layers: Iterable[Layer]) -> None:
        super().__init__(graph_module, graph=in_one_mode(graph_module.graph, training=False))
        self._layers = {node: layer.name for layer in layers for node in layer.nodes}
        self.macs = dict.fromkeys(self._layers.values(), 0)

    def run_node(self, n: fx.Node) -> Any:
        name = self._layers.get(n.name)
        if name is None:
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.macs[name] += counter.get_total_flops() // 2
        return value
