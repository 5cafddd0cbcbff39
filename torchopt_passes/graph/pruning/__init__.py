"""Passes that remove weights: masks now, channels and heads next."""

from __future__ import annotations

from torchopt_passes.graph.pruning.prune_weights import MaskWeights, PruneWeights

__all__ = ["MaskWeights", "PruneWeights"]
