"""Prune a classifier of handwritten digits while it trains: by magnitude, by movement, in a 2:4 pattern.

    python examples/gradual_pruning.py

The model and the loop are ordinary PyTorch; `attach` is the one line that is added. The same callbacks go into
``Trainer(callbacks=[...])`` of Transformers.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import Callback

EPOCHS, BATCH = 15, 64


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 and their classes: 1,400 to train on, 397 to test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(name: str, callbacks: list[Callback]) -> None:
    """Train with the callbacks, and print what came of it."""
    images, labels, test_images, test_labels = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    per_epoch = len(images) // BATCH
    steps = EPOCHS * per_epoch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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
    print(f"{name:<42} {zeros:6.1%} zeros   {right / len(test_labels):6.1%} right")


def main() -> None:
    """Five runs of one model."""
    start, end = top.Epochs(2), top.Epochs(10)
    train("dense", [])
    train("90%, magnitude, cubic", [top.GradualPruning(sparsity=0.9, start=start, end=end)])
    train("90%, movement, over all weights", [
        top.GradualPruning(sparsity=0.9, start=start, end=end, criterion="movement", scope="global")
    ])  # fmt: skip
    train("2:4, reached gradually", [top.GradualPruning(pattern="2:4", start=start, end=end, include=("0", "2"))])
    train("90%, two large steps, raised learning rate", [
        top.GradualPruning(sparsity=0.9, start=start, end=end, every=top.Epochs(8), schedule="multi_step:0=0.8,1=1"),
        top.CompressionAwareLR(peak=0.5, warmup=5, plateau=20, decay=20),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
