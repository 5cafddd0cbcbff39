"""RigL: sparse training in which the entries with the largest gradients grow."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.dynamic_sparsity import DynamicSparsity
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.targets import Target

__all__ = ["RigL"]


@dataclass(kw_only=True, eq=False)
class RigL(DynamicSparsity):
    """Train a sparse model from scratch: at updates the smallest weights leave, those with the largest gradients grow.

    The sparsity is exact from the first step to the last, in each weight. Gradients of entries that are not active are
    kept on update steps only, and the optimizer never sees them. The optimizer takes its step, then the pattern moves.

    Args:
        sparsity: share of the weights that is zero, 0 < sparsity < 1.
        scope: how it is shared: ``"erk"`` (Erdős-Rényi-Kernel: small weights denser), ``"uniform"`` (the same for all
            but the first, which stays dense) or ``"tensor"`` (the same for all).
        every: steps between updates, or `Epochs`.
        end: no more updates from this moment on, as a share of training (float), completed steps (int) or `Epochs`.
        drop: share of the active entries that is exchanged at first; it falls to 0 at `end` along a cosine.
        initial: the first pattern: ``"random"``, for training from scratch, or ``"magnitude"``, for a trained model.
        seed: of the first pattern.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        At t = every, 2 every, ... < T_end, of n active entries floor(f(t) n) with the lowest |w| leave, and as many
        with the highest |dL/dw| grow, at zero; f(t) = drop / 2 (1 + cos(pi t / T_end)).

    Source:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1. There the optimizer skips the
        step of an update.

    Example:
        ```python
        callbacks = [top.RigL(sparsity=0.9, every=100, skip=("classifier",))]
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
        ```
    """

    _dense_gradients: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], init=False, repr=False)

    def _observe(self, progress: Progress) -> None:
        super()._observe(progress)
        self._dense_gradients = {}
        if self._due(progress.step + 1):
            self._dense_gradients = {target.fqn: target.gradient().abs() for target in self._targets}

    def _growth(self, target: Target, step: int) -> torch.Tensor:
        return self._dense_gradients.pop(target.fqn)
