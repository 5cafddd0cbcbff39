"""What ranks single weights: one criterion a file."""

from __future__ import annotations

from torchopt_passes.callbacks.criteria.base import Criterion
from torchopt_passes.callbacks.criteria.magnitude import Magnitude
from torchopt_passes.callbacks.criteria.movement import Movement
from torchopt_passes.callbacks.criteria.random_order import RandomOrder
from torchopt_passes.callbacks.criteria.snip import Snip
from torchopt_passes.callbacks.criteria.taylor import Taylor
from torchopt_passes.errors import ConfigError

__all__ = ["CRITERIA", "Criterion", "Magnitude", "Movement", "RandomOrder", "Snip", "Taylor", "named_criterion"]

CRITERIA: dict[str, type[Criterion]] = {kind.name: kind for kind in (Magnitude, Movement, RandomOrder, Snip, Taylor)}
"""The criteria that options name by text."""


def named_criterion(criterion: str | Criterion) -> Criterion:
    """Return the criterion of that name, or the given one.

    Raises:
        ConfigError: no criterion of that name.

    Example:
        >>> named_criterion("magnitude")
        Magnitude(dense=False)
    """
    if isinstance(criterion, Criterion):
        return criterion
    if criterion == "soft_movement":
        raise ConfigError("soft movement has a threshold and a penalty instead of a sparsity: SoftMovementPruning")
    if criterion not in CRITERIA:
        raise ConfigError(f"no criterion named {criterion!r}: one of {sorted(CRITERIA)}, or a Criterion")
    return CRITERIA[criterion]()
