"""The zoo's models of images, and the groups that must be found in them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.graph.pruning.blocks import Block
from tests.graph.pruning.branches import Concat, Gate, Residual, Split, Twice
from tests.graph.pruning.bridges import Flatten, Patchify, PatchMerging
from tests.graph.pruning.common_blocks import Activation, ChannelOrder, LayerScale, Reshape
from tests.graph.pruning.conv_blocks import (
    ChannelShuffle,
    Conv,
    ConvTranspose,
    Depthwise,
    Downsample,
    ImageNorm,
    Pixels,
    Pool,
    Shift,
    SqueezeExcite,
)
from tests.graph.pruning.norms import Keeping
from tests.graph.pruning.random_networks import Classifier, Images
from tests.graph.pruning.token_blocks import Linear
from tests.graph.pruning.zoo_case import Case, any_kind, blocks, case, channels, generated, places

__all__ = ["IMAGES"]

INPUT = Images(channels=3, size=4)
RELU = Activation("relu")
LAST = Conv(5)
HEAD = Classifier("mean")


def norm(form: str, *parts: str, **options: bool) -> Case:
    cuts = [f"blocks.1.{part}:0*1" for part in parts]
    body = (Conv(8), ImageNorm(form, **options), RELU, LAST)
    return case(INPUT, body, channels(8, "blocks.0.weight:0*1", *cuts, "blocks.3.weight:1*1"))


def split(form: str, sizes: tuple[int, int] | None = None, number: int = 8) -> Case:
    """Make a case of a split in parts of these sizes; None: the parts may lose the same channels only."""
    body = (Conv(number), RELU, Split((Conv(4),), (Conv(6),), form), LAST)
    first, second = "blocks.2.first.0.weight:1*1", "blocks.2.second.0.weight:1*1"
    rest = (channels(4, "blocks.2.first.0.weight:0"), channels(6, "blocks.2.second.0.weight:0", "blocks.3.weight:1*1"))
    if sizes is None:
        return case(INPUT, body, any_kind(number // 2, "blocks.0.weight:0", first), *rest)
    one, other = any_kind(sizes[0], "blocks.0.weight:0*1", first), any_kind(sizes[1], "blocks.0.weight:0*1", second)
    return case(INPUT, body, one, other, *rest)


def ordered(form: str, count: int = 1) -> Case:
    body = (Conv(8), RELU, ChannelOrder(form), LAST)
    return case(INPUT, body, any_kind(8, "blocks.0.weight:0*1", f"blocks.3.weight:1*{count}"))


class Standardized(Keeping):
    """A convolution whose weight is standardized by a batch norm of it (NFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def axis(self) -> tuple[torch.Tensor, int]:
        return self.weight, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.kept is None else self.weight[:, self.kept]
        x = x if self.kept is None else x[:, self.kept]
        rows = weight.reshape(1, weight.shape[0], -1)
        return functional.conv2d(x, functional.batch_norm(rows, None, None, training=True).reshape_as(weight))


class StandardizedNet(nn.Module):
    """Two convolutions around a standardized one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), Standardized(), nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)).relu())


class Volumes(nn.Module):
    """Convolutions of all ranks, as modules of 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.up, self.last = nn.ConvTranspose3d(8, 6, 2, 2), nn.Conv3d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.norm(self.first(x)).relu()))


