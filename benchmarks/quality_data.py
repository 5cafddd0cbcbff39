"""Data, training and evaluation of the quality benchmarks on images: the same for every arm.

Fashion-MNIST (Xiao et al. 2017), as the Debian package dataset-fashion-mnist installs it: the first `TRAIN` images of
the training set to train on, its last `VALIDATION` to choose options with, the whole test set for what is reported.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad

import torchopt_passes as top
from benchmarks.quality_models import MODELS, Classifier
from torchopt_passes.callbacks.lifecycle import Lifecycle

DATA = Path("/usr/share/datasets/fashion-mnist")
TRAIN, VALIDATION, BATCH = 20_000, 5_000, 64
MEAN, DEVIATION = 0.2860, 0.3530


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 28, 28), normalized, and their labels (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Budget:
    """How one model is trained: the same for each arm.

    Args:
        epochs: over the training images.
        rate: peak of the learning rate; a warm-up over a tenth of the steps, then a cosine to zero.
        cycles: of that schedule, one after the other.
        shift: images are moved by up to this many pixels (a ViT needs more epochs than these to gain from it).
        bfloat16: autocast in training and evaluation (parameters stay float32), on a CPU that computes in bfloat16;
            others need ten times as long for it, and get float32.
    """

    optimizer: str
    rate: float
    epochs: float
    shift: int
    bfloat16: bool
    cycles: int = 1

    @property
    def steps(self) -> int:
        return round(self.epochs * (TRAIN // BATCH))

    def autocast(self) -> torch.autocast:
        """Return the context that training and evaluation compute in."""
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 and native)


TRAINING = {
    "resnet20": Budget("sgd", rate=0.1, epochs=5, shift=2, bfloat16=True, cycles=2),
    "vit": Budget("adamw", rate=3e-3, epochs=4, shift=0, bfloat16=False),
}
FINE_TUNING = {
    "resnet20": Budget("sgd", rate=0.05, epochs=1, shift=2, bfloat16=True),
    "vit": Budget("adamw", rate=2e-3, epochs=1, shift=0, bfloat16=False),
}


def read(folder: Path, name: str) -> Split:
    def values(kind: str, offset: int) -> torch.Tensor:
        data = gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes())
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=offset).copy())

    pixels = values("images-idx3", 16).view(-1, 1, 28, 28).float() / 255
    return Split((pixels - MEAN) / DEVIATION, values("labels-idx1", 8).long())


def load(folder: Path = DATA) -> dict[str, Split]:
    """Return the splits ``train``, ``validation`` and ``test``."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: apt-get install dataset-fashion-mnist, or give its folder with --data")
    images, test = read(folder, "train"), read(folder, "t10k")
    train = Split(images.pixels[:TRAIN], images.labels[:TRAIN])
    validation = Split(images.pixels[-VALIDATION:], images.labels[-VALIDATION:])
    return {"train": train, "validation": validation, "test": test}


def batches(split: Split, steps: int, seed: int, shift: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Yield shuffled batches, mirrored image by image and moved together; the seed decides all."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(split.labels), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        pixels = split.pixels[chosen]
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
        down, right = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        pixels = pad(pixels, [shift] * 4, value=-MEAN / DEVIATION)[:, :, down : down + 28, right : right + 28]
        yield {"pixels": pixels.contiguous(memory_format=torch.channels_last), "labels": split.labels[chosen]}


def evaluate(model: nn.Module, split: Split, budget: Budget, limit: int | None = None) -> float:
    """Return the accuracy, 0..1, on the first `limit` images, in the precision of the budget."""
    model.eval()
    hits, total = 0, limit or len(split.labels)
    with torch.no_grad(), budget.autocast():
        for start in range(0, total, 250):
            labels = split.labels[start : start + 250]
            pixels = split.pixels[start : start + 250].contiguous(memory_format=torch.channels_last)
            hits += int((model(pixels=pixels, labels=labels)["logits"].argmax(-1) == labels).sum())
    return hits / total


def train(
    model: nn.Module,
    split: Split,
    budget: Budget,
    seed: int,
    *,
    callbacks: Sequence[Lifecycle] = (),
    regularize: Callable[[nn.Module], Any] | None = None,
    undecayed: tuple[str, ...] = (),
) -> float:
    """Train in place and return the seconds of processor time that it took.

    `callbacks` are attached for the whole run; `regularize` is called with the model after each backward; parameters
    whose name has one of `undecayed` in it get no weight decay (the steps of quantizers).
    """
    started = time.process_time()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model.train()
    kept = [p for name, p in model.named_parameters() if any(part in name for part in undecayed)]
    decayed = [p for name, p in model.named_parameters() if not any(part in name for part in undecayed)]
    groups: list[dict[str, Any]] = [{"params": decayed}, *([{"params": kept, "weight_decay": 0.0}] if kept else [])]
    if budget.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, budget.rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    else:
        optimizer = torch.optim.AdamW(groups, budget.rate, weight_decay=0.05)
    session = top.attach(model, optimizer, callbacks, total_steps=budget.steps) if callbacks else nullcontext()
    with session:
        rates = [group["lr"] for group in optimizer.param_groups]  # what a callback brings has its own
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, budget.steps, pct_start=0.1, cycle_momentum=False, final_div_factor=1e3
        )
        for batch in batches(split, budget.steps, seed, budget.shift):
            with budget.autocast():
                loss = model(**batch)["loss"]
            loss.backward()
            if regularize is not None:
                regularize(model)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return time.process_time() - started


def base(name: str, seed: int, split: Split, cache: Path) -> tuple[Classifier, float | None]:
    """Return the trained model and the seconds that it took (None: it was in the cache, as safetensors)."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    path = cache / f"{name}-{seed}.safetensors"
    seconds = None
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        seconds = sum(train(model, split, TRAINING[name], seed + 100 * cycle) for cycle in range(TRAINING[name].cycles))
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({fqn: tensor.contiguous() for fqn, tensor in model.state_dict().items()}, partial)
        partial.replace(path)
    return model.eval(), seconds
