"""Rounds of training, pruning and rewinding, laid out on the steps of one run."""

from __future__ import annotations

from dataclasses import dataclass

from torchopt_passes.errors import ConfigError

__all__ = ["TicketRounds"]


@dataclass(frozen=True)
class TicketRounds:
    """Training up to `length`, then `count` times: prune, go back to `rewind`, and train up to `length` again.

    Args:
        count: how often weights are pruned and rewound, >= 1.
        length: steps of training from the beginning to the end of a round.
        rewind: the step that weights go back to, 0 <= rewind < length.

    Raises:
        ConfigError: a round that has no steps, or none to prune after.

    Example:
        >>> rounds = TicketRounds(count=2, length=10, rewind=4)
        >>> rounds.ends, rounds.total
        ((10, 16), 22)
        >>> [rounds.position(step) for step in (0, 9, 10, 11, 15, 16, 22)]
        [0, 9, 4, 5, 9, 4, 10]
    """

    count: int
    length: int
    rewind: int

    def __post_init__(self) -> None:
        """Refuse rounds that are none."""
        if self.count < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.count}")
        if not 0 <= self.rewind < self.length:
            raise ConfigError(f"weights go back to step {self.rewind}, but a round has {self.length} steps")

    @classmethod
    def over(cls, total: int, count: int, rewind: int) -> TicketRounds:
        """Return the longest rounds that a run of `total` steps has room for.

        Example:
            >>> TicketRounds.over(22, 2, 4)
            TicketRounds(count=2, length=10, rewind=4)
        """
        return cls(count, (total + count * rewind) // (count + 1), rewind)

    @property
    def ends(self) -> tuple[int, ...]:
        """The completed steps of the run after which weights are pruned and rewound."""
        return tuple(self.length + index * (self.length - self.rewind) for index in range(self.count))

    @property
    def total(self) -> int:
        """The steps of all rounds."""
        return self.ends[-1] + self.length - self.rewind

    def done(self, step: int) -> int:
        """Return how often weights have been pruned after so many steps of the run."""
        return sum(end <= step for end in self.ends)

    def position(self, step: int) -> int:
        """Return the step within the round: where a learning-rate schedule of one round is.

        It goes on counting where the run is longer than its rounds.
        """
        done = self.done(step)
        return step if done == 0 else self.rewind + step - self.ends[done - 1]

    def sparsity(self, done: int, final: float) -> float:
        """Return the share that is removed after so many prunings: each one removes the same share of what is left.

        Math:
            1 - (1 - s)^(j / n).

        Source:
            Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 2: p^(1/n) of what survived, each round.

        Example:
            >>> round(TicketRounds(2, 10, 0).sparsity(1, 0.75), 6)
            0.5
        """
        return 1.0 - (1.0 - final) ** (done / self.count)
