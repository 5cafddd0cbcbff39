"""Whole channels of a digit classifier become costly, and those that cost more than they are worth leave.

    python examples/group_penalties.py

`GroupLasso` lets units shrink to zero in training; `BatchNormSlimming` finds those with small scales, and training goes
on without them; `GrowingRegularization` chooses units by their size and lets them fade.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import Callback

STEPS, BATCH = 300, 64


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) and labels; the first 1400 are for training."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    return images, torch.tensor(digits.target)[order]


def conv_net() -> nn.Module:
    """Two convolutions with batch norms, and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, callbacks: list[Callback], steps: int = STEPS) -> nn.Module:
    """Train with the callbacks."""
    images, labels = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with top.attach(model, optimizer, callbacks, total_steps=steps):
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        for step in range(steps):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % 1400
            nn.functional.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
    return model


def show(name: str, model: nn.Module) -> None:
    """Print how often a model is right, and what it costs."""
    images, labels = data()
    with torch.no_grad():
        right = float((model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean())
    cost = top.measure(model, images[:1])
    print(f"{name:<30} {right:6.1%} right  {cost.parameters:>7,} parameters  {cost.macs:>7,} MACs")


def main() -> None:
    """Dense, and by three penalties."""
    images, _ = data()
    example = (images[:2],)
    show("dense", train(conv_net(), []))
    for strength in (0.05, 0.15):
        lasso = top.GroupLasso(strength=strength, example_inputs=example)
        show(f"group lasso, strength {strength:g}", train(conv_net(), [lasso]))
    slimming = top.BatchNormSlimming(strength=1.0, ratio=0.4, min_units=8, example_inputs=example)
    slim = train(conv_net(), [slimming], STEPS // 2)
    slimming.plan.apply(slim)
    show("slimming, 40% of the channels", train(slim, []))
    growing = top.GrowingRegularization(ratio=0.4, start=0.2, end=0.7, ceiling=2.0, example_inputs=example)
    show("growing regularization, 40%", train(conv_net(), [growing]))


if __name__ == "__main__":
    main()
