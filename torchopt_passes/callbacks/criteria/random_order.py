"""RandomOrder: weights leave in random order, the baseline that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from torchopt_passes.callbacks.criteria.base import Criterion
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.functional.noise import named_noise

__all__ = ["RandomOrder"]


@dataclass(frozen=True, kw_only=True)
class RandomOrder(Criterion):
    """Rank weights at random, by an order that is drawn once: from the seed and the name of the weight.

    Args:
        seed: of the order.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(self, target: Target) -> torch.Tensor:
        """Return the same uniform numbers each time, on every device and rank."""
        return named_noise(self.seed, target.fqn, target.weight)
