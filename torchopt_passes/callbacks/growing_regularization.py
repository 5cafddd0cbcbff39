"""GrowingRegularization: units that were chosen to go are pushed out by a penalty that grows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.gradual_channel_pruning import GradualChannelPruning
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.schedules import Shape
from torchopt_passes.graph.pruning.scores import Importance
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["GrowingRegularization"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class GrowingRegularization(GradualChannelPruning):
    """Choose the least important units once, at `start`, and let an L2 penalty on them grow until they are set to zero.

    From `start` to `end` the gradient of the penalty is added to the gradients once before each optimizer step, its
    factor higher at each update; at `end` the units are zero, and when training ends they leave the model, as in
    `GradualChannelPruning`. What the units did moves to the others little by little, where a mask takes it at once.
    Training that ends before `end` removes nothing, with a warning.

    Args:
        ceiling: factor of the penalty that is reached at `end`, > 0.
        ratio: share of the units that goes, 0 <= ratio < 1; of each group or of all (`scope`).
        start: when units are chosen, as a share of training (float), completed steps (int) or `Epochs`.
        end: when they are zero, likewise; what remains is for recovery.
        every: steps between increases of the factor, or `Epochs`; None spreads 100 of them.
        importance: what ranks the units; see `GradualChannelPruning`.
        scope: ``"group"`` ranks the units of each group, ``"global"`` all together.
        min_units: units of each group that stay, at least.
        round_to: the channels that stay in a group are a multiple of it, where the group has as many.
        overrides: glob on group or parameter names -> ratio of those groups.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. The
            removal is proven on them.

    Math:
        g <- g + lambda_t w for every weight w of a chosen unit, lambda_t = ceiling * k / n after k of n updates.

    Source:
        Wang et al. 2021, "Neural Pruning via Growing Regularization", section 3.2 (GReg-1).

    Example:
        ```python
        growing = top.GrowingRegularization(ratio=0.5, start=0.1, end=0.6, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[growing]).train()   # the model is smaller now
        ```
    """

    ceiling: float = 1.0
    importance: Importance = "l1"
    schedule: str | Shape = field(default="constant", init=False, repr=False)

    _now: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        if not self.ceiling > 0:
            raise ConfigError(f"ceiling must be > 0, not {self.ceiling}")

    @property
    def factor(self) -> float:
        """The factor of the penalty now."""
        update = self._ramp.last_update(self._now) if self._ramp is not None else None
        if self._ramp is None or update is None:
            return 0.0
        length = self._ramp.end - self._ramp.start
        return self.ceiling * ((update - self._ramp.start) / length if length else 1.0)

    def begin(self, progress: Progress) -> None:
        """Place the schedule on the steps of this run."""
        self._now = progress.step
        super().begin(progress)

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Add the gradient of the penalty on the chosen units."""
        factor = self.factor
        if self._over or not factor or self.student is None:
            return
        for fqn, chosen in self._chosen().items():
            weight = get_tensor(self.student.model, fqn)
            gradient = (factor * weight).masked_fill_(~chosen, 0)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def after_step(self, progress: Progress) -> None:
        """Choose, if it is time; at the end set what was chosen to zero."""
        self._now = progress.step
        super().after_step(progress)
        if self._ramp is not None and self._now == self._ramp.end > self._ramp.start:
            self._tell_changed(progress)

    def metrics(self) -> dict[str, float]:
        """Return ``channel_ratio``, the share of units that are chosen, and ``growing_factor``."""
        found = super().metrics()
        return found | {"growing_factor": self.factor} if found else {}

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove the units that were set to zero."""
        if self._over:
            super().finish(optimizer)
        elif self._groups:
            logger.warning("GrowingRegularization ends before its units are zero: nothing is removed")

    @property
    def _over(self) -> bool:
        return self._ramp is not None and self._now >= self._ramp.end

    def _choose(self, value: float) -> None:
        if not self._removed():
            super()._choose(value)

    def _apply(self) -> None:
        if self._over:
            super()._apply()

    def _chosen(self) -> dict[str, torch.Tensor]:
        """Return the weights of chosen units: fqn -> bool, True for them."""
        found: dict[str, torch.Tensor] = {}
        for unit_group in self._groups if self.student is not None else ():
            gone = torch.cat([~unit_group.mask, unit_group.mask.new_zeros(1)])
            for fqn, dim, units in unit_group.slices:
                weight = get_tensor(self.student.model, fqn)  # pyright: ignore[reportOptionalMemberAccess]
                of_index = gone[units.to(gone.device)].to(weight.device).view(-1, *[1] * (weight.ndim - 1 - dim))
                found[fqn] = found.get(fqn, torch.zeros_like(weight, dtype=torch.bool)) | of_index
        return found
