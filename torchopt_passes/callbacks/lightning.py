"""Callbacks in PyTorch Lightning: one adapter for all of them. Needs the extra ``lightning``."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchopt_passes.callbacks.attach import Session
from torchopt_passes.callbacks.lifecycle import Lifecycle
from torchopt_passes.errors import CallbackError, MissingExtraError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["lightning_callback"]


def lightning_callback(callbacks: Iterable[Lifecycle], *, student: str = "model") -> Any:
    """Return one ``lightning.pytorch.Callback`` that runs the given callbacks.

    Give Lightning one of these, with all callbacks in it. Steps are the optimizer's, as everywhere; masks are in
    Lightning's checkpoints as buffers of the student, the step in the callback's own state.

    Args:
        callbacks: such as `GradualPruning`.
        student: name of the LightningModule's submodule that is trained; ``""`` for the LightningModule itself.

    Raises:
        MissingExtraError: Lightning is not installed.

    Example:
        ```python
        trainer = lightning.Trainer(max_steps=1000, callbacks=[lightning_callback([top.GradualPruning(sparsity=0.8)])])
        ```
    """
    try:
        base: Any = import_module("lightning.pytorch").Callback
    except ImportError as error:
        raise MissingExtraError("lightning", "lightning") from error

    given = tuple(callbacks)

    class Adapter(base):
        """Maps Lightning's events to a `Session`."""

        session: Session | None = None
        logged = 0

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Install before the optimizer is made and a checkpoint is loaded."""
            if stage == "fit":
                self._abandon()
                self.session = Session(_student(pl_module, student), given)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            """Give the optimizer what callbacks brought: it is made by now, and loaded after this."""
            if self.session is not None:
                for optimizer in trainer.optimizers:
                    self.session.train_owned(optimizer)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin: optimizer, weights and length of the run are known."""
            if self.session is None or len(trainer.optimizers) != 1:
                raise CallbackError(f"one optimizer must train the student; Lightning has {len(trainer.optimizers)}")
            steps = trainer.estimated_stepping_batches
            self.logged = trainer.global_step
            total = None if steps == float("inf") else int(steps)
            batches = trainer.num_training_batches
            per_epoch = None if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
            self.session.bind(
                trainer.optimizers[0], total_steps=total, steps_per_epoch=per_epoch, step=trainer.global_step
            )

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            """Log the metrics, after as many optimizer steps as Lightning logs."""
            step = trainer.global_step
            if self.session is not None and step != self.logged and step % trainer.log_every_n_steps == 0:
                self.logged = step
                pl_module.log_dict(self.session.metrics(over_ranks=True))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Finish and remove."""
            if self.session is not None:
                session, self.session = self.session, None
                session.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Remove."""
            self._abandon()

        def _abandon(self) -> None:
            if self.session is not None:
                self.session.abandon()
                self.session = None

    return Adapter()


def _student(pl_module: nn.Module, name: str) -> nn.Module:
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        raise CallbackError(
            f"{type(pl_module).__name__} has no submodule {name!r}: name the trained model with student="
        ) from error
