"""Handwritten digits (scikit-learn's, 8 x 8 pixels), a small network, and a teacher for it: shared by the examples."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

Example = dict[str, torch.Tensor]


class Net(nn.Module):
    """Three linear layers; returns the loss with the logits, as Transformers models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        logits = self.layers(pixel_values)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


def load() -> tuple[list[Example], list[Example]]:
    """Return 1500 examples to train on and 297 to test with."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    examples = [{"pixel_values": x, "labels": torch.tensor(y)} for x, y in zip(pixels, digits.target, strict=True)]
    return examples[:1500], examples[1500:]


def collate(examples: list[Example]) -> Example:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def make_teacher(train: list[Example]) -> Net:
    """Return a wide network, trained on everything; every rank trains the same."""
    torch.manual_seed(1)
    teacher, batch = Net(256), collate(train)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(100):
        teacher(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher


@torch.no_grad()
def accuracy(model: nn.Module, test: list[Example]) -> float:
    batch = collate(test)
    return float((model.eval()(**batch).logits.argmax(-1) == batch["labels"]).float().mean())
