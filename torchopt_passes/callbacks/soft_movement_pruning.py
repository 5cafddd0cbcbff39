"""SoftMovementPruning: a threshold on trained scores removes weights, a penalty lowers the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.adam import adam

from torchopt_passes.callbacks.gradual import GradualMasks
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.sharded import part_of, whole
from torchopt_passes.callbacks.targets import Target
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.masks import keep_largest
from torchopt_passes.functional.schedules import Ramp
from torchopt_passes.functional.weight_scores import soft_movement_gradient

__all__ = ["SoftMovementPruning"]


@dataclass(kw_only=True, eq=False)
class SoftMovementPruning(WeightMasks, GradualMasks):
    """Remove the weights whose scores, trained through the mask, fall below a threshold.

    How sparse each weight becomes is learned; `penalty` sets how sparse all together, by trial. For a sparsity that is
    given: ``GradualPruning(criterion="movement")``. Threshold and penalty rise from zero along the schedule. Scores
    are trained by Adam at each optimizer step; they, its moments and the dense weights lie in buffers beside each
    weight while training lasts: five times its memory. Removed weights get no gradient, keep their value, and come
    back when their scores rise.

    Args:
        threshold: tau, on sigmoid(S), in (0, 0.5): scores begin at 0, where the sigmoid is 0.5.
        penalty: lambda > 0 of the mean of sigmoid(S) over each weight; with more weights than one each has its share.
        score_lr: learning rate of the scores; one needs about log((1 - tau) / tau) / score_lr steps to the threshold.
        min_kept: share of each weight that stays however low its scores.
        start: first update of the masks, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise: from then on the masks are frozen; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: a name that `named_shape` knows, or a function from progress in [0, 1] to the share of the way in
            [0, 1].
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        M = 1[sigmoid(S) > tau_t]; S is trained on L(W * M) + lambda_t mean over weights of mean(sigmoid(S)), with
        dL/dS = dL/d(W * M) * W and lambda_t = lambda tau_t / tau.

    Source:
        Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4.2; Lagunas et al. 2021,
        "Block Pruning for Faster Transformers", and its code, for schedules, Adam and `min_kept`.

    Example:
        ```python
        pruning = top.SoftMovementPruning(penalty=100.0, start=0.1, end=0.8)
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
        ```
    """

    threshold: float = 0.1
    penalty: float = 100.0
    score_lr: float = 0.01
    min_kept: float = 0.005

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if not 0.0 < self.threshold < 0.5:
            raise ConfigError(f"threshold must be in (0, 0.5), not {self.threshold}")
        for name in ("penalty", "score_lr"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be > 0, not {getattr(self, name)}")
        if not 0.0 <= self.min_kept < 1.0:
            raise ConfigError(f"min_kept must be in [0, 1), not {self.min_kept}")
        super().__post_init__()

    @property
    def _dense(self) -> bool:
        return True

    @property
    def _masks_gradients(self) -> bool:
        return True

    @property
    def _span(self) -> tuple[float, float]:
        """The thresholds at the first update and from the last one on."""
        return 0.0, self.threshold

    def metrics(self) -> dict[str, float]:
        """Return ``sparsity``, and ``score_penalty``: mean(sigmoid(S)), which lambda multiplies."""
        means = [float(whole(target.state("scores").sigmoid().mean())) for target in self._targets]
        return {**super().metrics(), "score_penalty": sum(means) / len(means)} if means else {}

    def _state(self, target: Target) -> dict[str, torch.Tensor]:
        kinds = ("scores", "scores_mean", "scores_square")
        return {kind: torch.zeros_like(target.weight, dtype=torch.float32) for kind in kinds}

    def _observe(self, progress: Progress) -> None:
        """Train the scores by one step."""
        if self._ramp is None or progress.step >= self._ramp.end:
            return
        if self._unverified:  # before they move away from zero
            self._refuse_lost_scores(progress.step)
        share = self._ramp.at(progress.step) / self.threshold
        penalty = share * self.penalty / len(self._targets)
        gradients = [
            soft_movement_gradient(target.state("scores"), target.weight, target.gradient(), penalty)
            for target in self._targets
        ]
        adam(
            [target.state("scores") for target in self._targets],
            gradients,
            [target.state("scores_mean") for target in self._targets],
            [target.state("scores_square") for target in self._targets],
            [],
            [torch.tensor(float(progress.step)) for _ in self._targets],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.score_lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _choose(self, value: float) -> None:
        """Mask what is below a threshold."""
        for target in self._targets:
            scores = target.state("scores")
            least = part_of(keep_largest(whole(scores), 1.0 - self.min_kept), scores)
            target.choose((scores.sigmoid() > value) | least)

    def _bounds(self, value: float) -> tuple[int, int]:
        return 0, sum(target.weight.numel() for target in self._targets)

    def _verify(self, ramp: Ramp, step: int) -> None:
        """Nothing more: `_observe` has looked at the scores."""

    def _refuse_lost_scores(self, step: int) -> None:
        if step > 0 and not any(bool(whole(target.state("scores").any())) for target in self._targets):
            raise CallbackError(
                f"after step {step} the scores of {type(self).__name__} are all zero: load the model's state_dict, "
                "buffers included, after the callback is installed (attach, or Trainer with callbacks=)"
            )
