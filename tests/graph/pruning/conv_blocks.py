"""Blocks of random networks on images (N, C, H, W)."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Apply, Block, Shape, chain, fit, shape_after
from tests.graph.pruning.norms import ChannelsLast, GroupNorm, LayerNorm, ManualLayerNorm, ManualRMSNorm, RMSNorm

__all__ = [
    "ChannelShuffle",
    "Conv",
    "ConvTranspose",
    "Depthwise",
    "Downsample",
    "ImageNorm",
    "Pixels",
    "Pool",
    "Shift",
    "SqueezeExcite",
]


@dataclass(frozen=True)
class Conv(Block):
    """A convolution; `groups` as far as it divides the channels."""

    out: int = 8
    kernel: Literal[1, 3] = 1
    stride: int = 1
    groups: int = 1
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        groups = gcd(self.groups, shape[0], self.out)
        padding = self.kernel // 2
        return nn.Conv2d(shape[0], self.out, self.kernel, self.stride, padding, groups=groups, bias=self.bias)


@dataclass(frozen=True)
class Depthwise(Block):
    """A depthwise convolution, with one or two outputs for each channel."""

    multiplier: int = 1
    stride: int = 1
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        n = shape[0]
        return nn.Conv2d(n, n * self.multiplier, 3, self.stride, 1, groups=n, bias=self.bias)


@dataclass(frozen=True)
class ConvTranspose(Block):
    """A transposed convolution that keeps the size, or doubles it."""

    out: int = 8
    double: bool = False
    groups: int = 1
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        groups = gcd(self.groups, shape[0], self.out)
        kernel, stride, padding = (2, 2, 0) if self.double else (3, 1, 1)
        return nn.ConvTranspose2d(shape[0], self.out, kernel, stride, padding, groups=groups, bias=self.bias)


@dataclass(frozen=True)
class ImageNorm(Block):
    """A normalisation of images; what `tracks` has running statistics."""

    form: Literal["batch", "instance", "group", "layer", "manual_layer", "rms", "manual_rms"] = "batch"
    groups: int = 2
    tracks: bool = True
    affine: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        n = shape[0]
        if self.form == "instance" and shape[1:] == (1, 1):
            return None  # refused by PyTorch in train mode
        if self.form == "batch":
            return nn.BatchNorm2d(n, affine=self.affine, track_running_stats=self.tracks)
        if self.form == "instance":
            return nn.InstanceNorm2d(n, affine=self.affine, track_running_stats=self.tracks)
        if self.form == "group":
            return GroupNorm(gcd(self.groups, n), n)
        if self.form == "manual_layer":
            return ManualLayerNorm(n)
        return ChannelsLast({"layer": LayerNorm, "rms": RMSNorm, "manual_rms": ManualRMSNorm}[self.form](n))


@dataclass(frozen=True)
class Pool(Block):
    """Pooling over 2 x 2, or over everything (keeping the dimensions)."""

    form: Literal["max", "average", "adaptive"] = "max"

    def make(self, shape: Shape) -> nn.Module | None:
        if min(shape[1:]) < 4:
            return None
        return {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2), "adaptive": nn.AdaptiveAvgPool2d(2)}[self.form]


@dataclass(frozen=True)
class ChannelShuffle(Block):
    """ShuffleNet's, as a module or written by hand."""

    groups: int = 2
    by_hand: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        groups = gcd(self.groups, shape[0])
        if not self.by_hand:
            return nn.ChannelShuffle(groups)

        def shuffle(x: torch.Tensor) -> torch.Tensor:
            n, c, h, w = x.shape
            return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

        return Apply(f"channel shuffle {groups}", shuffle)


@dataclass(frozen=True)
class Pixels(Block):
    """Pixel shuffle (4 channels into 2 x 2 pixels) or unshuffle; as a module or by views."""

    unshuffle: bool = False
    by_hand: bool = False

    def make(self, shape: Shape) -> nn.Module | None:
        if self.unshuffle:
            if shape[1] % 2 or shape[2] % 2:
                return None
            return Apply("pixel unshuffle by hand", _space_to_depth) if self.by_hand else nn.PixelUnshuffle(2)
        if shape[0] % 4:
            return None
        return Apply("pixel shuffle by hand", _depth_to_space) if self.by_hand else nn.PixelShuffle(2)


def _space_to_depth(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, 4 * c, h // 2, w // 2)


def _depth_to_space(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // 4, 2 * h, 2 * w)


@dataclass(frozen=True)
class Shift(Block):
    """Images flipped or rolled."""

    form: Literal["flip", "roll", "rot90"] = "flip"

    def make(self, shape: Shape) -> nn.Module | None:
        if self.form == "rot90" and shape[1] == shape[2]:
            return Apply("rot90", lambda x: torch.rot90(x, 1, (2, 3)))
        if self.form == "flip":
            return Apply("flip", lambda x: x.flip(3))
        return Apply("roll", lambda x: x.roll((1, -1), (2, 3)))


@dataclass(frozen=True)
class SqueezeExcite(Block):
    """A gate per channel from the mean over all positions; its layers are convolutions or linears."""

    hidden: int = 4
    form: Literal["conv", "linear"] = "conv"
    gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid"

    def make(self, shape: Shape) -> nn.Module | None:
        return _SqueezeExcite(shape[0], self)


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int, wish: SqueezeExcite) -> None:
        super().__init__()
        self.form, self.gate = wish.form, torch.sigmoid if wish.gate == "sigmoid" else F.hardsigmoid
        if wish.form == "conv":
            self.reduce, self.expand = nn.Conv2d(channels, wish.hidden, 1), nn.Conv2d(wish.hidden, channels, 1)
        else:
            self.reduce, self.expand = nn.Linear(channels, wish.hidden), nn.Linear(wish.hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "conv":
            return x * self.gate(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3))))))[:, :, None, None]


@dataclass(frozen=True)
class Downsample(Block):
    """A residual block of stride 2; the shortcut is a convolution, pooling and a convolution, or slices and zeros."""

    inner: tuple[Block, ...] = ()
    out: int = 8
    shortcut: Literal["conv", "pool", "pad"] = "conv"

    def make(self, shape: Shape) -> nn.Module | None:
        if min(shape[1:]) < 4:
            return None
        inner, after = chain(self.inner, shape, inside=True)
        inner = nn.Sequential(inner, nn.Conv2d(after[0], self.out, 3, 2, 1), nn.BatchNorm2d(self.out))
        if self.shortcut == "conv":
            shortcut: nn.Module = nn.Conv2d(shape[0], self.out, 1, 2)
        elif self.shortcut == "pool":
            shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(shape[0], self.out, 1))
        else:
            every = Apply("every second", lambda x: x[:, :, ::2, ::2])
            shortcut = nn.Sequential(every, fit("pad", shape, (self.out, *shape[1:])))
        if shape_after(inner, shape) != shape_after(shortcut, shape):
            return None
        return _Sum(inner, shortcut)


class _Sum(nn.Module):
    def __init__(self, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))
