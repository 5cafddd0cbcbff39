"""GradualMasks: what callbacks that remove more and more along a schedule have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.lifecycle import Epochs, Progress, When, check_when
from torchopt_passes.callbacks.masking import Masking
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.schedules import Ramp, Shape, named_shape

__all__ = ["GradualMasks"]


@dataclass(kw_only=True, eq=False)
class GradualMasks(Masking):
    """Masks that follow a schedule.

    A subclass says from which value to which the schedule goes (`_span`), makes the masks for a value (`_choose`), and
    knows how much they then remove (`_bounds`).

    Args:
        start: first update, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: a name that `named_shape` knows, or a function from progress in [0, 1] to the share of the way in
            [0, 1].
    """

    start: When = 0.1
    end: When = 0.7
    every: int | Epochs | None = None
    schedule: str | Shape = "cubic"

    _ramp: Ramp | None = field(default=None, init=False, repr=False)
    _unverified: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a schedule that is wrong in any training."""
        check_when(self.start, "start")
        check_when(self.end, "end")
        self._shape = named_shape(self.schedule, *self._shares)
        if self.every is not None and not (isinstance(self.every, Epochs) or self.every >= 1):
            raise ConfigError(f"every must be at least 1 step, not {self.every}")

    @property
    @abstractmethod
    def _span(self) -> tuple[float, float]:
        """The values of the schedule at its first update and from its last one on."""

    @property
    def _shares(self) -> tuple[float, float]:
        """The shares that are removed at the first update and from the last one on."""
        return self._span

    @abstractmethod
    def _choose(self, value: float) -> None:
        """Set the masks for a value of the schedule."""

    @abstractmethod
    def _bounds(self, value: float) -> tuple[int, int]:
        """Return the least and the most that masks for a value of the schedule remove."""

    def begin(self, progress: Progress) -> None:
        """Place the schedule on the steps of this run."""
        start, end = progress.steps(self.start), progress.steps(self.end)
        if progress.total_steps is not None and end > progress.total_steps:
            raise CallbackError(f"the last update is at step {end}, but training ends at step {progress.total_steps}")
        every = progress.steps(self.every) if self.every is not None else (end - start) // 100
        initial, final = self._span
        self._ramp = Ramp(initial=initial, final=final, start=start, end=end, every=max(1, every), shape=self._shape)
        self._unverified = True
        if progress.step == 0 and self._ramp.is_update(0):
            self._update(self._ramp.at(0), progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Remove more if an update is due, and zero what is removed so far."""
        if self._ramp is None:
            raise CallbackError(f"{type(self).__name__} got a step before training began")
        if self._unverified:
            self._verify(self._ramp, progress.step - 1)
            self._unverified = False
        if self._ramp.is_update(progress.step):
            self._update(self._ramp.at(progress.step), progress)
        self._apply()

    @torch.no_grad()
    def _update(self, value: float, progress: Progress) -> None:
        before = self._removed()
        self._choose(value)
        self._check_masks()
        self._apply()
        if self._removed() != before:
            self._tell_changed(progress)

    def _verify(self, ramp: Ramp, step: int) -> None:
        """Refuse a checkpoint without its masks; `step` is the last one that it has."""
        least, most = self._bounds(ramp.at(step)) if ramp.last_update(step) is not None else (0, 0)
        self._refuse_lost_masks(step, least, most)
