"""The check of the coverage benchmark: it must neither slander a right removal nor pass a wrong one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.coverage_check import Removed, distance, masked_outputs, plain_outputs

CHANNELS, REMOVED = 16, [1, 2, 5, 6, 9, 10, 13, 14]  # the same two of each of the four groups of the group norm


class StandardisedConv(nn.Conv2d):
    """Weight standardisation as timm writes it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(weight, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return functional.conv2d(input, weight, self.bias, padding=1)


class HandwrittenNorm(nn.Module):
    """An RMS norm as Transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + 1e-6)).to(x.dtype)


class Norms(nn.Module):
    """Every statistic that spans channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.groups = nn.GroupNorm(4, channels)
        self.standardised = StandardisedConv(channels, channels, 3, padding=1)
        self.batch = nn.BatchNorm2d(channels)
        self.whole = nn.GroupNorm(1, channels)
        self.layer = nn.LayerNorm(channels)
        self.plain = nn.LayerNorm(channels, elementwise_affine=False)
        self.handwritten = HandwrittenNorm(channels)
        self.rms = nn.RMSNorm(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardised(torch.sigmoid(self.groups(self.conv(x))))
        x = self.whole(torch.relu(self.batch(x))).mean((2, 3))
        return self.head(self.rms(self.handwritten(self.plain(self.layer(x)))))


def test_a_right_removal_passes_and_a_wrong_one_does_not():
    torch.manual_seed(0)
    model = Norms(CHANNELS).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    pruned, kept = Norms(CHANNELS - len(REMOVED)).eval(), [i for i in range(CHANNELS) if i not in REMOVED]
    removed: Removed = {}
    small = {}
    for name, tensor in model.state_dict().items():
        cut = [dim for dim, size in enumerate(tensor.shape) if size == CHANNELS]
        for dim in cut:
            tensor = tensor.index_select(dim, torch.tensor(kept))
        small[name] = tensor
        removed[name] = dict.fromkeys(cut, REMOVED)
    pruned.load_state_dict(small)
    inputs = (torch.randn(2, 3, 8, 8),)
    actual = plain_outputs(pruned, inputs, {})
    assert distance(actual, masked_outputs(copy.deepcopy(model), removed, inputs, {})) == pytest.approx(0, abs=1e-12)
    assert distance(actual, plain_outputs(copy.deepcopy(model), inputs, {})) > 1e-3
    removed["head.weight"] = {1: [*REMOVED[:-1], CHANNELS - 1]}
    assert distance(actual, masked_outputs(copy.deepcopy(model), removed, inputs, {})) > 1e-3


def test_attention_may_be_scaled_by_the_features_that_stay():
    class Attention(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(8, features), nn.Linear(8, features)

        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(self.query(x), self.key(x), x)

    torch.manual_seed(0)
    model, pruned = Attention(8), Attention(6)
    pruned.load_state_dict({name: tensor[:6] for name, tensor in model.state_dict().items()})
    removed: Removed = {name: {0: [6, 7]} for name in model.state_dict()}
    inputs = (torch.randn(2, 4, 8),)
    actual = plain_outputs(pruned, inputs, {})
    assert distance(actual, masked_outputs(copy.deepcopy(model), removed, inputs, {})) > 1e-4
    masked = masked_outputs(copy.deepcopy(model), removed, inputs, {}, wide=True)
    assert distance(actual, masked) == pytest.approx(0, abs=1e-12)


def test_statistics_outside_of_a_norm_may_be_over_the_channels_that_stay():
    class Spatial(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)

    torch.manual_seed(0)
    model, pruned = Spatial(8), Spatial(6)
    pruned.load_state_dict({name: tensor[:6] for name, tensor in model.state_dict().items()})
    removed: Removed = {name: {0: [6, 7]} for name in model.state_dict()}
    inputs = (torch.randn(2, 3, 4, 4),)
    actual = plain_outputs(pruned, inputs, {})
    assert distance(actual, masked_outputs(copy.deepcopy(model), removed, inputs, {})) > 1e-4
    masked = masked_outputs(copy.deepcopy(model), removed, inputs, {}, wide=True)
    assert distance(actual, masked) == pytest.approx(0, abs=1e-12)


def test_a_changed_shape_has_no_distance():
    assert distance([torch.ones(2, 3)], [torch.ones(2, 4)]) is None
