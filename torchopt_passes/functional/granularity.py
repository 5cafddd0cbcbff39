"""Granularity: one uniform grid for a tensor, a channel, a group or a token, by laying the values out in rows."""

from __future__ import annotations

from typing import Literal

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import (
    affine_qparams,
    fake_quantize,
    integer_range,
    min_max,
    minimum_qparams,
    straight_through,
)

__all__ = ["Granularity", "from_rows", "to_rows", "uniform_quantize"]

Granularity = Literal["tensor", "channel", "group", "token"]
"""What has a scale of its own: all values; each index of one dimension; each `group_size` consecutive values of a
channel; each vector along the last dimension."""


def to_rows(x: torch.Tensor, granularity: Granularity, *, dim: int = 0, group_size: int = 0) -> torch.Tensor:
    """Return the values in rows that share a scale, shape [rows, values of a row].

    Args:
        x: weight or activation, at least one-dimensional.
        granularity: what a row is.
        dim: the channel dimension, for ``"channel"`` and ``"group"``.
        group_size: values of a group; it must divide the values of a channel.

    Raises:
        ConfigError: `group_size` does not divide a channel.

    Example:
        >>> to_rows(torch.arange(8.0).view(2, 4), "group", group_size=2).shape
        torch.Size([4, 2])
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "token":
        return x.reshape(-1, x.shape[-1])
    rows = x.movedim(dim, 0).reshape(x.shape[dim], -1)
    if granularity == "channel":
        return rows
    if group_size < 1 or rows.shape[1] % group_size:
        raise ConfigError(f"group_size must divide the {rows.shape[1]} values of a channel, {group_size} does not")
    return rows.reshape(-1, group_size)


def from_rows(rows: torch.Tensor, like: torch.Tensor, granularity: Granularity, *, dim: int = 0) -> torch.Tensor:
    """Return the values of `to_rows` in the shape of `like`."""
    if granularity in ("tensor", "token"):
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(dim, 0).shape).movedim(0, dim)


def uniform_quantize(
    x: torch.Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    granularity: Granularity = "tensor",
    dim: int = 0,
    group_size: int = 0,
    zero_point: Literal["integer", "minimum"] = "integer",
    power_of_two: bool = False,
) -> torch.Tensor:
    """Round to a uniform grid over the range of each row, and back, with the straight-through gradient.

    The range is that of `x` itself: the form for weights, and for dynamic activations (``granularity="token"``).

    Formula, with the a, b of each row:
        symmetric: s = max(|a|, |b|) / (2^(bits-1) - 1), x_q = s round(x / s)
        affine: s = (max(b, 0) - min(a, 0)) / (2^bits - 1), z = round(-min(a, 0) / s),
            x_q = s (clamp(round(x / s) + z, 0, 2^bits - 1) - z)
        minimum: s = (b - a) / (2^bits - 1), x_q = s round((x - a) / s) + a

    Args:
        x: any shape; float32 inside (float64 stays for the minimum form).
        bits: 2 to 16.
        symmetric: signed integers about zero; else unsigned integers with a zero point.
        granularity: what has a scale of its own.
        dim: the channel dimension.
        group_size: values of a group.
        zero_point: ``"integer"``, or ``"minimum"`` for the affine grid whose lowest level is the minimum.
        power_of_two: round s up to a power of two.

    Raises:
        ConfigError: bits out of range, a group that does not fit, a symmetric grid with a minimum.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2; groups: Shen
        et al. 2020, "Q-BERT", section 3.2; tokens: Yao et al. 2022, "ZeroQuant", section 4.1.

    Example:
        >>> uniform_quantize(torch.tensor([[0.0, 0.4, 1.0], [0.0, 4.0, 9.0]]), 2, symmetric=False, granularity="token")
        tensor([[0.0000, 0.3333, 1.0000],
                [0.0000, 3.0000, 9.0000]])
    """
    rows = to_rows(x, granularity, dim=dim, group_size=group_size)
    low, high = min_max(rows.detach(), 0)
    if zero_point == "minimum":
        if symmetric:
            raise ConfigError("a symmetric grid has zero point 0: symmetric=False goes with zero_point='minimum'")
        rows = _about_minimum(rows, low, high, bits, power_of_two=power_of_two)
    else:
        grid = integer_range(bits, signed=symmetric)
        scale, zero = affine_qparams(low, high, *grid, symmetric=symmetric, power_of_two=power_of_two)
        rows = fake_quantize(rows, scale, zero, *grid, 0)
    return from_rows(rows, x, granularity, dim=dim)


def _about_minimum(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, *, power_of_two: bool
) -> torch.Tensor:
    wide = rows if rows.dtype is torch.float64 else rows.float()
    scale, minimum = minimum_qparams(low.to(wide.dtype), high.to(wide.dtype), bits, power_of_two=power_of_two)
    scale, minimum = scale[:, None], minimum[:, None]
    steps = torch.round((wide - minimum) / scale).clamp(0, 2**bits - 1)
    return straight_through(rows, (steps * scale + minimum).to(rows.dtype))
