"""SensitivityPruning: weights below a multiple of their layer's standard deviation go to zero."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.gradual import GradualMasks
from torchopt_passes.callbacks.sensitivities import Sensitivities
from torchopt_passes.callbacks.sharded import whole
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import threshold_mask
from torchopt_passes.functional.schedules import Ramp

__all__ = ["SensitivityPruning"]


@dataclass(kw_only=True, eq=False)
class SensitivityPruning(WeightMasks, GradualMasks):
    """Remove weights whose magnitude is below ``s * std`` of their layer; the spread is that at the first update.

    How sparse a layer becomes follows from the spread of its weights: of a normal distribution s = 0.5 removes 38%, and
    s = 1 removes 68%. As training pulls more weights towards zero, the same threshold catches more of them. What is
    removed stays zero.

    Args:
        sensitivity: s > 0, from a sensitivity analysis such as `measure_sensitivity`, or the same for all.
        overrides: glob on parameter or module names -> s of those; the first that fits counts.
        initial: the share of s that holds at the first update, in (0, 1]; it rises to 1 along the schedule.
        start: first update, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise: from then on the masks are frozen; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: how `initial` rises: a name that `named_shape` knows, or a function from progress in [0, 1] to the
            share of the way in [0, 1].
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        m <- m * 1[|w| > f_t s std(w_0)], the standard deviation with n - 1, w_0 the weights at the first update.

    Source:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.1; the
        threshold is set once, as in Distiller (sensitivity_pruner.py), and may grow, as in Han's thesis.

    Example:
        ```python
        pruning = top.SensitivityPruning(sensitivity=0.6, overrides={"classifier": 0.3}, start=0.0, end=0.6)
        ```
    """

    sensitivity: float = 0.5
    overrides: dict[str, float] = field(default_factory=dict[str, float])
    initial: float = 1.0

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        self._sensitivities = Sensitivities(self.sensitivity, self.overrides)
        if not 0.0 < self.initial <= 1.0:
            raise ConfigError(f"initial must be in (0, 1], not {self.initial}")
        super().__post_init__()

    @property
    def _span(self) -> tuple[float, float]:
        """The shares of the thresholds at the first update and from the last one on."""
        return self.initial, 1.0

    def install(self, student: Student) -> None:
        """Choose the weights and put a mask that keeps everything beside each."""
        self._sensitivities.check(student.model)
        super().install(student)

    def _state(self, target: Target) -> dict[str, torch.Tensor]:
        return {"limit": torch.zeros((), dtype=torch.float64, device=target.weight.device)}

    def _choose(self, value: float) -> None:
        """Mask what is below its threshold."""
        for target in self._targets:
            limit = target.state("limit")
            if float(limit) == 0.0:
                limit.fill_(self._sensitivities.of(target.fqn) * float(whole(target.weight).double().std()))
            target.mask.logical_and_(threshold_mask(target.weight, value * float(limit)))

    def _bounds(self, value: float) -> tuple[int, int]:
        return 0, sum(target.weight.numel() for target in self._targets)

    def _verify(self, ramp: Ramp, step: int) -> None:
        self._sensitivities.refuse_lost(self._targets, ramp.last_update(step) is not None, step)
