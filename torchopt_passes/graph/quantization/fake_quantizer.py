"""The fake-quantizer: a small module on an edge of the graph that rounds to an integer grid, and learns its range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.functional.affine import (
    affine_qparams,
    along,
    batch_norm_scale,
    fake_quantize,
    integer_range,
    min_max,
)

__all__ = ["CONTAINER", "FakeQuantizer", "Noise", "fake_quantizers", "is_fake_quant", "stored_range"]

CONTAINER = "fake_quant"
"""The submodule of a prepared graph that holds its fake-quantizers."""


def stored_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest integer of a grid as it is stored: int8 or uint8, int16 above 8 bits.

    An affine grid above 8 bits begins at -2^(bits-1), not at 0: torch computes little in uint16.

    Args:
        bits: 2 to 16.
        signed: whether the grid is symmetric about zero; else it has a zero point.

    Example:
        >>> stored_range(8, signed=False), stored_range(12, signed=False), stored_range(12, signed=True)
        ((0, 255), (-2048, 2047), (-2047, 2047))
    """
    low, high = integer_range(bits, signed=signed)
    shift = 2 ** (bits - 1) if bits > 8 and not signed else 0
    return low - shift, high - shift


@dataclass(frozen=True)
class Noise:
    """Which entries are rounded in training; in eval mode all are. A copy of a fake-quantizer has none.

    Args:
        share: the share of the entries.
        seed: what they are drawn with.
    """

    share: float
    seed: int

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        """Return True for the entries of `x` that are rounded; the same for the same seed and shape."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return torch.rand(x.shape, generator=generator, device=x.device) < self.share

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """It belongs to the training that goes on, not to the model."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as the copy."""
        return type(None), ()


