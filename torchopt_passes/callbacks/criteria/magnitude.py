"""Magnitude: the smallest weights leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from torchopt_passes.callbacks.criteria.base import Criterion
from torchopt_passes.callbacks.targets import Target

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Rank weights by ``|w|``.

    Args:
        dense: removed weights keep their value, are trained on by the gradient of the masked weight, and come back
            when they have grown (Distiller's ``use_double_copies``); else they stay zero.

    Source:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.
    """

    name: ClassVar[str] = "magnitude"

    dense: bool = False

    def scores(self, target: Target) -> torch.Tensor:
        """Return ``|w|``."""
        weight = target.state("dense") if self.dense else target.weight
        return weight.detach().abs()
