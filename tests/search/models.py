"""Networks that searches are tested on: a residual conv net, a tiny BERT, and a network with a fragile layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx, nn

import torchopt_passes as top
from tests.hf_models import MODELS
from tests.models import build


def conv_net() -> tuple[fx.GraphModule, top.PassContext]:
    model, _ = build("conv_residual")
    batches = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return top.capture(model.eval(), (batches[0],)).eval(), top.PassContext(calibration=batches)


@cache
def bert() -> tuple[fx.GraphModule, top.PassContext]:
    torch.manual_seed(0)
    model = MODELS["bert"].build().eval()
    batches: list[Any] = [MODELS["bert"].case(size)[1] for size in (2, 3)]
    return top.capture(model, (), batches[0]).eval(), top.PassContext(calibration=batches)


class Fragile(nn.Module):
    """Four linears; the third has one huge column on an input that is nearly zero: one scale cannot hold both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        with torch.no_grad():
            for layer in self.layers:
                nn.init.orthogonal_(layer.weight)  # pyright: ignore
                nn.init.zeros_(layer.bias)  # pyright: ignore
            self.layers[1].weight[0] *= 1e-4  # pyright: ignore
            self.layers[2].weight[:, 0] *= 300.0  # pyright: ignore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def fragile() -> tuple[fx.GraphModule, top.PassContext]:
    torch.manual_seed(0)
    batches = [torch.randn(64, 16) for _ in range(2)]
    return top.capture(Fragile().eval(), (batches[0],)).eval(), top.PassContext(calibration=batches)
