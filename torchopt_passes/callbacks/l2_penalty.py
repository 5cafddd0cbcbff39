"""L2Penalty: chosen weights are kept small."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.penalty import Form, check_form, learning_rates
from torchopt_passes.callbacks.weight_penalty import WeightPenalty

__all__ = ["L2Penalty"]


@dataclass(kw_only=True, eq=False)
class L2Penalty(WeightPenalty):
    """Make the squares of the weights costly: weight decay for the weights that globs choose.

    The proximal form shrinks the weights after each optimizer step, whatever the optimizer's preconditioner does, as
    the decoupled weight decay of AdamW; the gradient form adds ``strength * w`` to the gradients, as the penalty in the
    loss would, and as SGD's ``weight_decay`` does.

    Args:
        strength: factor of the penalty, > 0.
        form: ``"proximal"`` or ``"gradient"``.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        p(w) = strength / 2 * sum w^2; proximal: w <- w / (1 + lr * strength) after each step.

    Source:
        Hoerl and Kennard 1970, "Ridge Regression"; decoupled: Loshchilov and Hutter 2019, "Decoupled Weight Decay
        Regularization"; the step: Parikh and Boyd 2014, "Proximal Algorithms", section 6.1.1.

    Raises:
        CallbackError: the optimizer does not hold a weight (proximal form).

    Example:
        ```python
        Trainer(model, args, train_dataset=data, callbacks=[top.L2Penalty(strength=0.1, include=("head*",))]).train()
        ```
    """

    form: Form = "proximal"

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        check_form(self.form)

    def penalty(self) -> torch.Tensor:
        """Return ``strength / 2 * sum w^2``."""
        return self.strength / 2 * torch.stack([weight.square().sum() for weight in self._wide()]).sum()

    def before_step(self, progress: Progress) -> None:
        """Add the gradient, in the gradient form."""
        if self.form == "gradient":
            super().before_step(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Take the proximal step, in the proximal form; none where the optimizer took none."""
        if self.form == "proximal" and progress.stepped and self.student is not None:
            rates = learning_rates(self.student.optimizer, {t.fqn: t.weight for t in self._targets})
            for target in self._targets:
                target.weight.div_(1.0 + rates[target.fqn] * self.strength)
