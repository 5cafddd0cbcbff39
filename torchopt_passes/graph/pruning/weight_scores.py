"""Importance from weights: the axes of a group that count, and what the parameters there tell about its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance, units
from torchopt_passes.graph.batch_norm import batch_norms
from torchopt_passes.graph.channels import ChannelGroup, GroupAxis
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.weights import parameter_behind

__all__ = ["WeightScores", "axis_scores"]

aten = torch.ops.aten

_SCALES: dict[object, tuple[int, ...]] = {
    aten.batch_norm.default: (1,),
    aten.instance_norm.default: (1,),
    aten.group_norm.default: (2,),
    aten.layer_norm.default: (2,),
    aten.rms_norm.default: (2,),
    aten.mul.Tensor: (0, 1),  # norms that are written by hand, layer scale
}
_BLOCK = 2**19  # weights that are taken to float64 at a time: they fit a cache


class WeightScores:
    """What the parameters of a graph tell about groups.

    Args:
        graph_module: a captured graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module = graph_module
        first = aliases(graph_module)
        self._parameters = {fqn for fqn, p in graph_module.named_parameters() if p.is_floating_point()}
        self._gammas = {_first(first, norm.gamma) for norm in batch_norms(graph_module.graph)}
        self._scales: set[str | None] = set()
        for node in graph_module.graph.nodes:
            for position in _SCALES.get(node.target, ()) if node.op == "call_function" else ():
                if position < len(node.args):
                    self._scales.add(_first(first, node.args[position]))

    def parameters(self, group: ChannelGroup) -> list[GroupAxis]:
        """Return the axes of a group that are parameters, not buffers."""
        return [axis for axis in group.axes if axis.fqn in self._parameters]

    def counted(self, group: ChannelGroup) -> list[GroupAxis]:
        """Return the axes that count: parameters with two or more dimensions, and scales; no biases.

        Scales are the weights of normalizations and what a value is multiplied by, such as layer scale.
        """
        return [axis for axis in self.parameters(group) if self._ndim(axis) > 1 or axis.fqn in self._scales]

    def scores(self, group: ChannelGroup, axes: Sequence[GroupAxis], name: str, p: float) -> list[torch.Tensor]:
        """Return the scores of each axis that a criterion looks at.

        Args:
            group: the group.
            axes: those that count.
            name: ``"lp"``, ``"lamp"`` (squared norms, for `functional.importance.lamp`), ``"bn_scale"``, ``"fpgm"``.
            p: of the norm.

        Returns:
            One tensor of shape (group.size,) for each axis.
        """
        if name == "bn_scale":
            axes = [axis for axis in self.parameters(group) if axis.fqn in self._gammas]
        elif name == "fpgm":
            axes = [axis for axis in axes if self._ndim(axis) > 1]
        return [self._axis(axis, group.size, name, p) for axis in axes]

    def _axis(self, axis: GroupAxis, size: int, name: str, p: float) -> torch.Tensor:
        tensor = get_tensor(self._module, axis.fqn)
        if name == "fpgm":
            return axis_scores(importance.fpgm(units.channel_rows(tensor, axis.dim)), axis, size)
        if name == "bn_scale":
            return axis_scores(importance.bn_scale(tensor), axis, size)
        step = max(1, _BLOCK * tensor.shape[axis.dim] // max(1, tensor.numel()))
        blocks = tensor.detach().split(step, axis.dim)
        norms = [importance.lp_norm(units.channel_rows(block, axis.dim), p) for block in blocks]
        found = axis_scores(torch.cat(norms), axis, size, p)
        return found.square() if name == "lamp" else found

    def _ndim(self, axis: GroupAxis) -> int:
        return get_tensor(self._module, axis.fqn).ndim


def axis_scores(scores: torch.Tensor, axis: GroupAxis, size: int, p: float = 1.0) -> torch.Tensor:
    """Return the scores of the units of an axis, checked: a NaN would pass for a unit that the axis does not hold.

    Args:
        scores: of the indices of the axis; of the channels of a value, which may hold the axis several times over.
        axis: the axis.
        size: number of units of its group.
        p: see `functional.units.unit_scores`.

    Raises:
        ConfigError: a score is not finite, or has no value at all.
    """
    if scores.is_meta:
        raise ConfigError(f"{axis.fqn} is on the meta device and has no values: only importance='random' works there")
    if not bool(scores.isfinite().all()):
        raise ConfigError(
            f"importance of {axis.fqn} is not finite: NaN or infinity in weights, gradients or activations"
        )
    unit_of = torch.from_numpy(axis.unit_of).repeat(len(scores) // len(axis.unit_of))
    return units.unit_scores(scores.cpu(), unit_of, size, p)  # the axes of a group may lie on several devices


def _first(first: Mapping[str, str], node: Any) -> str | None:
    return first.get(parameter_behind(node) or "")
