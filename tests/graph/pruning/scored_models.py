"""Two small models with hand-made groups, and slow references, for the tests of scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import torchopt_passes as top
from torchopt_passes.graph.channels import ChannelGroup, Constraints, GroupAxis


class ConvNet(nn.Module):
    """conv, batch norm, ReLU6; grouped conv, ReLU in place; conv, GELU; flatten, linear. Returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
        self.conv3 = nn.Conv2d(6, 2, 1, bias=False)
        self.fc = nn.Linear(2 * 2 * 2, 3)
        self.relu6, self.relu = nn.ReLU6(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu6(self.bn(self.conv1(x)))
        x = self.relu(self.conv2(x))
        return self.fc(nn.functional.gelu(self.conv3(x)).flatten(1))


class Mlp(nn.Module):
    """linear, tanh, a linear that is used twice, a bare parameter; returns the loss when it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 6)
        self.twice = nn.Linear(6, 6)
        self.down = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.up(x))
        logits = self.twice(torch.relu(self.twice(x))) @ self.down
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def group(name: str, size: int, *axes: tuple[str, int, Sequence[int]]) -> ChannelGroup:
    """Make a group; its axes as (fqn, dim, unit of each index)."""
    made = tuple(GroupAxis(fqn, dim, np.array(unit_of, dtype=np.int64)) for fqn, dim, unit_of in axes)
    return ChannelGroup(name=name, kind="channels", axes=made, size=size, locked=None, constraints=Constraints())


FIRST = group(
    "conv1.weight:0",
    2,  # the grouped convolution behind it keeps both halves alike
    ("conv1.weight", 0, [0, 1, 0, 1]),
    ("conv1.bias", 0, [0, 1, 0, 1]),
    ("bn.weight", 0, [0, 1, 0, 1]),
    ("bn.bias", 0, [0, 1, 0, 1]),
    ("bn.running_mean", 0, [0, 1, 0, 1]),
    ("bn.running_var", 0, [0, 1, 0, 1]),
    ("conv2.weight", 1, [0, 1]),
)
SECOND = group(
    "conv2.weight:0", 6, ("conv2.weight", 0, range(6)), ("conv2.bias", 0, range(6)), ("conv3.weight", 1, range(6))
)
THIRD = group("conv3.weight:0", 2, ("conv3.weight", 0, [0, 1]), ("fc.weight", 1, [0, 0, 0, 0, 1, 1, 1, 1]))
UP = group("up.weight:0", 6, ("up.weight", 0, range(6)), ("up.bias", 0, range(6)), ("twice.weight", 1, range(6)))
OUT = group("twice.weight:0", 6, ("twice.weight", 0, range(6)), ("twice.bias", 0, range(6)), ("down", 0, range(6)))


def conv_net() -> tuple[ConvNet, fx.GraphModule]:
    """Return the model in train mode, with statistics that are not the defaults, and its graph."""
    graph_module = copy.deepcopy(_captured_conv_net())
    return graph_module.source, graph_module


def mlp() -> tuple[Mlp, fx.GraphModule]:
    """Return the model, and its graph with labels."""
    graph_module = copy.deepcopy(_captured_mlp())
    return graph_module.source, graph_module


@cache
def _captured_conv_net() -> top.CapturedModule:
    torch.manual_seed(0)
    model = ConvNet()
    for tensor in (model.bn.weight, model.bn.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    for tensor in (model.bn.bias, model.bn.running_mean):
        nn.init.uniform_(tensor, -0.5, 0.5)
    return top.capture(model, (images(2),))


@cache
def _captured_mlp() -> top.CapturedModule:
    torch.manual_seed(0)
    return top.capture(Mlp(), kwargs=labelled(2))


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))


def labelled(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {"x": torch.randn(n, 5, generator=generator), "labels": torch.randint(0, 4, (n,), generator=generator)}


def seen(model: nn.Module, layer: str, batches: Sequence[Any], of: str) -> torch.Tensor:
    """Return the inputs or outputs of a layer in eval mode, all batches and calls together."""
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append((args[0] if of == "inputs" else output).detach().double().clone())

    handle = model.get_submodule(layer).register_forward_hook(hook)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    model.train(was_training)
    handle.remove()
    return torch.cat(found)


def slopes(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of each parameter in eval mode; nothing is left on the parameters."""
    was_training = model.training
    output = model.eval()(**batch)
    model.train(was_training)
    loss = output["loss"]
    pairs = dict(model.named_parameters())
    return dict(zip(pairs, torch.autograd.grad(loss, list(pairs.values())), strict=True))
