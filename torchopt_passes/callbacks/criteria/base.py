"""Criterion: what ranks single weights while a model is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.errors import CallbackError

__all__ = ["Criterion", "needs_gradients"]


class Criterion(ABC):
    """Ranks the weights that a `GradualPruning` manages: the lowest scores leave.

    A subclass is its options, and holds nothing of a run: what it gathers lies in buffers beside each weight (`state`),
    so that a resumed run goes on exactly. It overrides `scores`, and of the rest what it needs.
    """

    name: ClassVar[str]
    """What `GradualPruning` calls it."""
    sees_gradients: bool = False
    """Whether it looks at the gradients of each step (`observe`)."""
    dense: bool = False
    """Whether removed weights keep a value, and may come back when they rank high again."""
    masks_gradients: bool = False
    """Whether removed weights get no gradient."""

    def state(self, target: Target) -> dict[str, torch.Tensor]:
        """Return what to keep beside a weight, by the ending of the buffer's name."""
        return {}

    def begin(self, student: Student, targets: Sequence[Target], start: int) -> None:  # noqa: B027
        """Training begins, at step 0; `start` is the step of the first update."""

    def observe(self, target: Target, step: int, start: int) -> None:  # noqa: B027
        """See the final gradient of a weight before optimizer step number `step`; `start` as in `begin`."""

    @abstractmethod
    def scores(self, target: Target) -> torch.Tensor:
        """Return the score of each entry of a weight: shape of the weight, a real dtype."""

    def chosen(self, target: Target) -> None:  # noqa: B027
        """Masks have been chosen by the scores."""


def needs_gradients(criterion: Criterion, start: int) -> None:
    """Refuse an update before the first step.

    Raises:
        CallbackError: there are no gradients yet.
    """
    if start < 1:
        raise CallbackError(f"criterion {criterion.name!r} needs the gradients of a step: give start=1 or later")
