"""Prune with an optimizer that keeps its moments in 8 bits, and a learning rate that rises after each pruning.

    python examples/low_bit_optimizer.py

The optimizer is torchao's and the scheduler torch's: callbacks work over both. In the Trainer the same is
``TrainingArguments(optim="adamw_torch_8bit")`` and ``callbacks=[...]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torchao.optim import AdamW8bit

import torchopt_passes as top

EPOCHS, BATCH = 12, 64


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 and their classes: 1,400 to train on, 397 to test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def size_of_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that an optimizer keeps, for weights in 8 bits with the scales of their blocks."""

    def size(value: Any) -> int:
        parts = [getattr(value, name) for name in ("codes", "scale", "qmap") if hasattr(value, name)]
        return sum(part.nbytes for part in parts or [value] if isinstance(part, torch.Tensor))

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


def train(name: str, make: Callable[..., torch.optim.Optimizer], *, raised: bool) -> None:
    """Prune 90% of the weights in three large steps, and print what came of it."""
    images, labels, test_images, test_labels = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make(model.parameters(), lr=3e-3)
    per_epoch = len(images) // BATCH
    steps = EPOCHS * per_epoch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    callbacks: list[Any] = [
        top.GradualPruning(sparsity=0.9, start=top.Epochs(3), end=top.Epochs(9), every=top.Epochs(3))
    ]
    if raised:
        callbacks.append(top.CompressionAwareLR(peak=0.5, warmup=5, plateau=10, decay=15))
    with top.attach(model, optimizer, callbacks, total_steps=steps, steps_per_epoch=per_epoch):
        for step in range(steps):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = int((model(test_images).argmax(1) == test_labels).sum())
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    kept = size_of_moments(optimizer) / 1024
    print(f"{name:<36} {kept:6.1f} KB of moments   {zeros:6.1%} zeros   {right / len(test_labels):6.1%} right")


def main() -> None:
    """Three runs of one model."""
    train("AdamW", torch.optim.AdamW, raised=False)
    # torchao compiles the step for each shape, which takes longer than this training
    with torch.compiler.set_stance("force_eager"):
        train("AdamW8bit", AdamW8bit, raised=False)
        train("AdamW8bit, raised learning rate", AdamW8bit, raised=True)


if __name__ == "__main__":
    main()
