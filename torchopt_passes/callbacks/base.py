"""Callback: one object for every training loop."""

from __future__ import annotations

from torchopt_passes.callbacks.trainer import TrainerEvents

__all__ = ["Callback"]


class Callback(TrainerEvents):
    """Base of every training callback: override the moments of `Lifecycle` that the method needs.

    The same object works in the Hugging Face Trainer, without subclassing it, and in a loop of your own:

    ```python
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    with top.attach(model, optimizer, [callback], total_steps=1000):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ```

    What happens when, in any loop:

    ```text
    callback.install(student)                 Trainer: on_init_end      attach: on entering
    optimizer made, checkpoint loaded
    callback.begin(progress)                  Trainer: on_train_begin   attach: on entering, or load_state_dict
    for step in 1 .. total_steps:
        for micro-batch in the step's micro-batches:
            output = model(**micro-batch)
                callback.take_inputs(...)     in the student's forward pre-hook: inputs that are not for it
                callback.loss_term(call)      in the student's forward hook, in training mode only
            output.loss.backward()
        optimizer.step()
            callback.before_step(progress)    every loop: the optimizer's pre-hook, gradients are final
            callback.after_step(progress)     Trainer: on_optimizer_step   attach: the optimizer's post-hook
        callback.metrics()                    Trainer: on_log           attach: session.metrics()
    callback.finish(optimizer)                Trainer: on_train_end     attach: on leaving, not after an error
    callback.remove()                         Trainer: on_train_end     attach: on leaving, after an error too
    ```

    What a callback does is a function of the completed step and of what is in the model's state_dict, so that
    a run resumed from any checkpoint is bit for bit the run that was never stopped. After an exception inside
    ``Trainer.train`` the Trainer fires no event: train again with the same objects, or call `close`.

    Example:
        >>> class CountSteps(Callback):
        ...     steps = 0
        ...     def after_step(self, progress):
        ...         self.steps = progress.step
        >>> from torch import nn, optim
        >>> from torchopt_passes.callbacks.attach import attach
        >>> import torch
        >>> model, counter = nn.Linear(2, 1), CountSteps()
        >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(model, optimizer, [counter]):
        ...     for _ in range(3):
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        >>> counter.steps
        3
    """

    def close(self) -> None:
        """Remove the callback from its model now, as after an error; safe to call again."""
        if self.student is not None:
            self.student.leave(self)
