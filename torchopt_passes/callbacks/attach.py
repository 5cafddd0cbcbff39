"""attach: callbacks in a training loop of your own, and in Accelerate's."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchopt_passes.callbacks.lifecycle import Lifecycle, Progress
from torchopt_passes.callbacks.optimizer_steps import after_each_step
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.ranks import mean_over_ranks

__all__ = ["Session", "attach"]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    callbacks: Iterable[Lifecycle],
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
) -> Session:
    """Return a session that runs the callbacks while the optimizer trains the model.

    Steps are counted by the optimizer itself, so gradient accumulation and skipped fp16 steps count right.
    Attach before a checkpoint is loaded: masks are loaded with the model's state_dict. Callbacks that bring parameters
    (projectors, gates, exits) give them to the optimizer: attach these before a learning-rate scheduler is made and
    before the model is wrapped.

    Args:
        model: the student, wrapped in DistributedDataParallel or not.
        optimizer: the one that trains it; Accelerate's wrapper will do.
        callbacks: such as `GradualPruning`; their order does not matter.
        total_steps: optimizer steps of the whole run; moments given as shares of training need it.
        steps_per_epoch: optimizer steps of one pass over the data; moments given as `Epochs` need it.

    Returns:
        The session, a context manager; it is active at once, and leaving it removes the callbacks.

    Raises:
        CallbackError: a callback is in use, the optimizer does not train this model, or cannot take the parameters that
            a callback brings.

    Example:
        A loop, and how it resumes:

        ```python
        with top.attach(model, optimizer, callbacks, total_steps=1000) as session:
            if resume:                            # after attach
                model.load_state_dict(...); optimizer.load_state_dict(...)
                session.load_state_dict(...)      # {"step": ...}
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ```

        Accelerate:

        ```python
        session = top.attach(model, optimizer, callbacks, total_steps=1000)   # before or after prepare
        accelerator.register_for_checkpointing(session)
        ...
        session.close()
        ```
    """
    session = Session(model, callbacks)
    try:
        session.bind(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    except BaseException:
        session.abandon()
        raise
    return session


class Session:
    """Callbacks at work on one model; made by `attach`, or in two moves where the optimizer comes later.

    Args:
        model: see `attach`.
        callbacks: see `attach`; they are installed at once.

    Raises:
        CallbackError: a callback is in use.
    """

    def __init__(self, model: nn.Module, callbacks: Iterable[Lifecycle]) -> None:
        self.callbacks = tuple(callbacks)
        self.step = 0
        """Optimizer steps completed."""
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._student = Student.of(model)
        self._handle: RemovableHandle | None = None
        self._refuse_busy()
        try:
            for callback in self.callbacks:
                self._student.join(callback)
        except BaseException:
            self.abandon()
            raise

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        step: int = 0,
    ) -> None:
        """Follow an optimizer from now on, and begin.

        Args:
            optimizer: see `attach`.
            total_steps: see `attach`.
            steps_per_epoch: see `attach`.
            step: optimizer steps completed so far, in a resumed run.

        Raises:
            CallbackError: the optimizer does not train this model, or the session has one.
        """
        if self._handle is not None:
            raise CallbackError("the session follows an optimizer already")
        if total_steps is not None and total_steps < 1:
            raise CallbackError(f"total_steps must be at least 1, not {total_steps}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise CallbackError(f"steps_per_epoch must be at least 1, not {steps_per_epoch}")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper forwards `step` to the real one
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in self._student.model.parameters()):
            raise CallbackError("the optimizer holds no parameter of this model: make it from model.parameters()")
        self.train_owned(optimizer)
        self.optimizer, self.step = optimizer, step
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._student.follow(optimizer, lambda: self.progress)
        self._handle = after_each_step(optimizer, self._stepped)
        self._begin()

    def train_owned(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train the parameters that callbacks brought; `bind` does it, where that is not too late.

        Raises:
            CallbackError: the optimizer cannot take them: a learning-rate scheduler follows it already.
        """
        self._student.train_owned(optimizer)

    @property
    def progress(self) -> Progress:
        """Where training is."""
        return Progress(self.step, self.total_steps, self.steps_per_epoch)

    def metrics(self, *, over_ranks: bool = False) -> dict[str, float]:
        """Return what the callbacks have to log, over the time since the last call.

        Args:
            over_ranks: means over all ranks, which must all call it; else of this rank.
        """
        found: dict[str, float] = {}
        for callback in self.callbacks:
            own = callback.metrics()  # before its weight
            found |= mean_over_ranks(own, weight=callback.metrics_weight) if over_ranks else own
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the model and the optimizer: the step."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            CallbackError: it is not the state of a session.
        """
        step = state_dict.get("step")
        if set(state_dict) != {"step"} or not isinstance(step, int) or step < 0:
            raise CallbackError(f"not the state of a session, which is {{'step': int}}: {state_dict!r}")
        self.step = step
        self._begin()

    def close(self) -> None:
        """Training has ended: let the callbacks finish, and remove them and the hooks; safe to call again."""
        try:
            for callback in self.callbacks if self._handle is not None else ():
                if callback.student is self._student:
                    callback.finish(self.optimizer)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Training is broken off: remove the callbacks and hooks, and leave the model as it is."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        for callback in self.callbacks:
            self._student.leave(callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _refuse_busy(self) -> None:
        if len(set(map(id, self.callbacks))) != len(self.callbacks):
            raise CallbackError("the same callback is given twice")
        busy = [*(c for c in self.callbacks if c.student is not None), *self._student.callbacks]
        if busy:
            names = ", ".join(dict.fromkeys(type(callback).__name__ for callback in busy))
            raise CallbackError(f"{names} at work already: close that session, or the callback, first")

    def _begin(self) -> None:
        for callback in self.callbacks:
            callback.begin(self.progress)

    def _stepped(self) -> None:
        self.step += 1
        for callback in self.callbacks:
            callback.after_step(self.progress)
