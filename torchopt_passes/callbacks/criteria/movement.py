"""Movement: weights leave that training moves towards zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchopt_passes.callbacks.criteria.base import Criterion, needs_gradients
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.functional.weight_scores import movement_gradient

__all__ = ["Movement"]


@dataclass(frozen=True, kw_only=True)
class Movement(Criterion):
    """Rank weights by movement: scores S that gradient descent trains through the mask, straight-through.

    Removed weights keep their value, get no gradient, and come back when their scores rank high enough again. The
    learning rate of the scores is constant, and so does not change their order: it is 1.

    Math:
        S_t = -sum_{i <= t} dL/d(W * M) * W, for all entries of W; M keeps the highest scores.

    Source:
        Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4, equation 3 (hard movement
        pruning).
    """

    name: ClassVar[str] = "movement"
    sees_gradients = True
    dense = True
    masks_gradients = True

    def state(self, target: Target) -> dict[str, torch.Tensor]:
        """Return the scores."""
        return {"scores": torch.zeros_like(target.weight, dtype=torch.float32)}

    def begin(self, student: Student, targets: Sequence[Target], start: int) -> None:
        """Refuse an update before the first step, and begin at zero."""
        needs_gradients(self, start)
        for target in targets:
            target.state("scores").zero_()

    def observe(self, target: Target, step: int, start: int) -> None:
        """Let the scores go down their gradient."""
        target.state("scores").sub_(movement_gradient(target.weight, target.gradient()))

    def scores(self, target: Target) -> torch.Tensor:
        """Return the scores."""
        return target.state("scores")
