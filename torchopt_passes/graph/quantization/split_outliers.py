"""SplitOutliers: duplicate the channels with the largest weights, and halve these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.equalization import split_channels, split_outliers
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.rescale import Weights, replace_tensor, usable_sites
from torchopt_passes.graph.quantization.scale_pairs import Site
from torchopt_passes.graph.tensors import get_tensor
from torchopt_passes.graph.values import fill_values

__all__ = ["SplitChannels", "SplitOutliers"]

_SPLIT = "split"
"""The key of a node's meta that tells that a weight's channels were split: ratios do not add up."""


class SplitChannels(Edit):
    """Duplicate channels: the weight that reads them, whose fqn is the target, has them halved and once more.

    Args:
        dim: the weight's input channels.
        channels: what is split, step by step; a number past the channels is a copy made at an earlier step.
        made_by: the parameters and buffers that make the channels -> their dimension.
        size: number of channels before.
    """

    on_source = False

    dim: int
    channels: tuple[int, ...]
    made_by: dict[str, int]
    size: int

    def check(self) -> None:
        """Refuse channels that do not exist when they are split."""
        if not self.channels or any(not 0 <= c < self.size + step for step, c in enumerate(self.channels)):
            raise PlanError(f"{self.target}: channels {self.channels} are not those of {self.size} and their copies")

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without these tensors, or with another number of channels."""
        for fqn, dim in {self.target: self.dim, **self.made_by}.items():
            shape = get_tensor(module, fqn).shape
            if dim >= len(shape) or shape[dim] != self.size:
                raise PlanError(f"{fqn} has shape {tuple(shape)}, but the plan was made for {self.size} channels")

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Any]) -> None:
        """Split them all: shapes change, so parameters are new objects and the graph's sizes are filled in anew."""
        if not isinstance(module, fx.GraphModule):
            raise PlanError("channels are split in a captured graph")
        for edit in edits:
            origin = list(range(edit.size))
            for channel in edit.channels:
                origin.append(origin[channel])
            index = torch.tensor(origin)
            with torch.no_grad():
                for fqn, dim in edit.made_by.items():
                    tensor = get_tensor(module, fqn)
                    replace_tensor(module, fqn, tensor.index_select(dim, index.to(tensor.device)))
                replace_tensor(
                    module, edit.target, split_channels(get_tensor(module, edit.target), edit.dim, edit.channels)
                )
            for node in module.graph.find_nodes(op="get_attr"):
                if node.target == edit.target:
                    node.meta[_SPLIT] = True
        fill_values(module)


class SplitOutliers(GraphPass):
    """Outlier channel splitting: the channels with the largest weights are duplicated, and their weights halved.

    The range of the weight shrinks, and with it the step of its grid; the model computes the same with a few more
    channels. For pairs of layers, the first of which makes the channels that the second alone reads, with any
    functions of single values and batch norms between them. Shapes change, so it applies to the captured graph alone;
    run it before `InsertFakeQuant`. It helps grids with one step for a whole weight, not much those with a step for
    each output channel.

    Args:
        ratio: share of channels that is added to each layer, at least one channel.

    Source:
        Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting",
        sections 3.2 and 3.4 (weights, halved evenly).

    Proof:
        Outputs equal those before in float64 within 1e-9.

    Example:
        >>> SplitOutliers(ratio=0.05).recipe()
        {'split_outliers': {'ratio': 0.05}}
    """

    ratio: float = 0.02

    def check(self) -> None:
        """Refuse a ratio outside (0, 1]."""
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(f"SplitOutliers: ratio must be in (0, 1], not {self.ratio}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the channels of each pair of layers."""
        sites, skips = usable_sites(graph_module, context or PassContext(), copies=True)
        done = {str(node.target) for node in graph_module.graph.nodes if node.meta.get(_SPLIT)}
        in_groups = {node.name for node in graph_module.graph.nodes if _groups(node) > 1}
        edits: list[Edit] = []
        for site in sites:
            reason = _why_not(site, done)
            if site.node in in_groups:
                reason = f"{site.name} makes its channels in groups"
            if reason:
                skips.append(Skip(target=site.name, reason=reason))
            else:
                edits.append(self._edit(graph_module, site))
        return Plan(tuple(edits), tuple(skips))

    def _edit(self, graph_module: fx.GraphModule, site: Site) -> SplitChannels:
        (reader,) = site.readers
        weight = get_tensor(graph_module, reader.axis.fqn).detach()
        largest = Weights(graph_module).columns(reader).abs().amax(0).float().cpu()
        channels = split_outliers(largest, math.ceil(self.ratio * site.size))
        after = float(split_channels(weight, reader.axis.dim, channels).abs().max())
        return SplitChannels(
            target=reader.axis.fqn,
            reason=f"its largest weights read channels of {site.name}",
            numbers={"range_before": float(weight.abs().max()), "range_after": after, "channels": float(len(channels))},
            dim=reader.axis.dim,
            channels=channels,
            made_by={axis.fqn: axis.dim for axis in site.makers},
            size=site.size,
        )


def _groups(node: fx.Node) -> int:
    """Return the groups of a convolution."""
    groups: Any = node.args[6] if "aten.conv" in str(node.target) and len(node.args) > 6 else 1
    return groups if isinstance(groups, int) else 1


def _why_not(site: Site, done: set[str]) -> str:
    if len(site.readers) != 1:
        return f"{len(site.readers)} layers read its channels"
    (reader,) = site.readers
    if reader.axis.fqn in done:
        return "nothing to do: split already"
    if reader.axis.groups > 1:
        return f"{reader.axis.fqn} reads its channels in groups"
    if not torch.equal(reader.index, torch.arange(site.size)):
        return f"{reader.axis.fqn} reads each of its channels more than once"
    return ""
