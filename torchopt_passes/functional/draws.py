"""Noise as a function of a seed and of nothing else: the same in a resumed run, on every rank and on every device."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch

__all__ = ["normal_rows", "seed_of", "uniform"]


def seed_of(*parts: object) -> int:
    """Return a seed made of a seed, a step, a name, and the like.

    Example:
        >>> seed_of(0, 1, "weight") == seed_of(0, 1, "weight"), seed_of(0, 1, "weight") == seed_of(0, 2, "weight")
        (True, False)
    """
    return zlib.crc32(" ".join(map(str, parts)).encode())


def uniform(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return uniform draws from the open interval (0, 1), whose logarithms are finite.

    Args:
        shape: of the result.
        seed: of the draws.
        device: of the result; it is drawn on the CPU.

    Returns:
        float32.

    Example:
        >>> torch.equal(uniform((3,), 7), uniform((3,), 7))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    tiny = 2.0**-24
    return torch.rand(tuple(shape), generator=generator).clamp_(tiny, 1.0 - tiny).to(device)


def normal_rows(first: int, rows: int, width: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return rows of an endless table of standard normal draws: in one piece or in several, they are the same.

    Args:
        first: number of the first row.
        rows: how many.
        width: columns of the table.
        seed: of the table.
        device: of the result; it is drawn on the CPU.

    Returns:
        float32, shape (rows, width).

    Math:
        sqrt(2) erfinv(2 u - 1), u uniform.

    Example:
        >>> table = normal_rows(0, 4, 2, seed=3)
        >>> torch.equal(table[1:3], normal_rows(1, 2, 2, seed=3))
        True
    """
    u = uniform((first + rows, width), seed)[first:].double()
    return (math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)).float().to(device)
