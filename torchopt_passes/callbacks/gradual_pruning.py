"""GradualPruning: weights go to zero little by little while the rest learns to do without them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from torchopt_passes.callbacks.criteria import Criterion, Magnitude, named_criterion
from torchopt_passes.callbacks.gradual import GradualMasks
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.sharded import masks_by, part_of, whole
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.mask_rules import MaskRule

__all__ = ["GradualPruning"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class GradualPruning(WeightMasks, GradualMasks):
    """Raise the share of zero weights from `initial_sparsity` to `sparsity` along a schedule.

    Each weight gets a bool buffer ``<name>_mask`` beside it (True: kept), and what the criterion gathers, so that a
    checkpoint holds them and a resumed run goes on exactly. After each optimizer step the removed weights are set to
    zero again. At the end the buffers go and the zeros stay; the names of the weights never change.

    Args:
        sparsity: share of the weights that is zero from the last update on, 0 < sparsity < 1; for ``"N:M"`` patterns
            leave it out, it is 1 - N/M.
        start: first update, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise: from then on the masks are frozen; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: a name that `named_shape` knows (``"cubic"``, ``"linear"``, ``"one_shot"``, ``"polynomial:2"``,
            ``"exponential"``, ...), or a function from progress in [0, 1] to the share of the way in [0, 1].
        initial_sparsity: share at the first update.
        criterion: what ranks the weights: ``"magnitude"``, ``"movement"``, ``"taylor"``, ``"snip"``, ``"random"``, or a
            `Criterion` with options of its own. All but magnitude and random need ``start`` at step 1 or later.
        scope: ``"tensor"`` reaches the share in each weight; ``"global"`` ranks all weights together; ``"uniform"`` is
            ``"tensor"`` with the first weight left dense; ``"erk"`` leaves small weights denser (Erdős-Rényi-Kernel).
        pattern: ``""`` for single weights; ``"N:M"``, reached gradually, the N largest of every M along the
            input dimension are never removed; ``"block RxC"`` for whole blocks.
        mask_gradients: the optimizer sees no gradient of removed weights, so that its moments forget them.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 for t in {t0, t0 + dt, ..., t0 + n dt}, s_f afterwards.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1; criteria and scopes have their own.

    Example:
        ```python
        pruning = top.GradualPruning(sparsity=0.8, start=0.1, end=0.7, skip=("classifier",))
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
        ```
    """

    sparsity: float | None = None
    initial_sparsity: float = 0.0
    criterion: Literal["magnitude", "movement", "taylor", "snip", "random"] | Criterion = "magnitude"
    scope: Literal["tensor", "global", "uniform", "erk"] = "tensor"
    pattern: str = ""
    mask_gradients: bool = False

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        self._rule = MaskRule(self.scope, self.pattern)
        self._criterion = named_criterion(self.criterion)
        share = self._rule.share
        if share is not None:
            if self.sparsity not in (None, share):
                raise ConfigError(f"the sparsity of {self.pattern} is {share}, not {self.sparsity}: leave sparsity out")
            self.sparsity = share
        if self.sparsity is None or not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be in (0, 1), not {self.sparsity}")
        if not 0.0 <= self.initial_sparsity <= self.sparsity:
            raise ConfigError(f"initial_sparsity must be in [0, sparsity], not {self.initial_sparsity}")
        super().__post_init__()

    @property
    def acts_before_step(self) -> bool:
        """Whether anything is to be done before a step."""
        return self._criterion.sees_gradients or super().acts_before_step

    @property
    def _dense(self) -> bool:
        return self._criterion.dense

    @property
    def _masks_gradients(self) -> bool:
        return self.mask_gradients or self._criterion.masks_gradients

    @property
    def _span(self) -> tuple[float, float]:
        """The sparsities at the first update and from the last one on."""
        return self.initial_sparsity, self.sparsity or 0.0

    def begin(self, progress: Progress) -> None:
        """Place the schedule on the steps of this run."""
        if progress.step == 0 and self.student is not None:
            self._criterion.begin(self.student, self._targets, progress.steps(self.start))
        super().begin(progress)

    def _fits(self, target: Target) -> None:
        self._rule.masks({"": whole(target.weight)}, self._span[1], {"": target.input_dim})

    def _state(self, target: Target) -> dict[str, torch.Tensor]:
        return self._criterion.state(target)

    def _observe(self, progress: Progress) -> None:
        if self._ramp is not None and progress.step < self._ramp.end:
            for target in self._targets:
                self._criterion.observe(target, progress.step + 1, self._ramp.start)

    def _choose(self, value: float) -> None:
        """Mask the weights that rank lowest, so many that `value` is the sparsity."""
        seen = (bool(whole(self._criterion.scores(target)).any()) for target in self._targets)
        blind = self._criterion.sees_gradients and not any(list(seen))  # a list: each rank asks for all the same
        if blind:  # a gradient scaler has skipped every step since then
            logger.warning("%s has seen no gradient since the last update: ranked by magnitude", self._criterion.name)
        criterion = Magnitude(dense=self._dense) if blind else self._criterion
        scores = {target.fqn: part_of(criterion.scores(target), target.weight) for target in self._targets}
        if not self._dense:  # what is removed has lost its value: it leaves first
            scores = {t.fqn: scores[t.fqn].float().masked_fill(~t.mask, -torch.inf) for t in self._targets}
        found = masks_by(self._rule, scores, value, {target.fqn: target.input_dim for target in self._targets})
        for target in self._targets:
            target.choose(found[target.fqn])
            self._criterion.chosen(target)

    def _ended(self) -> None:
        self._tell_if_short(self._bounds(self._span[1])[0])

    def _bounds(self, value: float) -> tuple[int, int]:
        """Return how many weights a sparsity removes, all weights together, by the rules of the masks: twice."""
        expected = self._rule.removed([target.weight.shape for target in self._targets], value)
        return expected, expected

    def _reason(self) -> str:
        return f"chosen by {self._criterion.name} while training"
