"""Splicing: connections are cut and spliced again, as their dense weights shrink and grow (dynamic network surgery)."""

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
from torchopt_passes.functional.network_surgery import surgery_limits, surgery_mask
from torchopt_passes.functional.schedules import Ramp

__all__ = ["Splicing"]


@dataclass(kw_only=True, eq=False)
class Splicing(WeightMasks, GradualMasks):
    """Remove weights that fall below one threshold, and take back those that rise above another.

    The model computes with masked weights; the gradient trains the dense ones, those that are removed too, so that a
    connection that was cut by mistake recovers. Thresholds come from each layer's weights at the first update.

    Args:
        sensitivity: c of the thresholds; may be negative.
        overrides: glob on parameter or module names -> c of those; the first that fits counts.
        low: factor of the threshold below which a weight is removed.
        high: factor of the threshold above which it comes back, >= low.
        initial: factor on both thresholds at the first update, in (0, 1]; it rises to 1 along the schedule.
        start: first update, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise: from then on the masks are frozen; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: how `initial` rises: a name that `named_shape` knows, or a function from progress in [0, 1] to the
            share of the way in [0, 1].
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        W <- W - lr dL/d(W * M), all entries; M = 0 where |W| < a, as before where a <= |W| < b, 1 where b <= |W|, with
        a = f_t low max(0, mean|W_0| + c std|W_0|) and b likewise with high.

    Source:
        Guo et al. 2016, "Dynamic Network Surgery for Efficient DNNs", equations 3 and 4; factors 0.9 and 1.1 as in the
        authors' code and in Distiller (splicing_pruner.py).

    Example:
        ```python
        Trainer(model, args, train_dataset=data, callbacks=[top.Splicing(sensitivity=0.3, start=0.0, end=0.7)]).train()
        ```
    """

    sensitivity: float = 0.0
    overrides: dict[str, float] = field(default_factory=dict[str, float])
    low: float = 0.9
    high: float = 1.1
    initial: float = 1.0

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        self._sensitivities = Sensitivities(self.sensitivity, self.overrides, signed=True)
        surgery_limits(torch.zeros(1), 0.0, self.low, self.high)
        if not 0.0 < self.initial <= 1.0:
            raise ConfigError(f"initial must be in (0, 1], not {self.initial}")
        super().__post_init__()

    @property
    def _dense(self) -> bool:
        return True

    @property
    def _span(self) -> tuple[float, float]:
        """The factors on the thresholds at the first update and from the last one on."""
        return self.initial, 1.0

    def install(self, student: Student) -> None:
        """Choose the weights and put a mask that keeps everything beside each."""
        self._sensitivities.check(student.model)
        super().install(student)

    def _state(self, target: Target) -> dict[str, torch.Tensor]:
        return {"limit": torch.zeros(2, dtype=torch.float64, device=target.weight.device)}

    def _choose(self, value: float) -> None:
        """Cut and splice."""
        for target in self._targets:
            dense, limit = target.state("dense"), target.state("limit")
            if not bool(limit.any()):
                limits = surgery_limits(whole(dense), self._sensitivities.of(target.fqn), self.low, self.high)
                limit.copy_(torch.tensor(limits, dtype=torch.float64))
            low, high = (value * limit).tolist()
            target.choose(surgery_mask(dense, target.mask, low, high))

    def _bounds(self, value: float) -> tuple[int, int]:
        return 0, sum(target.weight.numel() for target in self._targets)

    def _verify(self, ramp: Ramp, step: int) -> None:
        self._sensitivities.refuse_lost(self._targets, ramp.last_update(step) is not None, step)
