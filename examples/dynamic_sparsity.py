"""Train a sparse classifier of handwritten digits from scratch: RigL and SET, and a lottery ticket for comparison.

    python examples/dynamic_sparsity.py

RigL and SET never have more than 10% of the weights, from the first step on; the lottery ticket trains all of them
first, prunes, goes back to an early state and trains again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import Callback

STEPS, BATCH = 300, 64


def one_round(step: int) -> float:
    """The learning rate of a run of `STEPS` steps, as a share: from 1 to 0."""
    return max(0.0, 1.0 - step / STEPS)


def train(name: str, callbacks: list[Callback], steps: int = STEPS, position: Callable[[int], int] = int) -> None:
    """Train with the callbacks, and print what came of it; `position` is the step that the learning rate is at."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with top.attach(model, optimizer, callbacks, total_steps=steps) as session:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_round(position(step)))
        for step in range(steps):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % 1400
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        logged = ", ".join(f"{key} {value:.3f}" for key, value in session.metrics().items())
    with torch.no_grad():
        right = int((model(images[1400:]).argmax(1) == labels[1400:]).sum())
    print(f"{name:<28} {right / (len(labels) - 1400):6.1%} right   {logged}")


def main() -> None:
    """Four runs of one model."""
    train("dense", [])
    train("RigL, 90%, ERK", [top.RigL(sparsity=0.9, every=20)])
    train("SET, 90%, ERK", [top.SET(sparsity=0.9, every=20)])
    ticket = top.LotteryTicket(sparsity=0.9, rounds=2, rewind=30, length=STEPS)
    train("lottery ticket, 90%", [ticket], STEPS + 2 * (STEPS - 30), ticket.position)


if __name__ == "__main__":
    main()
