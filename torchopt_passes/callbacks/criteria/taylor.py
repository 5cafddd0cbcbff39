"""Taylor: weights leave whose removal changes the loss least, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchopt_passes.callbacks.criteria.base import Criterion, needs_gradients
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.functional.weight_scores import squared_change

__all__ = ["Taylor"]


@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Rank weights by ``sum_t (w g)^2`` over the steps since the masks were last chosen.

    Source:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1, equation 8, summed over
        the batches between two removals as in section 3.2.
    """

    name: ClassVar[str] = "taylor"
    sees_gradients = True

    def state(self, target: Target) -> dict[str, torch.Tensor]:
        """Return the sum."""
        return {"scores": torch.zeros_like(target.weight, dtype=torch.float32)}

    def begin(self, student: Student, targets: Sequence[Target], start: int) -> None:
        """Refuse an update before the first step, and begin at zero."""
        needs_gradients(self, start)
        for target in targets:
            target.state("scores").zero_()

    def observe(self, target: Target, step: int, start: int) -> None:
        """Add the step's."""
        target.state("scores").add_(squared_change(target.weight, target.gradient()))

    def scores(self, target: Target) -> torch.Tensor:
        """Return the sum."""
        return target.state("scores")

    def chosen(self, target: Target) -> None:
        """Begin again."""
        target.state("scores").zero_()
