"""A classifier of handwritten digits learns which weights, and which channels, it needs: L0 gates.

    python examples/l0_gates.py

Single weights by a factor and to a given sparsity; then channels to a given share of the multiply-accumulates, which
leave the model when training ends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import Callback

STEPS, BATCH = 500, 64


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) and labels; the first 1400 are for training."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    return images, torch.tensor(digits.target)[order]


def dense_net() -> nn.Module:
    """Three linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def conv_net() -> nn.Module:
    """Two convolutions with batch norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(name: str, make: Callable[[], nn.Module], callbacks: list[Callback]) -> None:
    """Train with the callbacks, and print what came of it."""
    images, labels = data()
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    with top.attach(model, optimizer, callbacks, total_steps=STEPS):
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)  # made when the gates are in
        for step in range(STEPS):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % 1400
            nn.functional.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = float((model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean())
    cost = top.measure(model, images[:1])
    print(f"{name:<34} {right:6.1%} right  {cost.sparsity:6.1%} zeros  {cost.macs:>7,} MACs")


def main() -> None:
    """Six runs."""
    images, _ = data()
    train("dense", dense_net, [])
    train("weights, by a factor", dense_net, [top.L0Pruning(strength=3e-5)])
    train("weights, 90% zeros", dense_net, [top.L0Pruning(sparsity=0.9)])
    train("convolutions", conv_net, [])
    for name, settle in (("channels, 60% of the MACs gone", 0.8), ("the same, gates never held", None)):
        channels = top.L0ChannelPruning(sparsity=0.6, of="macs", settle=settle, example_inputs=(images[:2],))
        train(name, conv_net, [channels])


if __name__ == "__main__":
    main()
