"""A digit classifier with early exits: easy images need not go through the whole network.

    python examples/early_exits.py

Exits are trained with the network; afterwards the threshold trades accuracy for work.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top

STEPS, BATCH = 400, 64


class Net(nn.Module):
    """Six convolutions, and a classifier; returns its loss, as models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(6)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return logits, and the loss where labels are given."""
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean((2, 3)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def main() -> None:
    """Train once, and evaluate at several thresholds."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits.target)[order]

    torch.manual_seed(0)
    model = Net()
    exits = top.AddEarlyExits(count=2, example_inputs=(images[:2],))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with top.attach(model, optimizer, [exits], total_steps=STEPS):
        for step in range(STEPS):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % 1400
            model.train()(images[rows], labels=labels[rows])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    early = exits.model
    if early is None:
        raise SystemExit("training did not end")
    print("exits at", ", ".join(f"{place.path} ({place.depth:.0%} of the work)" for place in exits.places))
    early.eval()
    for threshold in (1.1, 0.95, 0.8, 0.6):
        early.threshold = threshold
        early.reset()
        with torch.no_grad():
            answers = torch.cat([early(x).logits.argmax(1) for x in images[1400:].split(1)])  # one by one
        right = int((answers == labels[1400:]).sum())
        shares = ", ".join(f"{share:.0%}" for share in early.exit_shares)
        print(
            f"threshold {threshold:<4}  {right / len(labels[1400:]):6.1%} right  "
            f"average depth {early.average_depth:5.1%}  leave at {shares}"
        )


if __name__ == "__main__":
    main()
