"""The sensitivities of weights: one for all, and others by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from torchopt_passes.callbacks.targets import Target
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.tensors import check_patterns, matching_pattern

__all__ = ["Sensitivities"]


@dataclass(frozen=True)
class Sensitivities:
    """What a threshold is multiplied by, for each weight.

    Args:
        default: for weights without an override.
        overrides: glob on parameter or module names -> that of those.
        signed: whether it may be zero or negative.

    Raises:
        ConfigError: a number that may not be.

    Example:
        >>> Sensitivities(0.5, {"head*": 0.1}).of("head.weight"), Sensitivities(0.5).of("body.weight")
        (0.1, 0.5)
    """

    default: float
    overrides: Mapping[str, float] = field(default_factory=dict[str, float])
    signed: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that may not be."""
        for name, value in {"sensitivity": self.default, **self.overrides}.items():
            if not math.isfinite(value) or (value <= 0.0 and not self.signed):
                raise ConfigError(
                    f"the sensitivity of {name!r} must be a number{'' if self.signed else ' > 0'}: {value}"
                )

    def check(self, model: nn.Module) -> None:
        """Refuse an override that fits no parameter."""
        check_patterns(model, tuple(self.overrides), "overrides")

    def of(self, fqn: str) -> float:
        """Return that of a weight."""
        pattern = matching_pattern(fqn, tuple(self.overrides))
        return self.default if pattern is None else self.overrides[pattern]

    def refuse_lost(self, targets: Iterable[Target], updated: bool, step: int) -> None:
        """Refuse to go on from a checkpoint whose thresholds, and so its masks, were not loaded.

        Raises:
            CallbackError: all are zero, though there was an update.
        """
        if updated and not any(bool(target.state("limit").any()) for target in targets):
            raise CallbackError(
                f"after step {step} there are no thresholds and masks: load the model's state_dict, buffers included, "
                "after the callback is installed (attach, or Trainer with callbacks=)"
            )
