"""What a training callback is to every loop: the moments of its life, and nothing about any trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from torchopt_passes.errors import CallbackError, ConfigError

if TYPE_CHECKING:
    from torchopt_passes.callbacks.student import Student
    from torchopt_passes.callbacks.student_call import StudentCall

__all__ = ["Epochs", "Lifecycle", "LossTerm", "Progress", "When", "check_when"]


@dataclass(frozen=True)
class Epochs:
    """A moment of training as passes over the data: ``start=Epochs(2)``, in a recipe ``start: {epochs: 2}``.

    It needs a loop that knows the optimizer steps of an epoch: the Trainer and Lightning do, `attach` is told with
    ``steps_per_epoch=``.

    Args:
        count: epochs completed, >= 0; parts of one too.

    Example:
        >>> Progress(0, 300, steps_per_epoch=30).steps(Epochs(1.5))
        45
    """

    count: float

    def __post_init__(self) -> None:
        """Refuse what is no number of epochs."""
        if isinstance(self.count, bool) or not self.count >= 0:
            raise ConfigError(f"Epochs needs a number >= 0, not {self.count!r}")


When = int | float | Epochs
"""A moment of training: completed optimizer steps (int), a share of all steps (float in [0, 1]), or `Epochs`."""


def check_when(when: object, name: str) -> None:
    """Refuse what is no moment of training.

    Raises:
        ConfigError: names the option.
    """
    steps = isinstance(when, int) and not isinstance(when, bool) and when >= 0
    share = isinstance(when, float) and 0.0 <= when <= 1.0
    if not steps and not share and not isinstance(when, Epochs):
        raise ConfigError(
            f"{name} must be a share of training (float in [0, 1]), completed steps (int >= 0) or Epochs, not {when!r}"
        )


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Args:
        step: optimizer steps completed. The same number in every loop: micro-batches of an accumulated step
            count as none.
        total_steps: optimizer steps of the whole run, None if unknown.
        steps_per_epoch: optimizer steps of one pass over the data, None if unknown.
        stepped: whether the last of these steps has changed the weights. False after one that a gradient scaler
            skipped, which the Trainer counts all the same: schedules go on, but what follows an update must not.

    Example:
        >>> Progress(0, 200).steps(0.25), Progress(0, 200).steps(25)
        (50, 25)
    """

    step: int
    total_steps: int | None
    steps_per_epoch: int | None = None
    stepped: bool = True

    def steps(self, when: When) -> int:
        """Return a moment of training as completed optimizer steps.

        Raises:
            CallbackError: `when` is a share and the length of the run is unknown, or epochs and theirs is.
        """
        if isinstance(when, int):
            return when
        if isinstance(when, Epochs):
            if self.steps_per_epoch is None:
                raise CallbackError(
                    f"{when} needs the optimizer steps of an epoch, which are unknown here: give attach "
                    "steps_per_epoch=, a DataLoader with a length, or moments as whole steps"
                )
            return round(when.count * self.steps_per_epoch)
        if self.total_steps is None:
            raise CallbackError(
                f"{when} is a share of training, but its length is unknown: give total_steps=, "
                "or moments as whole steps"
            )
        return round(when * self.total_steps)


@dataclass(frozen=True)
class LossTerm:
    """What a callback adds to the loss of one forward.

    Terms of several callbacks add up in any order: L = (1 - sum of replaces) * hard + sum of values.

    Args:
        value: scalar; a mean over what the model's own loss is a mean over, weight included.
        replaces: share of the model's own (hard) loss that the term stands in for.
    """

    value: torch.Tensor
    replaces: float = 0.0


class Lifecycle:
    """The moments a callback may override; each loop calls them in this order.

    install     before the optimizer is made and before a checkpoint is loaded: add buffers, bring parameters, check
    begin       training begins, or goes on after a resume
    take_inputs before each forward of the student
    stand_ins   before each forward of the student: tensors in the place of parameters
    loss_term   in each training-mode forward of the student
    before_step before each optimizer step, when the gradients are final
    after_step  after each completed optimizer step
    changed     when a callback has changed the structure: other masks, removed units, rewound weights
    metrics     when the loop logs
    finish      at the end, never after an error: what is done to the trained model
    remove      at the end, and after an error: leave nothing behind but the trained weights
    """

    changes_loss: ClassVar[bool] = False
    """Whether the callback has a `loss_term`: then a model that returns no loss is an error."""

    metrics_weight: float = 1.0
    """How much the last `metrics` are means over on this rank, such as labels: its weight in the means over ranks."""

    student: Student | None = None
    """The model the callback is installed on; set by the loop."""

    @property
    def acts_before_step(self) -> bool:
        """Whether `before_step` does anything: then the loop needs an optimizer that tells of its steps."""
        return type(self).before_step is not Lifecycle.before_step

    def install(self, student: Student) -> None:
        """Prepare the model: put buffers beside its weights, bring parameters with `Student.own`.

        Its own parameters must not be removed or replaced: an optimizer and a wrapper may hold them already.
        """

    def begin(self, progress: Progress) -> None:
        """Training begins at `progress`."""

    def before_step(self, progress: Progress) -> None:
        """Act before an optimizer step, which `progress.step` does not count yet; a skipped fp16 step has none.

        The gradients are those that the optimizer will use: over all micro-batches and ranks, clipped by the Trainer,
        without the scale of fp16. The optimizer is ``self.student.optimizer``.
        """

    def after_step(self, progress: Progress) -> None:
        """Act after an optimizer step; `progress.step` counts it.

        The Trainer counts the steps that its gradient scaler skips: then ``progress.stepped`` is False, the weights are
        those of the step before, and `before_step` was not called. In other loops such a step is none.
        """

    def take_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword inputs that reach the model in this forward, in training or evaluation mode."""
        return kwargs

    def stand_ins(self, training: bool) -> Mapping[str, torch.Tensor]:
        """Return tensors that the coming forward computes with in the place of parameters.

        They may be made of the parameters and of others, such as gates: gradients flow to both. In training they stay
        until the step, for gradient checkpointing, which runs parts of the model again in the backward pass.

        Args:
            training: the mode of the student.

        Returns:
            fqn (the first one of a tied parameter) -> tensor of its shape. `Student.claim` it first: nobody else may.
        """
        return {}

    def loss_term(self, call: StudentCall) -> LossTerm | None:
        """Return what to add to the loss of this forward."""

    def changed(self, progress: Progress) -> None:
        """Take note that a callback has changed the structure of the student after `progress.step` steps."""

    def metrics(self) -> dict[str, float]:
        """Return what to log, over the time since the last call."""
        return {}

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Training has ended, on time or early, and not by an error; `remove` follows.

        Args:
            optimizer: the one that trained the model, where the loop knows it.
        """

    def remove(self) -> None:
        """Undo `install`; called exactly once after it."""
