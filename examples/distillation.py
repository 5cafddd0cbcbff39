"""Distil a classifier of handwritten digits: by predictions, features and relations, from a cache, across modalities.

    python examples/distillation.py

The teacher has seen 1,400 labelled digits, its students see 100; the last one sees 1,400 without their labels. The loop
is ordinary PyTorch; `attach` is the one line that is added, and the same callbacks go into ``Trainer(callbacks=[...])``
of Transformers. Accuracies are means over two seeds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchopt_passes as top
from torchopt_passes.callbacks import Callback

Batch = dict[str, torch.Tensor]
STEPS, BATCH, LABELLED = 200, 50, 100


class Network(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return loss and logits, as models of Transformers do."""
        hidden = torch.relu(self.conv2(torch.relu(self.conv1(image))))
        logits = self.fc(hidden.amax((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Reader(nn.Module):
    """Never sees the image: reads 16 words, how much ink is in each row and in each column."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 24)
        self.body = nn.Linear(16 * 24, 48)
        self.fc = nn.Linear(48, 10)

    def forward(self, text: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return loss and logits."""
        logits = self.fc(torch.relu(self.body(self.words(text).flatten(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data() -> tuple[Batch, Batch]:
    """Images of 8 x 8, the words that go with them, and their classes: 1,400 to train on, 397 to test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    image = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    ink = torch.cat((image.sum(3), image.sum(2)), 2).squeeze(1)
    whole = {"image": image, "text": (4 * ink).long().clamp(max=31), "labels": torch.tensor(digits.target)[order]}
    return {k: v[:1400] for k, v in whole.items()}, {k: v[1400:] for k, v in whole.items()}


def train(model: nn.Module, rows: Batch, columns: list[str], callbacks: list[Callback]) -> nn.Module:
    """The loop. A batch has the columns that the student reads, and those that its teacher reads."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with top.attach(model.train(), optimizer, callbacks, total_steps=STEPS):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-2, STEPS
        )  # after attach: projectors are trained too
        for step in range(STEPS):
            chosen = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(step))[:BATCH]
            model(**{name: rows[name][chosen] for name in columns})["loss"].backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model.eval()


def accuracy(model: nn.Module, rows: Batch, column: str) -> float:
    """The share of the test digits that is classified right."""
    with torch.no_grad():
        logits = model(**{column: rows[column], "labels": rows["labels"]})["logits"]
    return float((logits.argmax(1) == rows["labels"]).float().mean())


def compare(
    name: str,
    make: Callable[[], nn.Module],
    rows: Batch,
    column: str,
    recipe: Callable[[], list[Callback]],
) -> None:
    """Train two students on `rows` by a recipe, and print how good they are."""
    _, test = data()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = train(make(), rows, list(rows), recipe())
        found.append(accuracy(student, test, column))
    print(f"{name:<40} {sum(found) / 2:6.1%} right")


def main() -> None:
    """One teacher, and what students make of it."""
    rows, test = data()
    few = {name: rows[name][:LABELLED] for name in ("image", "labels")}
    torch.manual_seed(0)
    teacher = train(Network(24), rows, ["image", "labels"], [])
    print(f"{'teacher':<40} {accuracy(teacher, test, 'image'):6.1%} right")

    def student() -> nn.Module:
        return Network(6)

    layers = {"conv1": "conv1", "conv2": "conv2"}
    hot = {"alpha": 0.9, "temperature": 4.0}
    compare("labels alone", student, few, "image", list)
    compare("soft targets", student, few, "image", lambda: [top.Distillation(teacher, **hot)])
    hint = top.Hint(layers=layers, normalized=True)
    compare("soft targets, hints", student, few, "image", lambda: [
        top.Distillation(teacher, losses=["soft_targets", hint], **hot)
    ])  # fmt: skip
    looks = [top.AttentionTransfer(layers=layers), top.RKD(layers=("conv2",), pool="mean")]
    compare("soft targets, attention transfer, RKD", student, few, "image", lambda: [
        top.Distillation(teacher, losses=["soft_targets", *looks], **hot)
    ])  # fmt: skip

    # the teacher runs once; 4 of its 10 logits are kept, and the mass of the others
    with tempfile.TemporaryDirectory() as folder:
        batches = [{key: few[key][start : start + BATCH] for key in few} for start in range(0, LABELLED, BATCH)]
        cache = top.cache_teacher(teacher, batches, folder, top_k=4)
        compare("soft targets of a cache", student, few, "image", lambda: [top.Distillation(cache, **hot)])

    # a student that was pruned from the teacher: the plan tells which channels to compare, no projector is needed
    graph = top.capture(copy.deepcopy(teacher), kwargs={key: few[key][:4] for key in few})
    plan = top.PruneChannels(ratio=0.75)(graph).plan
    compare("pruned from the teacher, hints", lambda: plan.apply(copy.deepcopy(teacher)), few, "image", lambda: [
        top.Distillation(teacher, losses=["soft_targets", hint], kept=plan, **hot)
    ])  # fmt: skip

    # across modalities, without labels: the teacher looks at the image of a pair, the student reads its text
    words = {name: rows[name][:LABELLED] for name in ("text", "labels")}
    compare("reader, labels alone", Reader, words, "text", list)
    eyes = top.Teacher(teacher, inputs={"image": "image", "labels": "labels"})
    pairs = {"text": rows["text"], "image": rows["image"], "labels": torch.zeros_like(rows["labels"])}
    across = [top.Hint(layers={"body": "conv2"}, pool="mean"), top.RKD(layers={"body": "conv2"}, pool="mean")]
    compare("reader, taught by the images of pairs", Reader, pairs, "text", lambda: [
        top.Distillation(eyes, losses=["soft_targets", *across], alpha=1.0, temperature=4.0)
    ])  # fmt: skip


if __name__ == "__main__":
    main()
