"""The value quantizer: a fake-quantizer whose grid is fitted to the very tensor it is given."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import affine_qparams, min_max
from torchopt_passes.functional.float_casts import FLOATS, float_cast, float_scale
from torchopt_passes.functional.granularity import Granularity, from_rows, to_rows, uniform_quantize
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer

__all__ = ["FORMATS", "SCALED_FORMATS", "ValueQuantizer"]

FORMATS = ("int", *FLOATS)
"""What values are rounded to: integers of so many bits, or a narrow float."""
SCALED_FORMATS = ("fp8_e4m3", "fp8_e5m2")
"""Narrow floats that need a scale, since their range is short."""


class ValueQuantizer(FakeQuantizer):
    """Round on grids that have no range to calibrate or to learn: weights by group, activations as they come.

    The range of each row (see `functional.granularity.to_rows`) is that of the values at hand, in training and eval
    mode. Float8 is scaled so that the largest value of a row is the format's largest; half and bfloat16 are casts.

    Args:
        bits: of integers, 2 to 16.
        signed: integers symmetric about zero; else affine.
        granularity: what has a scale of its own.
        group_size: values of a group.
        format: one of `FORMATS`.
        weight: whether it rounds a weight.
        channel_dim: the output dimension of the weight.
        bn_eps: eps of the folded batch norm.

    Source:
        See `functional.granularity.uniform_quantize` and `functional.float_casts.float_cast`.
    """

    fitted_to_value = True

    def __init__(
        self,
        *,
        bits: int,
        signed: bool,
        granularity: Granularity,
        group_size: int = 0,
        format: str = "int",
        weight: bool = False,
        channel_dim: int = 0,
        bn_eps: float = 0.0,
    ) -> None:
        if format not in FORMATS:
            raise ConfigError(f"no format is named {format!r}; known: {list(FORMATS)}")
        super().__init__(
            bits=bits, signed=signed, channel_dim=channel_dim, momentum=1.0 if weight else 0.5, bn_eps=bn_eps
        )
        self.granularity: Granularity = granularity
        self.group_size, self.format = group_size, format
        self.observe(False)

    def _register_range(self, channels: int) -> None:
        """There is none to keep."""

    @property
    def has_range(self) -> bool:
        """Always: that of the value."""
        return True

    def set_bits(self, bits: int) -> None:
        """Change the width of the integers."""
        self.bits, (self.quant_min, self.quant_max) = bits, self.grid(bits)
        self.bit_width.fill_(bits)

    def observe(self, enabled: bool = True) -> None:
        """Leave the switch off: there is no range to learn."""
        super().observe(False)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Refuse: the range is that of the value.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("the grid of this fake-quantizer is fitted to each value: it has no range to set")

    def row_grid(self, rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the scale of each row, None for plain casts, and the zero point, None for floats; see `to_rows`."""
        low, high = min_max(rows.detach().float(), 0)
        if self.format == "int":
            return affine_qparams(low, high, self.quant_min, self.quant_max, symmetric=self.signed)
        return (float_scale(low, high, self.format) if self.format in SCALED_FORMATS else None), None

    def _quantize(self, x: torch.Tensor, observe: bool) -> torch.Tensor:
        del observe
        if not self.enabled:
            return x
        dim = self.weight_dim
        if self.format == "int":
            return uniform_quantize(
                x,
                self.bits,
                symmetric=self.signed,
                granularity=self.granularity,
                dim=dim,
                group_size=self.group_size,
            )
        if self.format not in SCALED_FORMATS:
            return float_cast(x.float(), self.format).to(x.dtype)
        rows = to_rows(x.float(), self.granularity, dim=dim, group_size=self.group_size)
        rounded = float_cast(rows, self.format, self.row_grid(rows)[0], 0).to(x.dtype)
        return from_rows(rounded, x, self.granularity, dim=dim)

    @property
    def kind(self) -> str:
        """Format and rows, such as ``"s4 per group of 64"``."""
        form = f"{'s' if self.signed else 'u'}{self.bits}" if self.format == "int" else self.format
        rows = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        return f"{form} per {rows}"

    def extra_repr(self) -> str:
        """Return format, rows and switch."""
        return f"{self.kind}, fitted to each value, {'on' if self.enabled else 'off'}"