class Norms(nn.Module):
    """A norm of another kind between two convolutions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


class FrozenBatchNorm(nn.Module):
    """A batch norm of buffers, as detectors have."""

    def __init__(self, number: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.linspace(0.5, 1.5, number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


NORM_CUTS = tuple(f"norm.{part}:0*1" for part in ("weight", "bias", "running_mean", "running_var"))
OVER_NORM = channels(8, "first.weight:0*1", *NORM_CUTS, "last.weight:1*1")
HALVED = channels(6, "blocks.0.weight:0*2", "blocks.2.weight:1*1")
BN, IR = ImageNorm("batch"), "blocks.1.inner.0"
INVERTED: tuple[Block, ...] = (Conv(12), BN, RELU, Depthwise(), BN, RELU, SqueezeExcite(4), Conv(6), BN)

IMAGES: dict[str, Case] = {
    "conv2d": case(INPUT, (Conv(8, 3), RELU, LAST), channels(8, "blocks.0.weight:0*1", "blocks.2.weight:1*1")),
    "conv3d": Case(
        Volumes,
        generated(2, 4, 4, 4),
        (channels(8, "first.weight:0*1", "up.weight:0*1"), channels(6, "up.weight:1*1", "last.weight:1*1")),
    ),
    "conv_transpose": case(
        INPUT,
        (Conv(8), ConvTranspose(6, double=True), RELU, LAST),
        channels(8, "blocks.0.weight:0*1", "blocks.1.weight:0*1"),
        channels(6, "blocks.1.weight:1*1", "blocks.1.bias:0*1", "blocks.3.weight:1*1"),
    ),
    "grouped_conv_transpose": case(
        INPUT,
        (Conv(8), ConvTranspose(12, groups=4), LAST),
        blocks(4, "blocks.0.weight:0*2", "blocks.1.weight:0*2", "blocks.1.bias:0*3", "blocks.2.weight:1*3"),
        places(2, "blocks.0.weight:0*4", "blocks.1.weight:0*4"),
        places(3, "blocks.1.weight:1*1", "blocks.1.bias:0*4", "blocks.2.weight:1*4"),
    ),
    "grouped_conv": case(
        INPUT,
        (Conv(8), RELU, Conv(12, 3, groups=4), RELU, LAST),
        blocks(4, "blocks.0.weight:0*2", "blocks.2.weight:0*3", "blocks.4.weight:1*3"),
        places(2, "blocks.0.weight:0*4", "blocks.2.weight:1*1"),
        places(3, "blocks.2.weight:0*4", "blocks.4.weight:1*4"),
    ),
    "depthwise_conv": case(
        INPUT,
        (Conv(8), RELU, Depthwise(), RELU, LAST),
        any_kind(8, "blocks.0.weight:0*1", "blocks.2.weight:0*1", "blocks.4.weight:1*1"),
    ),
    "channel_multiplier": case(
        INPUT,
        (Conv(4), RELU, Depthwise(2), LAST),
        any_kind(4, "blocks.0.weight:0*1", "blocks.2.weight:0*2", "blocks.3.weight:1*2"),
    ),
    "batch_norm": norm("batch", "weight", "bias", "running_mean", "running_var"),
    "batch_norm_without_affine": norm("batch", "running_mean", "running_var", affine=False),
    "sync_batch_norm": Case(lambda: Norms(nn.SyncBatchNorm(8)), generated(3, 4, 4), (OVER_NORM,)),
    "frozen_batch_norm": Case(lambda: Norms(FrozenBatchNorm(8)), generated(3, 4, 4), (OVER_NORM,)),
    "instance_norm": norm("instance", "weight", "bias", "running_mean", "running_var"),
    "layer_norm": norm("layer", "inner.weight", "inner.bias"),
    "rms_norm": norm("rms", "inner.weight"),
    "manual_rms_norm": norm("manual_rms", "inner.weight"),
    "manual_layer_norm": norm("manual_layer", "weight", "bias"),
    "group_norm": case(
        INPUT,
        (Conv(8), ImageNorm("group", 2), LAST),
        blocks(2, "blocks.0.weight:0*4", "blocks.1.weight:0*4", "blocks.2.weight:1*4"),
        places(4, "blocks.0.weight:0*2", "blocks.1.weight:0*2", "blocks.2.weight:1*2"),
    ),
    "prelu": case(INPUT, (Conv(8), Activation("prelu"), LAST), channels(8, "blocks.1.weight:0*1")),
    "glu": case(INPUT, (Conv(12), Activation("glu"), LAST), HALVED),
    "swiglu": case(INPUT, (Conv(12), Activation("swiglu"), LAST), HALVED),
    "concat": case(
        INPUT,
        (Conv(4), Concat(((Conv(6, 3),),)), LAST),
        channels(4, "blocks.0.weight:0*1", "blocks.1.branches.0.0.weight:1*1", "blocks.2.weight:1*1"),
        channels(6, "blocks.1.branches.0.0.weight:0*1", "blocks.2.weight:1*1"),
    ),
    "split": split("split", (2, 6)),
    "slice": split("slice", (2, 6)),
    "narrow": split("narrow", (2, 6)),
    "strided_slice": case(
        INPUT,
        (Conv(8), RELU, Split((Conv(4),), (Conv(6),), "strided"), LAST),
        channels(4, "blocks.2.first.0.weight:0*1", "blocks.3.weight:1*1"),
    ),
    "chunk": split("chunk"),
    "unbind": split("unbind"),
    "split_by_index": case(
        INPUT,
        (Conv(8), RELU, Split((Conv(4),), (Conv(6),), "index"), LAST),
        channels(6, "blocks.2.second.0.weight:0*1", "blocks.3.weight:1*1"),
    ),
    "stack": case(INPUT, (Conv(8), Split((Conv(4),), (Conv(4),), "split", "stack"), LAST)),
    "interleaved": case(INPUT, (Conv(8), Split((Conv(4),), (Conv(4),), "split", "interleave"), LAST)),
    "index_select": ordered("index_select"),
    "index": ordered("index"),
    "standardized_weight": Case(
        StandardizedNet,
        generated(3, 6, 6),
        (
            channels(8, "first.weight:0*1", "middle.weight:1*1"),
            channels(6, "middle.weight:0*1", "last.weight:1*1"),
        ),
    ),
    "flip_channels": ordered("flip"),
    "roll_channels": case(INPUT, (Conv(8), RELU, ChannelOrder("roll"), LAST)),
    "repeat_channels": ordered("repeat", 2),
    "roll_images": case(INPUT, (Conv(8), Shift("roll"), LAST), channels(8, "blocks.0.weight:0", "blocks.2.weight:1")),
    "flatten": case(
        INPUT, (Conv(6), RELU, Flatten("view"), Linear(5)), channels(6, "blocks.0.weight:0*1", "blocks.3.weight:1*16")
    ),
    "pooled_flatten": case(
        INPUT, (Conv(6), Pool("max"), Flatten(), Linear(5)), channels(6, "blocks.0.weight:0*1", "blocks.3.weight:1*4")
    ),
    "reshape": case(INPUT, (Conv(8), Reshape("scale_places", 4), LAST), any_kind(2, "blocks.1.gamma:0*1")),
    "pixel_shuffle": case(INPUT, (Conv(12), Pixels(), LAST), any_kind(3, "blocks.0.weight:0*4", "blocks.2.weight:1*1")),
    "pixel_unshuffle": case(
        INPUT, (Conv(4), Pixels(unshuffle=True), LAST), any_kind(4, "blocks.0.weight:0*1", "blocks.2.weight:1*4")
    ),
    "pixel_shuffle_by_views": case(
        INPUT, (Conv(12), Pixels(by_hand=True), LAST), any_kind(3, "blocks.0.weight:0*4", "blocks.2.weight:1*1")
    ),
    "pixel_unshuffle_by_views": case(
        INPUT, (Conv(4), Pixels(True, True), LAST), any_kind(4, "blocks.0.weight:0*1", "blocks.2.weight:1*4")
    ),
    "channel_shuffle": case(
        INPUT, (Conv(8), ChannelShuffle(2), LAST), any_kind(4, "blocks.0.weight:0*2", "blocks.2.weight:1*2")
    ),
    "patch_merging": case(
        INPUT,
        (Conv(4), PatchMerging(6), LAST),
        channels(4, "blocks.0.weight:0*1", "blocks.1.norm.weight:0*4", "blocks.1.reduction.weight:1*4"),
        channels(6, "blocks.1.reduction.weight:0*1", "blocks.2.weight:1*1"),
    ),
    "patches_by_views": case(
        INPUT,
        (Conv(4), Patchify("view", 8), Linear(3)),
        channels(4, "blocks.0.weight:0*1", "blocks.1.1.weight:1*4"),
        channels(8, "blocks.1.1.weight:0*1", "blocks.2.weight:1*1"),
    ),
    "squeeze_excite": case(
        INPUT,
        (Conv(8), SqueezeExcite(4), LAST),
        channels(8, "blocks.0.weight:0*1", "blocks.1.reduce.weight:1*1", "blocks.1.expand.weight:0*1"),
        channels(4, "blocks.1.reduce.weight:0*1", "blocks.1.expand.weight:1*1"),
    ),
    "layer_scale": case(INPUT, (Conv(8), LayerScale(True), LAST), channels(8, "blocks.1.gamma:1*1")),
    "gate": case(INPUT, (Conv(4), Gate((Conv(8),), (Conv(8),)), LAST), channels(8, "blocks.1.left.0.weight:0*1")),
    "twice": case(
        INPUT,
        (Conv(8), Twice((Conv(6), RELU)), LAST),
        channels(6, "blocks.1.inner.0.0.weight:0*1", "blocks.1.inner.1.weight:1*1"),
        channels(8, "blocks.0.weight:0*1", "blocks.1.inner.0.0.weight:1*1", "blocks.1.inner.1.weight:0*1"),
    ),
    "residual_stride_2": case(
        INPUT,
        (Conv(4), Downsample((), 8, "conv"), LAST),
        channels(8, "blocks.1.inner.1.weight:0*1", "blocks.1.shortcut.weight:0*1", "blocks.2.weight:1*1"),
    ),
    "shortcut_of_zeros": case(INPUT, (Conv(4), Downsample((Conv(6),), 8, "pad"), LAST)),
    "depthwise_separable": case(
        INPUT,
        (Conv(8), Depthwise(), BN, RELU, Conv(6), BN, RELU, LAST),
        any_kind(8, "blocks.0.weight:0*1", "blocks.1.weight:0*1", "blocks.2.running_var:0*1", "blocks.4.weight:1*1"),
        channels(6, "blocks.4.weight:0*1", "blocks.5.running_mean:0*1", "blocks.7.weight:1*1"),
    ),
    "inverted_residual": case(
        INPUT,
        (Conv(6), Residual(INVERTED), LAST),
        any_kind(12, f"{IR}.0.weight:0*1", f"{IR}.3.weight:0*1", f"{IR}.6.expand.weight:0*1", f"{IR}.7.weight:1*1"),
        channels(6, "blocks.0.weight:0*1", f"{IR}.7.weight:0*1", f"{IR}.8.weight:0*1", "blocks.2.weight:1*1"),
        channels(4, f"{IR}.6.reduce.weight:0*1"),
        head=HEAD,
    ),
}
