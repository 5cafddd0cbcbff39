"""SET: sparse training in which random entries grow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.callbacks.dynamic_sparsity import DynamicSparsity
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.functional.noise import named_noise

__all__ = ["SET"]


@dataclass(kw_only=True, eq=False)
class SET(DynamicSparsity):
    """Train a sparse model from scratch: every `every` steps the smallest weights leave, and random ones grow.

    The sparsity is exact from the first step to the last, in each weight. It needs no gradients of entries that are not
    active; `RigL` uses them, and finds better patterns.

    Args:
        sparsity: share of the weights that is zero, 0 < sparsity < 1.
        scope: how it is shared: ``"erk"`` (Erdős-Rényi-Kernel: small weights denser), ``"uniform"`` (the same for all
            but the first, which stays dense) or ``"tensor"`` (the same for all).
        every: steps between updates, or `Epochs`.
        end: no more updates from this moment on, as a share of training (float), completed steps (int) or `Epochs`.
        drop: share of the active entries that is exchanged at first; it falls to 0 at `end` along a cosine.
        initial: the first pattern: ``"random"``, for training from scratch, or ``"magnitude"``, for a trained model.
        seed: of what is random.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        At t = every, 2 every, ... < T_end, of n active entries floor(f(t) n) with the lowest |w| leave, and as many
        others, drawn uniformly, grow, at zero; f(t) = drop / 2 (1 + cos(pi t / T_end)).

    Source:
        Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
        by network science" (sparse evolutionary training), with the schedule and zeros of Evci et al. 2020, section 4.
    """

    def _growth(self, target: Target, step: int) -> torch.Tensor:
        return named_noise(self.seed, f"{step} {target.fqn}", target.weight)
