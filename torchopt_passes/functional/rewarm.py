"""A learning rate that is raised again for a while: up, a plateau, and back to its schedule."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rewarm", "raised"]


def raised(rate: float, peak: float, share: float) -> float:
    """Return a learning rate that is raised by a share of the way to a peak; it is never lowered.

    Args:
        rate: of the schedule, >= 0.
        peak: in the same unit.
        share: b in [0, 1].

    Math:
        max(rate, rate + b (peak - rate)).

    Example:
        >>> raised(0.25, 1.0, 0.0), raised(0.25, 1.0, 0.5), raised(2.0, 1.0, 1.0)
        (0.25, 0.625, 2.0)
    """
    return max(rate, rate + share * (peak - rate))


@dataclass(frozen=True)
class Rewarm:
    """How the share moves after a change of the model: in `warmup` steps to 1, for `plateau` steps 1, in `decay` to 0.

    A change that comes before the share is back at 0 raises it from where it is; changes that follow each other closely
    make one long plateau. It is counted in whole parts, so that it is exact in any checkpoint.

    Args:
        warmup: steps, >= 1.
        plateau: steps, >= 0.
        decay: steps, >= 1.

    Example:
        >>> rewarm, level = Rewarm(warmup=2, plateau=1, decay=4), 0
        >>> shares = []
        >>> for since in range(8):
        ...     level = rewarm.next(level, since)
        ...     shares.append(rewarm.share(level))
        >>> shares
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    warmup: int
    plateau: int
    decay: int

    def next(self, level: int, since: int | None) -> int:
        """Return the level of the next step.

        Args:
            level: of the last step, 0 to warmup * decay.
            since: steps completed since the last change of the model; None where there was none.
        """
        if since is not None and since < self.warmup + self.plateau:
            return min(self.warmup * self.decay, level + self.decay)
        return max(0, level - self.warmup)

    def share(self, level: int) -> float:
        """Return a level as a share in [0, 1]."""
        return level / (self.warmup * self.decay)