class FakeQuantizer(nn.Module):
    """Round a tensor to an integer grid and back, with the straight-through gradient.

    Its whole state is seven small buffers whose shapes never change, so that a prepared graph is saved, restored and
    copied exactly. Ranges are learned in training mode alone: running a model in eval mode changes nothing.
    A quantizer that has no range yet passes values through.

    For the weight of a convolution or linear with a batch norm behind it, the call takes the batch norm's gamma and
    running variance too and returns FQ(w s) / s, s = gamma / sqrt(var + eps): the grid is that of the folded weight,
    while the batch norm stays where it was, with its own eps, momentum and statistics.

    Args:
        bits: width of the integers, 2 to 16.
        signed: integers symmetric about zero, or with a zero point; see `stored_range`.
        channel_dim: the dimension with a scale for each index, None for one scale.
        channels: how many scales.
        momentum: weight of a batch in the moving average of the range; 1 takes the current range (weights).
        bn_eps: eps of the folded batch norm.
        bias_apart: whether its operation gets its bias from an addition behind it when it is converted.
        power_of_two: whether the step is rounded up to a power of two.
        observe: whether ranges are learned in training mode.
        enabled: whether values are rounded.

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference", sections 3 and 3.2 (batch norm).
    """

    fitted_to_value = False
    """Whether the grid is fitted to each value anew: then there is no range to calibrate, learn or store."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor
    bit_width: torch.Tensor
    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor

    def __init__(
        self,
        *,
        bits: int,
        signed: bool,
        channel_dim: int | None = None,
        channels: int = 1,
        momentum: float = 0.01,
        bn_eps: float = 0.0,
        bias_apart: bool = False,
        power_of_two: bool = False,
        observe: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.signed = signed
        self.channel_dim, self.momentum, self.bn_eps = channel_dim, momentum, bn_eps
        self.bias_apart, self.power_of_two = bias_apart, power_of_two
        self.bits, (self.quant_min, self.quant_max) = bits, self.grid(bits)
        self.noise: Noise | None = None
        self._register_range(channels)
        # width and flags are buffers so that checkpoints carry them; their mirrors spare a device sync in each forward
        self.register_buffer("bit_width", torch.tensor([bits]))
        self.register_buffer("fake_quant_enabled", torch.tensor([int(enabled)]))
        self.register_buffer("observer_enabled", torch.tensor([int(observe)]))
        self._enabled, self._observe, self._has_range = enabled, observe, False

    def _register_range(self, channels: int) -> None:
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("min_val", torch.full((channels,), float("inf")))
        self.register_buffer("max_val", torch.full((channels,), float("-inf")))

    def grid(self, bits: int) -> tuple[int, int]:
        """Return the smallest and largest integer of the grid of a width."""
        return stored_range(bits, signed=self.signed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the integers."""
        if self.bits > 8:
            return torch.int16
        return torch.int8 if self.signed else torch.uint8

    @property
    def enabled(self) -> bool:
        """Whether values are rounded."""
        return self._enabled

    @property
    def observing(self) -> bool:
        """Whether ranges are learned in training mode."""
        return self._observe

    @property
    def exact(self) -> bool:
        """Whether it always takes the current range, as that of a weight does."""
        return self.momentum == 1.0

    @property
    def has_range(self) -> bool:
        """Whether it has seen data, or was given a range."""
        if not self._has_range:
            self._has_range = bool(torch.isfinite(self.min_val).all() & torch.isfinite(self.max_val).all())
        return self._has_range

    def enable(self, enabled: bool = True) -> None:
        """Switch rounding on or off."""
        self._enabled = enabled
        self.fake_quant_enabled.fill_(int(enabled))

    def observe(self, enabled: bool = True) -> None:
        """Switch the learning of ranges (in training mode) on or off."""
        self._observe = enabled
        self.observer_enabled.fill_(int(enabled))

    def set_bits(self, bits: int) -> None:
        """Change the width of the integers: the range stays, scale and zero point follow."""
        if bits == self.bits:
            return
        low, high = self.min_val.clone(), self.max_val.clone()
        has_range = self.has_range
        self.bits, (self.quant_min, self.quant_max) = bits, self.grid(bits)
        self.bit_width.fill_(bits)
        if has_range:
            self.set_range(low, high)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set the range, and scale and zero point from it; both of shape [1] or [channels]."""
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        scale, zero_point = self.qparams(self.min_val, self.max_val)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def qparams(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point of this grid for a range."""
        return affine_qparams(
            low, high, self.quant_min, self.quant_max, symmetric=self.signed, power_of_two=self.power_of_two
        )

    def forward(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor | None = None,
        var: torch.Tensor | None = None,
        *,
        follow: bool = False,
    ) -> torch.Tensor:
        """Return x on the grid.

        Args:
            x: activation or weight.
            gamma: weight of the batch norm behind this weight.
            var: its running variance; when given, the result is FQ(x s) / s.
            follow: a later place of a value that was observed already: round, but learn nothing.
        """
        observe = self._observe and self.training and not follow
        if not (observe or (self._enabled and self.has_range)):
            return x
        if var is None:
            return self._noisy(self._quantize(x, observe), x)
        scale = along(self.channel_scale(gamma, var), x.ndim, self.weight_dim)
        folded = x * scale
        return self._noisy(self._quantize(folded, observe), folded) / scale if self._enabled else self._watch(folded, x)

    def on_grid(self, weight: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Return the values that a weight's integers are taken from: the weight itself.

        Args:
            weight: as it is stored, folded with its batch norm.
            dim: its channel dimension, None for one scale.
        """
        del dim
        return weight

    @property
    def weight_dim(self) -> int:
        """The output dimension of the weight."""
        return 0 if self.channel_dim is None else self.channel_dim

    def channel_scale(self, gamma: torch.Tensor | None, var: torch.Tensor) -> torch.Tensor:
        """Return s = gamma / sqrt(var + eps), shape [C]; 1 where gamma is 0: that channel is beta, whatever w is."""
        scale = batch_norm_scale(gamma, var, self.bn_eps)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def _noisy(self, rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.noise is None or not self.training:
            return rounded
        return torch.where(self.noise.chosen(x), rounded, x)

    def _quantize(self, x: torch.Tensor, observe: bool) -> torch.Tensor:
        # torch's fused operation takes a zero point for signed values too where all lie on one side (behind a ReLU)
        fused = self.channel_dim is None and x.dtype is torch.float32 and not (self.signed or self.power_of_two)
        if observe and fused:
            return torch.fused_moving_avg_obs_fake_quant(
                x,
                self.observer_enabled,
                self.fake_quant_enabled,
                self.min_val,
                self.max_val,
                self.scale,
                self.zero_point,
                self.momentum,
                self.quant_min,
                self.quant_max,
                -1,
                False,
                False,
            )
        if observe:
            self._watch(x, x)
        if not self._enabled:
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.channel_dim)

    @torch.no_grad()
    def _watch(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Learn the range of x by moving average: r <- r + momentum (new - r), the first batch as it is."""
        low, high = min_max(x.detach().float(), self.channel_dim)
        first = torch.isinf(self.min_val)
        low = torch.where(first, low, self.min_val + self.momentum * (low - self.min_val))
        high = torch.where(first, high, self.max_val + self.momentum * (high - self.max_val))
        self.set_range(low, high)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.bits = int(self.bit_width)
        self.quant_min, self.quant_max = self.grid(self.bits)
        self._enabled = bool(self.fake_quant_enabled)
        self._observe = bool(self.observer_enabled)
        self._has_range = False

    def extra_repr(self) -> str:
        """Return width, grid and switches."""
        per = "tensor" if self.channel_dim is None else f"channel {self.channel_dim}"
        state = ("on" if self._enabled else "off") + (", observing" if self._observe else "")
        step = ", step 2^k" if self.power_of_two else ""
        return f"{'s' if self.signed else 'u'}{self.bits} per {per}{step}, {state}"


def is_fake_quant(graph_module: fx.GraphModule, node: object) -> bool:
    """Whether a node of the graph calls a fake-quantizer."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    return isinstance(graph_module.get_submodule(str(node.target)), FakeQuantizer)


def fake_quantizers(graph_module: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """Yield every fake-quantizer of a prepared graph with its name, such as ``"fake_quant.conv1_weight"``."""
    for name, module in graph_module.named_modules():
        if isinstance(module, FakeQuantizer):
            yield name, module
