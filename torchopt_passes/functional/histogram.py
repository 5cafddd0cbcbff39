"""A histogram that grows with what it sees, in fixed memory: the same whatever the order of the batches."""

from __future__ import annotations

import math

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["StreamingHistogram"]

_SIDE = 4096
"""Bins on each side of zero; the widest value lies in the outer half of them, so at least 2048 are in use."""
_SMALLEST_EXPONENT = -126
"""Of the width of a bin: the smallest normal float32, so that dividing by it is exact."""


class StreamingHistogram:
    """Count values, batch by batch, in 8192 evenly spaced bins about zero.

    A bin is 2^k wide and starts at a multiple of its width; k is the smallest with which the widest value so far fits.
    When a wider one comes, neighbours merge until it does. Halving a bin's index is what merging is, so the counts
    depend neither on the order of the batches nor on how the data is cut into batches. Exact zeros are counted apart:
    every grid holds them without error, and behind a ReLU they are half of all values.

    The state is 8192 integers and five numbers, however many values come.

    Example:
        >>> seen = StreamingHistogram()
        >>> seen.add(torch.tensor([0.0, 1.0, 3.0]))
        >>> seen.zeros, seen.low, seen.high, int(seen.bins()[0].sum())
        (1, 0.0, 3.0, 2)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _SIDE, dtype=torch.int64)
        self.exponent: int | None = None
        self.zeros = 0
        self.low, self.high = math.inf, -math.inf

    @property
    def total(self) -> int:
        """How many values were counted, zeros too."""
        return int(self.counts.sum()) + self.zeros

    def add(self, x: torch.Tensor) -> None:
        """Count the values of one batch.

        Args:
            x: floating values, any shape and device; they count as float32.

        Raises:
            ConfigError: a value is NaN or infinite.
        """
        if not x.numel():
            return
        x = x.detach().float().flatten()
        low, high = (float(value) for value in torch.stack(x.aminmax()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"values to calibrate on must be finite, not {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        widest = max(-low, high)
        if widest == 0.0:
            self.zeros += x.numel()
            return
        # widest < 2^e by frexp, so that it lies below the last edge, _SIDE 2^k
        needed = max(math.frexp(widest)[1] - _SIDE.bit_length() + 1, _SMALLEST_EXPONENT)
        if self.exponent is None:
            self.exponent = needed
        self._merge(needed - self.exponent)
        # the width is a power of two: the division is exact, and the floor is the same for every width it came from
        index = torch.floor(x / 2.0**self.exponent).to(torch.int64) + _SIDE
        self.counts += torch.bincount(index, minlength=2 * _SIDE).cpu()
        zeros = int((x == 0).sum())
        self.counts[_SIDE] -= zeros
        self.zeros += zeros

    def widen(self, exponent: int) -> None:
        """Make bins at least 2^exponent wide: histograms with the same `exponent` add up bin by bin."""
        self.exponent = exponent if self.exponent is None else self.exponent
        self._merge(exponent - self.exponent)

    def bins(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return counts [n] and edges [n + 1] (float64) of the bins from the first in use to the last, zeros left out.

        When there is nothing but zeros, one empty bin.
        """
        used = torch.nonzero(self.counts).flatten()
        if self.exponent is None or not len(used):
            return torch.zeros(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
        first, last = int(used[0]), int(used[-1])
        edges = torch.arange(first - _SIDE, last - _SIDE + 2, dtype=torch.float64) * 2.0**self.exponent
        return self.counts[first : last + 1].double(), edges

    def _merge(self, doublings: int) -> None:
        """Make every bin 2^doublings times as wide."""
        if doublings <= 0 or self.exponent is None:
            return
        self.exponent += doublings
        group = 2 ** min(doublings, _SIDE.bit_length() - 1)  # by then one bin on each side holds all
        merged = self.counts.view(-1, group).sum(1)
        half = len(merged) // 2
        self.counts.zero_()
        self.counts[_SIDE - half : _SIDE + half] = merged
