"""L1Penalty: single weights become zero while training goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.penalty import Form, check_form, learning_rates
from torchopt_passes.callbacks.weight_penalty import WeightPenalty
from torchopt_passes.functional.masks import sparsity_of
from torchopt_passes.functional.penalties import soft_threshold

__all__ = ["L1Penalty"]


@dataclass(kw_only=True, eq=False)
class L1Penalty(WeightPenalty):
    """Make the sum of the magnitudes of the weights costly, so that those which matter least become zero.

    The proximal form moves each weight towards zero after each optimizer step, by its learning rate times `strength`,
    and leaves it exactly at zero when it gets there; whatever the optimizer's preconditioner does, as decoupled weight
    decay does it. The gradient form adds ``strength * sign(w)`` to the gradients, as the penalty in the loss would:
    weights come near zero, and hardly any is.

    Args:
        strength: factor of the penalty, > 0.
        form: ``"proximal"`` or ``"gradient"``.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        p(w) = strength * sum |w|; proximal: w <- sign(w) max(|w| - lr * strength, 0) after each step.

    Source:
        Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso"; the step: Parikh and Boyd 2014, "Proximal
        Algorithms", section 4.2 (the proximal gradient method) and equation 6.9.

    Raises:
        CallbackError: the optimizer does not hold a weight (proximal form).

    Example:
        ```python
        Trainer(model, args, train_dataset=data, callbacks=[top.L1Penalty(strength=1e-3)]).train()
        ```
    """

    form: Form = "proximal"

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        check_form(self.form)

    def penalty(self) -> torch.Tensor:
        """Return ``strength * sum |w|``."""
        return self.strength * torch.stack([weight.abs().sum() for weight in self._wide()]).sum()

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
                target.weight.copy_(soft_threshold(target.weight, rates[target.fqn] * self.strength))

    def metrics(self) -> dict[str, float]:
        """Return ``l1_penalty``, and ``sparsity``: the share of exact zeros in these weights."""
        found = super().metrics()
        return found | {"sparsity": sparsity_of(self._penalized())} if found else {}
