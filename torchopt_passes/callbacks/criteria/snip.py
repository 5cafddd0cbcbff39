"""Snip: weights leave that the loss is least sensitive to, as it was before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from torchopt_passes.callbacks.criteria.base import Criterion, needs_gradients
from torchopt_passes.callbacks.outputs import loss_of
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.errors import CallbackError
from torchopt_passes.functional.weight_scores import sensitivity
from torchopt_passes.graph.calls import as_call

__all__ = ["Snip"]


@dataclass(frozen=True, kw_only=True)
class Snip(Criterion):
    """Rank weights by ``|sum w g|`` at the beginning of training; the ranks never change after that.

    The sum is over the given batches, before the first step, or over the steps up to the first update: with ``start=1``
    over the first batch, as in the paper. ``schedule="one_shot"`` is the paper's single shot; others let the same
    weights go little by little.

    Args:
        batches: inputs of single calls with their labels, in any form of a call (a dict of keyword arguments); the same
            on all ranks. The model must return its loss. Empty for the steps of training.

    Source:
        Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", section 4.1, algorithm 1.

    Example:
        ```python
        top.GradualPruning(sparsity=0.9, criterion=top.Snip(batches=[batch]), start=0, end=0)
        ```
    """

    name: ClassVar[str] = "snip"

    batches: Sequence[Any] = ()

    @property
    def sees_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the steps of training are looked at."""
        return not self.batches

    def state(self, target: Target) -> dict[str, torch.Tensor]:
        """Return the sum."""
        return {"scores": torch.zeros_like(target.weight, dtype=torch.float32)}

    def begin(self, student: Student, targets: Sequence[Target], start: int) -> None:
        """Look at the batches, or refuse an update before the first step."""
        for target in targets:
            target.state("scores").zero_()
        if not self.batches:
            needs_gradients(self, start)
        for batch in self.batches:
            gradients = _gradients(student, [target.weight for target in targets], batch)
            for target, gradient in zip(targets, gradients, strict=True):
                target.state("scores").add_(sensitivity(target.weight, gradient))

    def observe(self, target: Target, step: int, start: int) -> None:
        """Add the steps up to the first update."""
        if step <= start:
            target.state("scores").add_(sensitivity(target.weight, target.gradient()))

    def scores(self, target: Target) -> torch.Tensor:
        """Return the absolute sum."""
        return target.state("scores").abs()


def _gradients(student: Student, weights: list[torch.Tensor], batch: Any) -> list[torch.Tensor]:
    """Return the gradients of the model's own loss in training mode; model, buffers and random numbers stay as is."""
    model = student.model
    args, kwargs = as_call(batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(), student.aside():
            loss = loss_of(torch.func.functional_call(model, buffers, args, kwargs))
            if loss is None:
                raise CallbackError(
                    f"Snip needs the loss of {type(model).__name__} on its batches: give them with labels"
                )
            return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    finally:
        model.train(training)
