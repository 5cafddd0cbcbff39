"""What each training callback costs: its step and its peak memory against those of the bare Trainer.

    HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.training_overhead [CASE ...]

A BERT of 4 layers and 256 channels (13 million parameters) learns from 8 sentences of 64 tokens a step, on one CPU
thread, in the Hugging Face Trainer. All Trainers of a round run in one process, each in a thread of its own, and take
turns step by step, so that whatever else the machine does touches all alike; a step is measured in CPU time of its
thread. The first steps are left out. For each callback:

- ``step``: median over rounds of (median step / median step of the bare Trainer);
- ``run``: the same of the mean step, updates of masks included, every 10 steps (by default a run of 1700 steps has them
  as often);
- ``memory``: peak of the resident memory of a process of its own, against that of the bare Trainer, both without what
  the process held before it made its Trainer.

Callbacks that run a teacher are measured against the bare Trainer whose student has a hook that runs the teacher, and
nothing else. Written to benchmarks/records/training_overhead.json, and as a table to docs/training.md between marks.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import torchopt_passes as top

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "training_overhead.json"
PAGE = ROOT / "docs" / "training.md"
MARKS = ("<!-- overhead -->", "<!-- end of overhead -->")
ROUNDS, STEPS, WARM = 2, 14, 3
BATCH, TOKENS = 8, 64


def bert(layers: int = 4, width: int = 256, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=4,
    )
    return BertForSequenceClassification(config)


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 8000, (TOKENS,), generator=generator), "labels": torch.tensor(i % 4)}
        for i in range(64)
    ]


def ask(teacher: nn.Module, student: nn.Module) -> None:
    """Run a teacher with every forward of the student, for nothing."""
    teacher.eval()

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            teacher(**{name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    student.register_forward_hook(hook, with_kwargs=True)


@dataclass(frozen=True)
class Variant:
    """A Trainer to measure.

    Args:
        make: the callbacks, new ones for each run.
        against: the variant it is compared with.
        prepare: what is done to the student before.
    """

    make: Callable[[], list[Any]] = list
    against: str = "bare"
    prepare: Callable[[nn.Module], None] = lambda student: None


def teacher() -> nn.Module:
    return bert(layers=6, seed=1)


GRADUAL = {"start": 1, "end": STEPS, "every": 10}
VARIANTS: dict[str, Variant] = {
    "bare": Variant(),
    "bare, with a teacher's forward": Variant(prepare=lambda student: ask(teacher(), student)),
    "GradualPruning": Variant(lambda: [top.GradualPruning(sparsity=0.8, **GRADUAL)]),
    "GradualPruning, global": Variant(lambda: [top.GradualPruning(sparsity=0.8, scope="global", **GRADUAL)]),
    "GradualPruning, 2:4": Variant(lambda: [top.GradualPruning(pattern="2:4", skip=("classifier",), **GRADUAL)]),
    "KeepZeros": Variant(lambda: [top.KeepZeros(skip=("classifier",))], prepare=lambda student: halve(student)),
    "Distillation": Variant(lambda: [top.Distillation(teacher())], against="bare, with a teacher's forward"),
}


@torch.no_grad()
def halve(student: nn.Module) -> None:
    for parameter in student.parameters():
        if parameter.ndim > 1:
            parameter.view(-1)[::2] = 0


class Turns:
    """Lets several threads run one step each, in turn; those that have ended are passed over."""

    def __init__(self, count: int) -> None:
        self.gates = [threading.Semaphore(0) for _ in range(count)]
        self.ended = [False] * count

    def wait(self, index: int) -> None:
        self.gates[index].acquire()

    def give(self, index: int) -> None:
        for offset in range(1, len(self.gates) + 1):
            other = (index + offset) % len(self.gates)
            if not self.ended[other]:
                self.gates[other].release()
                return

    def end(self, index: int) -> None:
        self.ended[index] = True
        self.give(index)


class Clock(TrainerCallback):
    """Takes the CPU time of each step."""

    def __init__(self, turns: Turns | None, index: int) -> None:
        self.turns, self.index, self.times, self.begun = turns, index, list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.turns is not None:
            self.turns.wait(self.index)
        self.begun = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.thread_time() - self.begun)
        if self.turns is not None:
            self.turns.give(self.index)


def make_trainer(variant: Variant, folder: Path, clock: Clock) -> Trainer:
    student = bert()
    variant.prepare(student)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(student, arguments, train_dataset=data(), callbacks=[*variant.make(), clock])


def one_round(names: list[str], folder: Path) -> dict[str, list[float]]:
    """Train every variant, step by step in turn; returns the CPU times of their steps."""
    turns = Turns(len(names))
    clocks = [Clock(turns, index) for index in range(len(names))]
    trainers = [make_trainer(VARIANTS[n], folder, c) for n, c in zip(names, clocks, strict=True)]

    def run(index: int) -> None:
        try:
            trainers[index].train()
        finally:
            turns.end(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    turns.give(len(names) - 1)
    for thread in threads:
        thread.join()
    return {name: clock.times[WARM:] for name, clock in zip(names, clocks, strict=True)}


def peak_memory(name: str, folder: Path) -> float:
    """Train a variant in a forked process; returns how many MB its memory grew at most."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            make_trainer(VARIANTS[name], folder, Clock(None, 0)).train()
            os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.wait()
    return int(os.read(read, 64)) / 1024


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    names = [n for n in VARIANTS if not names or n in names or not n.partition("bare")[0]]
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "run": [], "seconds": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        memory = {name: peak_memory(name, Path(folder)) for name in names}
        for index in range(ROUNDS):
            order = random.Random(index).sample(names, len(names))
            times = one_round(order, Path(folder))
            for name in names:
                other = times[VARIANTS[name].against]
                found[name]["seconds"].append(statistics.median(times[name]))
                found[name]["step"].append(statistics.median(times[name]) / statistics.median(other))
                found[name]["run"].append(statistics.fmean(times[name]) / statistics.fmean(other))
            print(f"round {index + 1}", {name: round(row["run"][-1], 3) for name, row in found.items()}, flush=True)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, row in found.items():
        record[name] = {
            "against": VARIANTS[name].against,
            "step": round(statistics.median(row["step"]), 4),
            "run": round(statistics.median(row["run"]), 4),
            "seconds": round(statistics.median(row["seconds"]), 4),
            "memory_mb": round(memory[name], 1),
            "memory": round(memory[name] / memory[VARIANTS[name].against], 3),
            "rounds": ROUNDS,
            "steps": STEPS - WARM,
        }
    record = {name: record[name] for name in VARIANTS if name in record}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    write_page(record)


def write_page(record: dict[str, dict[str, Any]]) -> None:
    lines = ["| callback | step | run, with updates | peak memory | against |", "|---|---|---|---|---|"]
    for name, row in record.items():
        if not name.startswith("bare"):
            ratios = " | ".join(f"{100 * (row[key] - 1):+.1f} %" for key in ("step", "run", "memory"))
            lines.append(f"| {name} | {ratios} | {row['against']} |")
    text = PAGE.read_text()
    if MARKS[0] in text:
        head, rest = text.split(MARKS[0])
        PAGE.write_text("\n".join([head + MARKS[0], *lines, MARKS[1] + rest.split(MARKS[1])[1]]))


if __name__ == "__main__":
    main(sys.argv[1:])
