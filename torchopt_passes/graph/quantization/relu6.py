"""ReLU6 between two layers that are scaled: replaced by ReLU, or given a bound for each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.quantization.scale_flow import upper_bound
from torchopt_passes.graph.state import free_name, store

__all__ = ["BoundReLU6", "ReplaceReLU6"]

aten = torch.ops.aten


class ReplaceReLU6(Edit):
    """Let a ReLU6, the node that is the target, be a ReLU: no bound that all channels share."""

    on_source = False

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without that ReLU6."""
        _find(module, self.target)

    def apply(self, module: nn.Module) -> None:
        """Replace the operation; its node keeps its name."""
        _as_relu(_find(module, self.target))

    def on(self, x: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """Return what it computes afterwards, in the units of before."""
        del node
        return torch.relu(x)


class BoundReLU6(Edit):
    """Let a ReLU6, the node that is the target, have the bound u / s: what it computes is divided by s, exactly.

    It becomes a ReLU, and a minimum with a buffer behind it.

    Args:
        scale: s, by which what it reads is divided; as the value, with sizes of 1 where it is the same.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.1:
        f(s x) = s f'(x) for piece-wise linear f, whose breakpoints are divided by s.
    """

    on_source = False

    scale: torch.Tensor

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without that ReLU6."""
        _find(module, self.target)

    def apply(self, module: nn.Module) -> None:
        """Store the bounds and insert the minimum."""
        node = _find(module, self.target)
        bound, example = self._bound(node), node.meta["val"]
        _as_relu(node)
        name = free_name(module, f"{self.target}_bound")  # pyright: ignore[reportArgumentType]
        store(module, name, bound.to(dtype=example.dtype, device=example.device), parameter=False)  # pyright: ignore
        users = list(node.users)
        with node.graph.inserting_after(node):
            held = node.graph.get_attr(name)
        with node.graph.inserting_after(held):
            bounded = node.graph.call_function(aten.minimum.default, (node, held))
        held.meta["val"] = module.get_buffer(name)
        bounded.meta = {k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta}
        for user in users:
            user.replace_input_with(node, bounded)

    def on(self, x: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """Return what it computes afterwards, in the units of before: the stored bound is rounded to its dtype."""
        bound = self._bound(node).to(node.meta["val"].dtype)
        exact = bound.to(x) * self.scale.to(x)
        return torch.minimum(torch.relu(x), exact)

    def _bound(self, node: fx.Node) -> torch.Tensor:
        return (upper_bound(node) or 0.0) / self.scale.double()


def _find(module: nn.Module, name: str) -> fx.Node:
    nodes: dict[str, Any] = {node.name: node for node in module.graph.nodes}  # pyright: ignore
    node = nodes.get(name)
    if node is None or upper_bound(node) is None:
        raise PlanError(f"the graph has no ReLU6 {name!r}")
    return node


def _as_relu(node: fx.Node) -> None:
    node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
