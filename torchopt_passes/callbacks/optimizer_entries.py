"""Optimizer state of single weights: forgotten where a weight begins anew."""

from __future__ import annotations

import logging
from typing import Any

import torch

from torchopt_passes.callbacks.sharded import own_part

__all__ = ["forget", "forget_entries"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def forget_entries(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, entries: torch.Tensor) -> None:
    """Set to zero what an optimizer keeps for entries of a parameter: momentum, mean and square of gradients.

    Moments that torchao keeps in 8 or 4 bits are dequantized, and quantized again by blocks; the squares of 4 bits have
    no zero, and get their lowest step. Step counters stay, as do sums over rows and columns (Adafactor), which belong
    to no entry.

    Args:
        optimizer: holds the parameter, or nothing of it yet.
        parameter: any shape.
        entries: bool, its shape; True for those to forget.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            continue
        held, gone = own_part(value), own_part(entries)
        dequantize: Any = getattr(held, "dequantize", None)
        if type(held) is not torch.Tensor and dequantize is not None:
            held.copy_(dequantize().masked_fill(gone, 0.0))
        elif held.is_floating_point():
            held.masked_fill_(gone, 0.0)
        else:
            logger.warning(
                "%s keeps %r as %s, whose single entries cannot be set to zero: grown weights begin with an old moment",
                type(optimizer).__name__,
                key,
                value.dtype,
            )


def forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Drop all that an optimizer keeps for a parameter: its next step is as its first."""
    optimizer.state.pop(parameter, None)
