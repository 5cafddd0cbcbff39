"""What each training callback costs: its step and its peak memory against those of the bare Trainer.

    HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.training_overhead [CASE ...] [--rounds N]

A BERT of 4 layers and 256 channels (5.4 million parameters) learns from 8 sentences of 64 tokens a step, on one CPU
thread, in the Hugging Face Trainer; what needs convolutions, batch norms or fake-quantizers has a student of its own.
All Trainers of a round run in one process, each in a thread of its own, and take turns step by step, so that whatever
else the machine does touches all alike; a step is measured in CPU time of its thread, from the first event of the
step to the last. The first one is left out. For each callback:

- ``step``: median over rounds of (median step / median step of the bare Trainer);
- ``run``: the same of the mean step, with an update of masks in each 17, as a run of 1700 steps has by default;
- ``memory``: peak of the resident memory of a process of its own, against that of the bare Trainer, both without what
  the process held before it made its Trainer.

Callbacks that run a teacher are measured against the bare Trainer whose student has a hook that runs the teacher, and
nothing else. Written to benchmarks/records/training_overhead.json, and as a table to docs/training.md between marks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import torchopt_passes as top
from benchmarks.environment import environment
from benchmarks.quality_models import ResNet20

PACKAGES = ("torch", "transformers", "torchopt_passes")
ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "training_overhead.json"
PAGE = ROOT / "docs" / "training.md"
MARKS = ("<!-- overhead -->", "<!-- end of overhead -->")
STEPS, WARM, MEMORY_STEPS = 35, 1, 3
BATCH, TOKENS = 8, 64
Data = list[dict[str, torch.Tensor]]


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


def resnet() -> nn.Module:
    """Return the CIFAR ResNet of 20 layers."""
    torch.manual_seed(0)
    return ResNet20()


def rounded() -> nn.Module:
    """Return its graph with fake-quantizers."""
    graph = top.capture(resnet(), kwargs=collate(pictures()), prove=False)
    top.InsertFakeQuant()(graph)
    return graph


def narrow() -> nn.Module:
    """Return its graph on grids of 4 bits."""
    graph = top.capture(resnet(), kwargs=collate(pictures()), prove=False)
    top.InsertFakeQuant(weight_bits=4, activation_bits=4)(graph)
    return graph


def halved() -> nn.Module:
    """Return a BERT that comes with zeros."""
    model = bert()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.view(-1)[::2] = 0
    return model


def with_teacher() -> nn.Module:
    """Return a BERT with whose forward a teacher runs, for nothing."""
    model, other = bert(), teacher().eval()

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            other(**{name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    model.register_forward_hook(hook, with_kwargs=True)
    return model


def teacher() -> nn.Module:
    return bert(layers=6, seed=1)


def sentences() -> Data:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 8000, (TOKENS,), generator=generator), "labels": torch.tensor(i % 4)}
        for i in range(64)
    ]


def pictures() -> Data:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixels": torch.randn(1, 28, 28, generator=generator), "labels": torch.tensor(i % 10)} for i in range(BATCH)
    ]


def collate(rows: Data) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Variant:
    """A Trainer to measure.

    Args:
        make: the callbacks, new ones for each run.
        against: the variant it is compared with.
        student: makes what is trained.
        data: what it is trained on.
    """

    make: Callable[[], list[Any]] = list
    against: str = "bare"
    student: Callable[[], nn.Module] = bert
    data: Callable[[], Data] = sentences


MASKS = {"start": 1, "end": 1.0, "every": 17}
HEAD = ("classifier",)
UNITS = {"example_inputs": collate(sentences()[:BATCH])}
PIXELS = {"example_inputs": collate(pictures())}
TEACHER, ZEROS, RESNET = "bare, with a teacher's forward", "bare, with zeros", "bare ResNet"
GRAPH, NARROW = "bare graph, QAT", "bare graph, QAT in 4 bits"
CONVS = {"against": RESNET, "student": resnet, "data": pictures}
QAT = {"against": GRAPH, "student": rounded, "data": pictures}
QAT_4 = {"against": NARROW, "student": narrow, "data": pictures}
DISTILLED = {"against": TEACHER}
LAYERS = {"bert.encoder.layer.{i}": "bert.encoder.layer.{i}"}
VARIANTS: dict[str, Variant] = {
    "bare": Variant(),
    TEACHER: Variant(student=with_teacher),
    ZEROS: Variant(student=halved),
    RESNET: Variant(**CONVS),
    GRAPH: Variant(**QAT),
    NARROW: Variant(**QAT_4),
    "GradualPruning": Variant(lambda: [top.GradualPruning(sparsity=0.8, **MASKS)]),
    "GradualPruning, global": Variant(lambda: [top.GradualPruning(sparsity=0.8, scope="global", **MASKS)]),
    "GradualPruning, 2:4": Variant(lambda: [top.GradualPruning(pattern="2:4", skip=HEAD, **MASKS)]),
    "GradualPruning, movement": Variant(lambda: [top.GradualPruning(sparsity=0.8, criterion="movement", **MASKS)]),
    "SoftMovementPruning": Variant(lambda: [top.SoftMovementPruning(threshold=0.1, **MASKS)]),
    "SensitivityPruning": Variant(lambda: [top.SensitivityPruning(sensitivity=0.5, **MASKS)]),
    "Splicing": Variant(lambda: [top.Splicing(**MASKS)]),
    "RigL": Variant(lambda: [top.RigL(sparsity=0.8, every=17)]),
    "SET": Variant(lambda: [top.SET(sparsity=0.8, every=17)]),
    "LotteryTicket": Variant(lambda: [top.LotteryTicket(sparsity=0.8, rounds=1, rewind=1)]),
    "KeepZeros": Variant(lambda: [top.KeepZeros(skip=HEAD)], against=ZEROS, student=halved),
    "GradualChannelPruning": Variant(lambda: [top.GradualChannelPruning(ratio=0.5, **MASKS, **UNITS)]),
    "L1Penalty": Variant(lambda: [top.L1Penalty(strength=1e-4)]),
    "L2Penalty": Variant(lambda: [top.L2Penalty(strength=1e-4)]),
    "GroupLasso": Variant(lambda: [top.GroupLasso(strength=1e-4, **UNITS)]),
    "GroupVariance": Variant(lambda: [top.GroupVariance(strength=1e-4, **UNITS)]),
    "Orthogonality": Variant(lambda: [top.Orthogonality(strength=1e-4)]),
    "BatchNormSlimming": Variant(lambda: [top.BatchNormSlimming(strength=1e-4, **PIXELS)], **CONVS),
    "L0Pruning": Variant(lambda: [top.L0Pruning(sparsity=0.8, settle=None)]),
    "L0ChannelPruning": Variant(lambda: [top.L0ChannelPruning(sparsity=0.5, settle=None, **UNITS)]),
    "InformationBottleneck": Variant(lambda: [top.InformationBottleneck(settle=None, **UNITS)]),
    "DropFilter": Variant(lambda: [top.DropFilter(rate=0.1)], **CONVS),
    "AddEarlyExits": Variant(lambda: [top.AddEarlyExits(**PIXELS)], **CONVS),
    "CompressionAwareLR": Variant(lambda: [top.CompressionAwareLR()]),
    "QuantizationSchedule": Variant(lambda: [top.QuantizationSchedule(observer_off=1.0, freeze_bn=None)], **QAT),
    "GradualBits": Variant(lambda: [top.GradualBits()], **QAT_4),
    "QuantizationNoise": Variant(lambda: [top.QuantizationNoise(share=0.5)], **QAT),
    "Distillation": Variant(lambda: [top.Distillation(teacher())], **DISTILLED),
    "Distillation, hints too": Variant(
        lambda: [top.Distillation(teacher(), losses=[top.SoftTargets(), top.Hint(weight=0.1)], layers=LAYERS)],
        **DISTILLED,
    ),
}


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
    """Takes the CPU time of each step; `first` is where it begins, in front of all other callbacks."""

    def __init__(self, turns: Turns | None, index: int) -> None:
        self.turns, self.index, self.times, self.begun = turns, index, list[float](), 0.0
        self.first = _First(self)

    def begin(self) -> None:
        if self.turns is not None:
            self.turns.wait(self.index)
        self.begun = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.thread_time() - self.begun)
        if self.turns is not None:
            self.turns.give(self.index)


class _First(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.begin()


def make_trainer(variant: Variant, folder: Path, clock: Clock, steps: int = STEPS) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [clock.first, *variant.make(), clock]
    return Trainer(variant.student(), arguments, train_dataset=variant.data(), callbacks=callbacks)


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
            make_trainer(VARIANTS[name], folder, Clock(None, 0), MEMORY_STEPS).train()
            os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    os.wait()
    answer = os.read(read, 64)
    if not answer:
        raise SystemExit(f"{name} failed")
    return int(answer) / 1024


def main(names: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    chosen = names or list(VARIANTS)
    names = [n for n in VARIANTS if n in chosen or n in {VARIANTS[other].against for other in chosen}]
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "run": [], "seconds": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        memory = {name: peak_memory(name, Path(folder)) for name in names}
        for index in range(rounds):
            order = random.Random(index).sample(names, len(names))
            times = one_round(order, Path(folder))
            for name in names:
                other = times[VARIANTS[name].against]
                found[name]["seconds"].append(statistics.median(times[name]))
                found[name]["step"].append(statistics.median(times[name]) / statistics.median(other))
                found[name]["run"].append(statistics.fmean(times[name]) / statistics.fmean(other))
            print(f"round {index + 1}", {name: round(row["run"][-1], 3) for name, row in found.items()}, flush=True)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": {}}
    for name, row in found.items():
        record["rows"][name] = {
            "against": VARIANTS[name].against,
            "step": round(statistics.median(row["step"]), 4),
            "run": round(statistics.median(row["run"]), 4),
            "seconds": round(statistics.median(row["seconds"]), 4),
            "memory_mb": round(memory[name], 1),
            "memory": round(memory[name] / memory[VARIANTS[name].against], 3),
            "rounds": rounds,
            "steps": STEPS - WARM,
        }
    record["environment"] = environment(PACKAGES)
    record["rows"] = {name: record["rows"][name] for name in VARIANTS if name in record["rows"]}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    write_page(record["rows"])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="what to measure again; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.cases, arguments.rounds)
