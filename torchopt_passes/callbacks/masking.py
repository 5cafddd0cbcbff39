"""Masking: what all callbacks have in common that remove something by masks."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan

__all__ = ["Masking"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Masking(Callback):
    """Masks in the student's state_dict.

    A subclass applies them (`_apply`) and counts what they remove (`_removed`).
    """

    counted: ClassVar[str] = "weights"
    """What the masks remove."""

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """What is left alone, with the reason; filled when the callback is installed."""
    plan: Plan = field(default=Plan(), init=False, repr=False)
    """What training chose, as a plan that other copies of the model take; filled at the end."""

    @abstractmethod
    def _apply(self) -> None:
        """Set to zero what the masks remove; called without gradients."""

    @abstractmethod
    def _removed(self) -> int:
        """Return how much the masks remove now."""

    def _check_masks(self) -> None:
        """Make sure that all ranks have chosen the same masks; every rank must call it."""
        if self.student is not None:
            self.student.check_masks()

    def _tell_changed(self, progress: Progress) -> None:
        if self.student is not None:
            self.student.tell_changed(progress)

    def _tell_if_short(self, expected: int) -> None:
        """Warn when less is removed than was asked for."""
        if self._removed() < expected:
            logger.warning(
                "%s ends with %d of %d %s removed: training stopped before the last update, or an earlier checkpoint "
                "was loaded as the best",
                type(self).__name__,
                self._removed(),
                expected,
                self.counted,
            )

    def _refuse_lost_masks(self, step: int, least: int, most: int) -> None:
        """Refuse to go on from a checkpoint whose masks were not loaded: what was removed would silently grow back."""
        if not least <= self._removed() <= most:
            expected = f"{least}" if least == most else f"{least} to {most}"
            raise CallbackError(
                f"after step {step} the masks should remove {expected} {self.counted}, but remove {self._removed()}: "
                "load the model's state_dict, masks included, after the callback is installed (attach, or Trainer with "
                "callbacks=), and resume with the options that the checkpoint was made with"
            )
