"""A callback in the Hugging Face Trainer: its events, one by one, without importing Transformers.

The Trainer calls the events by name and asks for no base class, so the same object serves it and every other loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchopt_passes._compat import calling_trainer, count_shifted_labels
from torchopt_passes.callbacks.items import shifts_labels
from torchopt_passes.callbacks.lifecycle import Lifecycle, Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.ranks import mean_over_ranks

__all__ = ["TrainerEvents"]


class TrainerEvents(Lifecycle):
    """The events of ``transformers.TrainerCallback``, each mapped to a moment of the `Lifecycle`."""

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Install: before the optimizer is made, a checkpoint loaded, the model wrapped."""
        if getattr(args, "n_gpu", 1) > 1:
            raise CallbackError(
                f"{type(self).__name__} cannot work under nn.DataParallel ({args.n_gpu} GPUs in one process): "
                "start the script with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.student is not None and self.student.model is model:
            self.student.leave(self)  # an earlier run ended in an error: begin anew
        student = Student.of(model)
        student.join(self)
        trainer = calling_trainer()
        if trainer is not None and student.owns(self):
            _train_owned(trainer, student)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Start. Everything is in place now: a resumed run has its weights, and ``state.global_step`` its step."""
        student = Student.of(model)
        student.join(self)  # a no-op, but for model_init, and callbacks added after Trainer.__init__
        trainer = calling_trainer()
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))  # Accelerate's has it inside
        if student.owns(self) and optimizer is not None:
            student.train_owned(optimizer)
        if trainer is not None:
            self._check(trainer)
            _count_items(trainer, student)
            _put_first(trainer, self)
        data = kwargs.get("train_dataloader")
        student.follow(optimizer, lambda: _progress(args, state, data))
        self.begin(_progress(args, state, data))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step. Fired once for an accumulated step, after the update and before ``global_step`` is counted up.

        The Trainer fires it, and counts up, for a step too that its gradient scaler has skipped.
        """
        progress = _progress(args, state, kwargs.get("train_dataloader"), done=1)
        stepped = self.student is None or self.student.took(progress.step)
        self.after_step(replace(progress, stepped=stepped))

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **kwargs: Any) -> None:
        """Add the metrics, means over the ranks, to the logs, for all that reads them, and to ``state.log_history``."""
        if "loss" not in logs:
            return
        own = self.metrics()  # before its weight
        if metrics := mean_over_ranks(own, weight=self.metrics_weight):
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Finish, remove. The best model is loaded already if asked for; the last weights are the user's to save."""
        optimizer = kwargs.get("optimizer")
        try:
            self.finish(getattr(optimizer, "optimizer", optimizer))
        finally:
            Student.of(model).leave(self)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def _check(self, trainer: Any) -> None:
        """Refuse, before the first batch, a Trainer that takes the labels away from the model."""
        if self.changes_loss and (trainer.compute_loss_func is not None or trainer.label_smoother is not None):
            what = "compute_loss_func" if trainer.compute_loss_func is not None else "label_smoothing_factor"
            raise CallbackError(
                f"{type(self).__name__} adds to the loss that the model returns, but with {what} the Trainer "
                "computes the loss itself, from labels that the model never sees: leave it out, or call loss(...) in "
                "your compute_loss"
            )


def _progress(args: Any, state: Any, data: Any, done: int = 0) -> Progress:
    """Return where the Trainer is, `done` steps after those that it has counted."""
    try:
        batches = len(data)
    except TypeError:  # no DataLoader, or one over a stream
        return Progress(state.global_step + done, state.max_steps)
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return Progress(state.global_step + done, state.max_steps, per_epoch)


def _count_items(trainer: Any, student: Student) -> None:
    """Make the Trainer count labels over the whole accumulated step and pass the count to the student's hook.

    By itself it does so only for a forward with ``**kwargs``; for another it averages the micro-batches'
    means, which is wrong for ragged labels, and heads that have ``**kwargs`` but ignore the count get a
    gradient too large by the number of micro-batches (transformers issue 47688). A Trainer that computes the
    loss itself is left as it is, and one that was told to divide by the number of micro-batches
    (``loss_is_scaled_for_ga = False``) does only that.
    """
    own_loss = type(trainer).compute_loss.__module__ != "transformers.trainer"
    sequence_parallel = getattr(getattr(trainer.accelerator, "parallelism_config", None), "sp_enabled", False)
    if own_loss or sequence_parallel:
        return
    accepted = trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga is not False
    shifted = count_shifted_labels(trainer, shifts_labels(student.model))

    def undo() -> None:
        trainer.model_accepts_loss_kwargs = accepted
        count_shifted_labels(trainer, shifted)

    student.at_end(undo)


def _train_owned(trainer: Any, student: Student) -> None:
    """Give what callbacks brought to the optimizer as soon as it is made: before its scheduler, and its checkpoint."""
    before = vars(trainer).get("create_optimizer")
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        student.train_owned(getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def undo() -> None:
        vars(trainer).pop("create_optimizer")
        if before is not None:
            trainer.create_optimizer = before

    trainer.create_optimizer = create_optimizer
    student.at_end(undo)


def _put_first(trainer: Any, callback: TrainerEvents) -> None:
    """Let a callback add its metrics before TensorBoard's and the like, which the Trainer puts in front, read them."""
    handler = trainer.callback_handler
    # a new list: the handler is iterating over the old one
    handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
