"""torchopt_passes: make PyTorch models small and fast, with every rewrite proven."""

from __future__ import annotations

__version__ = "0.1.0"
