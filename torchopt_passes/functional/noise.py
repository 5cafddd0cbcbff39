"""Random numbers that are a function of a seed and a name, and of nothing that ran before."""

from __future__ import annotations

import zlib

import torch

__all__ = ["named_noise"]


def named_noise(seed: int, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return uniform numbers in [0, 1) of a tensor's shape: the same on every device, on every rank and after a resume.

    Args:
        seed: of a run.
        name: what they are for, such as a step and the name of a parameter.
        like: gives shape and device.

    Returns:
        float32.

    Example:
        >>> torch.equal(named_noise(0, "a", torch.ones(3)), named_noise(0, "a", torch.ones(3)))
        True
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.rand(like.shape, generator=generator).to(like.device)
