"""CompressionAwareLR: more learning rate where the model was just changed, whatever the schedule."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.rewarm import Rewarm, raised

__all__ = ["CompressionAwareLR"]

logger = logging.getLogger(__name__)

_STATE = "compression_aware_lr"


@dataclass(kw_only=True, eq=False)
class CompressionAwareLR(Callback):
    """Raise the learning rate again after each change that another callback makes to the structure of the model.

    A schedule that only falls leaves late changes too little to recover with. After new masks, removed units or
    rewound weights the rate goes up to a share of its initial value in `warmup` steps, stays there for `plateau` steps
    and goes back to the schedule in `decay` steps; changes that follow each other closely make one plateau.

    It works over any scheduler of torch, the Trainer's own too: the rate is raised before each optimizer step and given
    back after it, so that the scheduler finds what it set, and ends on time. What it needs lies in a buffer of the
    model, so that a resumed run goes on exactly.

    Args:
        peak: share of each group's initial learning rate to go up to, > 0; rates above it are left alone.
        warmup: steps (int), share of training (float) or `Epochs` of the way up.
        plateau: likewise, at the peak.
        decay: likewise, of the way back to the schedule.

    Math:
        lr_t = max(s_t, s_t + b_t (peak * lr_0 - s_t)), s_t of the schedule; b_t rises by 1 / warmup in the warmup +
        plateau steps after a change, falls by 1 / decay after those, within [0, 1].

    Source:
        Raising the rate again after pruning: Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network
        Pruning", section 2 (learning-rate rewinding); Le and Hua 2021, "Network Pruning That Matters", section 3 (large
        and cyclic restarts). The form over a schedule is this library's.

    Example:
        ```python
        callbacks = [top.GradualChannelPruning(ratio=0.5, example_inputs=batch), top.CompressionAwareLR(peak=0.5)]
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
        ```
    """

    peak: float = 0.5
    warmup: When = 0.01
    plateau: When = 0.02
    decay: When = 0.05

    _rewarm: Rewarm | None = field(default=None, init=False, repr=False)
    _lent: list[tuple[dict[str, Any], Any]] = field(default_factory=list[Any], init=False, repr=False)
    _rate: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if not 0.0 < self.peak < float("inf"):
            raise ConfigError(f"peak must be > 0, not {self.peak}")
        for name in ("warmup", "plateau", "decay"):
            check_when(getattr(self, name), name)

    def install(self, student: Student) -> None:
        """Put the buffer into the model: the step of the last change (-1: none), and the level of `Rewarm`."""
        model = student.model
        if hasattr(model, _STATE) and _STATE not in model._buffers:
            raise CallbackError(f"{type(model).__name__} has a {_STATE} already: rename that first")
        student.claim("the learning rate", self)
        device = next((parameter.device for parameter in model.parameters()), None)
        model.register_buffer(_STATE, torch.tensor([-1, 0], device=device))

    def begin(self, progress: Progress) -> None:
        """Place the three parts on the steps of this run."""
        warmup, plateau, decay = (progress.steps(when) for when in (self.warmup, self.plateau, self.decay))
        self._rewarm = Rewarm(max(1, warmup), plateau, max(1, decay))

    def changed(self, progress: Progress) -> None:
        """Begin to raise the rate, from the next step on."""
        if (state := self._state()) is not None:
            state[0] = progress.step

    def before_step(self, progress: Progress) -> None:
        """Raise the rate of each group."""
        state = self._state()
        optimizer = self.student.optimizer if self.student is not None else None
        if state is None or optimizer is None or self._rewarm is None:
            return
        self._give_back()
        last, level = state.tolist()
        level = self._rewarm.next(level, progress.step - last if last >= 0 else None)
        state[1] = level
        for group in optimizer.param_groups:
            peak = self.peak * float(group.get("initial_lr", optimizer.defaults["lr"]))
            rate = raised(float(group["lr"]), peak, self._rewarm.share(level))
            self._lend(group, rate)
        self._rate = float(optimizer.param_groups[0]["lr"])

    def after_step(self, progress: Progress) -> None:
        """Give the rates back to the schedule."""
        self._give_back()

    def metrics(self) -> dict[str, float]:
        """Return ``learning_rate``: that of the last step, in the first group; the Trainer logs its schedule's."""
        return {} if self._rate is None else {"learning_rate": self._rate}

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Tell if there was nothing to do."""
        state = self._state()
        if state is not None and int(state[0]) < 0:
            logger.warning(
                "CompressionAwareLR: no callback has changed the model, so the learning rate was never raised"
            )

    def remove(self) -> None:
        """Take the buffer away."""
        self._give_back()
        if self.student is not None:
            self.student.model._buffers.pop(_STATE, None)
        self._rewarm = self._rate = None

    def _state(self) -> torch.Tensor | None:
        return self.student.model._buffers.get(_STATE) if self.student is not None else None

    def _lend(self, group: dict[str, Any], rate: float) -> None:
        """Set the rate of a group; as a tensor (capturable optimizers, torchao) in place, which they ask for."""
        before = group["lr"]
        if isinstance(before, torch.Tensor):
            self._lent.append((group, before.clone()))
            before.fill_(rate)
        else:
            self._lent.append((group, before))
            group["lr"] = rate

    def _give_back(self) -> None:
        while self._lent:
            group, before = self._lent.pop()
            if isinstance(before, torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
