"""Values over training: pure functions of the completed optimizer step, so that a resumed run needs no state.

A shape maps progress, 0 to 1, to the share of the way from the first value to the last, 0 to 1. A `Ramp` places a
shape on the steps of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchopt_passes.errors import ConfigError

__all__ = [
    "SHAPES",
    "Ramp",
    "Shape",
    "constant",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "multi_step",
    "named_shape",
    "polynomial",
]

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
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def constant(progress: float) -> float:
    """All at once, at the first update: 1.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0


def polynomial(exponent: float) -> Shape:
    """Return the shape 1 - (1 - p)^e: the larger e > 0, the faster at first; 1 is `linear`, 3 is `cubic`.

    The base 1 - p stays >= 0, so that every exponent, even or broken, gives a shape that only rises.

    Args:
        exponent: e > 0.

    Raises:
        ConfigError: an exponent that is not.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1, which has e = 3.

    Example:
        >>> polynomial(2)(0.5), polynomial(0.5)(0.75)
        (0.75, 0.5)
    """
    if not (0.0 < exponent < math.inf):
        raise ConfigError(f"the exponent of a polynomial schedule must be > 0, not {exponent}")
    return lambda progress: 1.0 - (1.0 - progress) ** exponent


def exponential(ratio: float) -> Shape:
    """Return the shape with which what is left, 1 - s, shrinks by the same factor each step.

    Args:
        ratio: r = (1 - s_f) / (1 - s_i), what is left at the last update as a share of what is left at the first; in
            (0, 1).

    Math:
        f(p) = (1 - r^p) / (1 - r), so that s = s_i + (s_f - s_i) f(p) is 1 - (1 - s_i) r^p.

    Raises:
        ConfigError: a ratio that is not in (0, 1).

    Source:
        NNCF 2, "Algorithms: Non-structured sparsity", exponential schedule (removed in NNCF 3).

    Example:
        >>> shape = exponential(0.25)  # from sparsity 0 to 0.75
        >>> [0.75 * shape(p) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.5, 0.75]
    """
    if not 0.0 < ratio < 1.0:
        raise ConfigError(
            f"an exponential schedule needs 0 <= first value < last value < 1: (1 - s_f)/(1 - s_i) is {ratio}"
        )
    return lambda progress: (1.0 - ratio**progress) / (1.0 - ratio)


def multi_step(steps: Sequence[tuple[float, float]]) -> Shape:
    """Return the shape of a staircase: from each progress on, the share that goes with it.

    Args:
        steps: (progress, share) pairs in ascending order; shares in [0, 1], the last one 1; 0 before the first.

    Raises:
        ConfigError: progresses that do not ascend in [0, 1], or shares that do not end at 1.

    Source:
        NNCF 2, "Algorithms: Non-structured sparsity", multistep schedule (removed in NNCF 3).

    Example:
        >>> shape = multi_step([(0.0, 0.5), (0.5, 0.8), (1.0, 1.0)])
        >>> [shape(p) for p in (0.0, 0.49, 0.5, 1.0)]
        [0.5, 0.5, 0.8, 1.0]
    """
    points = [float(progress) for progress, _ in steps]
    shares = [float(share) for _, share in steps]
    if not points or points != sorted(set(points)) or not 0.0 <= points[0] <= points[-1] <= 1.0:
        raise ConfigError(f"the steps of a schedule must ascend within [0, 1], not {points}")
    if shares[-1] != 1.0 or not all(0.0 <= share <= 1.0 for share in shares):
        raise ConfigError(f"the shares of a schedule's steps must be in [0, 1] and end at 1, not {shares}")

    def staircase(progress: float) -> float:
        return next((s for p, s in zip(reversed(points), reversed(shares), strict=True) if p <= progress), 0.0)

    return staircase


SHAPES: dict[str, Shape] = {
    "agp": cubic,
    "constant": constant,
    "cosine": cosine,
    "cubic": cubic,
    "linear": linear,
    "one_shot": constant,
}
"""The shapes that options name by text; AGP, automated gradual pruning, is the cubic one."""

_MADE = ("exponential", "multi_step:P=S,...", "polynomial:E")


def named_shape(shape: str | Shape, initial: float = 0.0, final: float = 1.0) -> Shape:
    """Return the shape of that name, or the given function.

    Args:
        shape: a name of `SHAPES`; ``"polynomial:2"``; ``"exponential"``; ``"multi_step:0=0.5,0.6=1"``, pairs of
            progress and share; or a function of progress.
        initial: value at the first update, for ``"exponential"``.
        final: value from the last update on, for ``"exponential"``.

    Raises:
        ConfigError: no shape of that name, or a function that does not end at 1.

    Example:
        >>> named_shape("cubic")(1.0), named_shape("polynomial:2")(0.5), named_shape("exponential", 0.0, 0.75)(0.5)
        (1.0, 0.75, 0.6666666666666666)
    """
    if not isinstance(shape, str):
        if abs(shape(1.0) - 1.0) > 1e-9:
            raise ConfigError(
                f"a schedule must map progress 1 to 1, not to {shape(1.0)}: the final value is never reached"
            )
        return shape
    if shape in SHAPES:
        return SHAPES[shape]
    if shape == "exponential":
        return exponential((1.0 - final) / (1.0 - initial) if initial < 1.0 else math.nan)
    name, _, argument = shape.partition(":")
    try:
        if name == "polynomial":
            return polynomial(float(argument))
        if name == "multi_step":
            pairs = [pair.split("=") for pair in argument.split(",")]
            return multi_step([(float(progress), float(share)) for progress, share in pairs])
    except ConfigError:
        raise
    except ValueError:
        pass  # what stands behind the colon is no number: no such schedule
    raise ConfigError(f"no schedule named {shape!r}: one of {[*sorted(SHAPES), *_MADE]}, or a function of progress")


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
