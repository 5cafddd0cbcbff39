"""Casts to narrow floats as fake-quant: half, bfloat16 and the two float8 formats, saturating."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import along, straight_through

__all__ = ["FLOATS", "float_cast", "float_scale"]

FLOATS: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The formats, by name."""


def float_cast(x: torch.Tensor, format: str, scale: torch.Tensor | None = None, dim: int | None = None) -> torch.Tensor:
    """Round to the nearest value of a narrow float format and back; what is too large becomes the largest value.

    Formula: x_q = s cast(clamp(x / s, -M, M)), M the largest finite value; ties to even; subnormals are kept. The
    gradient is 1 where |x / s| <= M, 0 where it saturates.

    Args:
        x: floating values.
        format: ``"fp16"``, ``"bf16"``, ``"fp8_e4m3"`` (the finite-only form, M = 448) or ``"fp8_e5m2"`` (M = 57344).
        scale: s, shape [1], or [C] along `dim`; None for 1.
        dim: the dimension that scales vary along.

    Raises:
        ConfigError: no format has that name.

    Source:
        Micikevicius et al. 2022, "FP8 formats for deep learning", section 3 and table 1.

    Example:
        >>> float_cast(torch.tensor([0.3, 17.0, 1e6]), "fp8_e4m3").tolist()
        [0.3125, 16.0, 448.0]
    """
    dtype = _dtype(format)
    largest = torch.finfo(dtype).max
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    factor = None if scale is None else along(scale, x.ndim, dim)
    scaled = wide if factor is None else wide / factor
    # float8 has no infinity to overflow to (e4m3fn), and casts of torch do not saturate
    rounded = scaled.clamp(-largest, largest).to(dtype).to(wide.dtype)
    value = rounded if factor is None else rounded * factor
    return straight_through(x, value.to(x.dtype), scaled.abs() <= largest)


def float_scale(low: torch.Tensor, high: torch.Tensor, format: str) -> torch.Tensor:
    """Return the scale with which the largest magnitude becomes the largest value of a format; shaped as `low`.

    Formula: s = max(|low|, |high|) / M, 1 where both are 0, and never subnormal.

    Source:
        Micikevicius et al. 2022, "FP8 formats for deep learning", section 3.2 (per-tensor scaling).

    Example:
        >>> float_scale(torch.tensor([-896.0]), torch.tensor([1.0]), "fp8_e4m3")
        tensor([2.])
    """
    largest = torch.maximum(low.abs(), high.abs())
    scale = (largest / torch.finfo(_dtype(format)).max).clamp(min=torch.finfo(largest.dtype).tiny)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def _dtype(format: str) -> torch.dtype:
    if format not in FLOATS:
        raise ConfigError(f"no float format is named {format!r}; known: {list(FLOATS)}")
    return FLOATS[format]
