"""DynamicSparsity: sparse from the first step to the last, with a pattern that moves."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from torchopt_passes.callbacks.lifecycle import Epochs, Progress, When, check_when
from torchopt_passes.callbacks.optimizer_entries import forget_entries
from torchopt_passes.callbacks.sharded import masks_by, part_of, whole
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.dynamic_sparsity import drop_and_grow, drop_fraction
from torchopt_passes.functional.mask_rules import MaskRule
from torchopt_passes.functional.noise import named_noise

__all__ = ["DynamicSparsity"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class DynamicSparsity(WeightMasks):
    """Each weight is sparse from the beginning; at updates the smallest active entries leave and as many others grow.

    A subclass says which grow (`_growth`). Grown entries begin at zero, with nothing in the optimizer's moments. The
    optimizer sees no gradient of entries that are not active.

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
    """

    sparsity: float = 0.9
    scope: Literal["erk", "uniform", "tensor"] = "erk"
    every: int | Epochs = 100
    end: When = 0.75
    drop: float = 0.3
    initial: Literal["random", "magnitude"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be in (0, 1), not {self.sparsity}")
        if self.scope == "global":  # pyright: ignore[reportUnnecessaryComparison] (a user may write it)
            raise ConfigError('scope must be "erk", "uniform" or "tensor": each weight keeps its own number of entries')
        self._rule = MaskRule(self.scope)
        if not 0.0 < self.drop <= 1.0:
            raise ConfigError(f"drop must be in (0, 1], not {self.drop}")
        if self.initial not in ("random", "magnitude"):
            raise ConfigError(f'initial must be "random" or "magnitude", not {self.initial!r}')
        if not isinstance(self.every, Epochs) and self.every < 1:
            raise ConfigError(f"every must be at least 1 step, not {self.every}")
        check_when(self.end, "end")
        self._last = self._every = 0
        self._unverified = False
        self._seen = 0

    @abstractmethod
    def _growth(self, target: Target, step: int) -> torch.Tensor:
        """Return what ranks the entries that are not active, the highest first to grow, at the update after a step."""

    @property
    def _masks_gradients(self) -> bool:
        return True

    def begin(self, progress: Progress) -> None:
        """Place the updates on the steps of this run, and take the first pattern."""
        self._last, self._every = progress.steps(self.end), max(1, progress.steps(self.every))
        if progress.total_steps is not None and self._last > progress.total_steps:
            raise CallbackError(
                f"the updates end at step {self._last}, but training ends at step {progress.total_steps}"
            )
        super().begin(progress)
        self._unverified = True
        if progress.step == 0:
            with torch.no_grad():
                self._first_pattern()
            self._check_masks()
            self._tell_changed(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Exchange entries if an update is due, and zero what is not active."""
        super().after_step(progress)
        if self._unverified:
            expected = self._rule.removed([target.weight.shape for target in self._targets], self.sparsity)
            self._refuse_lost_masks(progress.step - 1, expected, expected)
            self._unverified = False
        self._apply()
        if self._due(progress.step):
            if self._seen != progress.step:
                logger.info("%s: no update after step %d, which was skipped", type(self).__name__, progress.step)
                return
            for target in self._targets:
                self._exchange(target, progress.step)
            self._check_masks()
            self._tell_changed(progress)

    def _observe(self, progress: Progress) -> None:
        self._seen = progress.step + 1

    def _due(self, step: int) -> bool:
        return 0 < step < self._last and step % self._every == 0

    def _first_pattern(self) -> None:
        scores = {
            t.fqn: named_noise(self.seed, f"0 {t.fqn}", t.weight)
            if self.initial == "random"
            else t.weight.detach().abs()
            for t in self._targets
        }
        found = masks_by(self._rule, scores, self.sparsity)
        for target in self._targets:
            target.choose(found[target.fqn])
        self._apply()

    def _exchange(self, target: Target, step: int) -> None:
        fraction = drop_fraction(step, self._last, self.drop)
        kept, growth = whole(target.weight.abs()), whole(self._growth(target, step))
        found = drop_and_grow(kept, growth, whole(target.mask), fraction)
        mask, grown = (part_of(each, target.weight) for each in found)
        target.choose(mask)
        target.weight.masked_fill_(~mask | grown, 0)
        if self.student is not None and self.student.optimizer is not None:
            forget_entries(self.student.optimizer, target.weight, grown)
