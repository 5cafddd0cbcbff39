"""Passes that make one operation of several."""

from __future__ import annotations

from torchopt_passes.graph.fusion.fuse_batch_norm import FoldBatchNorm, FuseBatchNorm

__all__ = ["FoldBatchNorm", "FuseBatchNorm"]
