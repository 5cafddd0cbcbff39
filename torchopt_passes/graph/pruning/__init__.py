"""Passes that remove weights: masks on single weights, channels, heads and blocks for good."""

from __future__ import annotations

from torchopt_passes.graph.pruning.prune_channels import PruneChannels
from torchopt_passes.graph.pruning.prune_weights import MaskWeights, PruneWeights
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices
from torchopt_passes.graph.pruning.resize_attribute import ResizeAttribute
from torchopt_passes.graph.pruning.torch_prune import from_torch_prune, remove_torch_prune, to_torch_prune

__all__ = [
    "MaskWeights",
    "PruneChannels",
    "PruneWeights",
    "RemoveIndices",
    "ResizeAttribute",
    "from_torch_prune",
    "remove_torch_prune",
    "to_torch_prune",
]
