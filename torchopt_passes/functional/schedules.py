"""Values over training: pure functions of the completed optimizer step, so that a resumed run needs no state.

A shape maps progress, 0 to 1, to the share of the way from the first value to the last, 0 to 1. A `Ramp` places a
shape on the steps of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchopt_passes.errors import ConfigError

__all__ = ["SHAPES", "Ramp", "Shape", "constant", "cosine", "cubic", "linear", "named_shape"]

Shape = Callable[[float], float]
"""Progress in [0, 1] -> share of the way; 0 -> 0 at best, and 1 -> 1 always."""


def cubic(progress: float) -> float:
    """Fast first, slow at the end: 1 - (1 - p)^3.

    Args:
        progress: 0 at the first update, 1 at the last.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def linear(progress: float) -> float:
    """Even steps: p.

    Example:
        >>> linear(0.25)
        0.25
    """
    return progress


def cosine(progress: float) -> float:
    """Slow at both ends: (1 - cos(pi p)) / 2.

    Example:
        >>> round(cosine(0.5), 12)
        0.5
    """
    from math import cos, pi

    return (1.0 - cos(pi * progress)) / 2.0


def constant(progress: float) -> float:
    """All at once, at the first update: 1.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0


SHAPES: dict[str, Shape] = {"constant": constant, "cosine": cosine, "cubic": cubic, "linear": linear}
"""The shapes that options name by text."""


def named_shape(shape: str | Shape) -> Shape:
    """Return the shape of that name, or the given function.

    Raises:
        ConfigError: no shape of that name, or a function that does not end at 1.

    Example:
        >>> named_shape("cubic")(1.0)
        1.0
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ConfigError(f"no schedule named {shape!r}: one of {sorted(SHAPES)}, or a function of progress")
        return SHAPES[shape]
    if abs(shape(1.0) - 1.0) > 1e-9:
        raise ConfigError(f"a schedule must map progress 1 to 1, not to {shape(1.0)}: the final value is never reached")
    return shape


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A value that goes from `initial` to `final` between two steps, changed at updates `every` steps apart.

    Updates are at t0, t0 + dt, t0 + 2 dt, ... and at `end`, where the value is exactly `final`; between
    updates it is held.

    Args:
        initial: value before and at the first update.
        final: value at and after the last update.
        start: completed optimizer steps at the first update (t0).
        end: completed optimizer steps at the last update (t0 + n dt).
        every: optimizer steps between updates (dt).
        shape: share of the way as a function of progress.

    Math:
        v_t = v_f + (v_i - v_f) (1 - f((t - t0) / (n dt))); with f = `cubic` this is
        s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Example:
        >>> ramp = Ramp(initial=0.0, final=0.8, start=10, end=30, every=10)
        >>> [round(ramp.at(step), 6) for step in (0, 10, 19, 20, 30, 99)]
        [0.0, 0.0, 0.0, 0.7, 0.8, 0.8]
        >>> [step for step in range(40) if ramp.is_update(step)]
        [10, 20, 30]
    """

    initial: float
    final: float
    start: int
    end: int
    every: int = 1
    shape: Shape = cubic

    def __post_init__(self) -> None:
        """Refuse a window that runs backwards."""
        if self.start < 0 or self.end < self.start:
            raise ConfigError(f"a schedule needs 0 <= start <= end, not start={self.start}, end={self.end} (steps)")
        if self.every < 1:
            raise ConfigError(f"every must be at least 1 step, not {self.every}")

    def is_update(self, step: int) -> bool:
        """Return whether the value is set anew after that many completed steps."""
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.every == 0)

    def last_update(self, step: int) -> int | None:
        """Return the latest update at or before `step`, None before the first."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.every

    def at(self, step: int) -> float:
        """Return the value after `step` completed optimizer steps."""
        update = self.last_update(step)
        if update is None:
            return self.initial
        if update == self.end:
            return self.final
        share = self.shape((update - self.start) / (self.end - self.start))
        return self.final + (self.initial - self.final) * (1.0 - share)
