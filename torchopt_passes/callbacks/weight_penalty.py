"""WeightPenalty: penalties that look at each chosen weight by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.penalty import Penalty
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets
from torchopt_passes.graph.edit import Skip

__all__ = ["WeightPenalty"]


@dataclass(kw_only=True, eq=False)
class WeightPenalty(Penalty):
    """A penalty on weights that globs choose.

    Args:
        strength: factor of the penalty, > 0.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """Parameters that are left alone, with the reason; filled when the callback is installed."""
    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the weights under the penalty."""
        return tuple(target.fqn for target in self._targets)

    def install(self, student: Student) -> None:
        """Choose the weights."""
        self._targets, self.skips = choose_targets(student.model, self.include, self.skip)

    def remove(self) -> None:
        """Let the weights go."""
        self._targets = ()

    def _penalized(self) -> Sequence[torch.Tensor]:
        return [target.weight for target in self._targets]

    def _wide(self) -> list[torch.Tensor]:
        """Return the weights, half-precision ones in float32: sums over many of them need it."""
        weights = self._penalized()
        return [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
