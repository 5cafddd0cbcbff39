"""The main job, end to end, on real input: handwritten digits, a Transformers ResNet, the Hugging Face Trainer.

Train a teacher; capture a copy of it; prune the copy step by step while the teacher distils into it; fine-tune it with
fake-quantization; lower it to int8; export it to ONNX Runtime and to compiled PyTorch; verify each against the model
it came from; measure.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from torchopt_passes.callbacks import Distillation, GradualPruning, KeepZeros, QuantizationSchedule
from torchopt_passes.deploy import benchmark, export, saturates
from torchopt_passes.errors import ConfigError, MissingExtraError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.cost import measure
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.show.plots import scatter
from torchopt_passes.show.tables import Column, Table

__all__ = ["DemoResult", "Stage", "digits", "resnet", "run_demo", "train"]

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
SPARSITY = 0.6
MARKER = ".torchopt_demo"
"""Marks a folder as ours: only such a folder is made anew."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the demo's table; every figure is measured in the run.

    Args:
        name: what the model is at this stage.
        accuracy: share of the test pictures that are classified right, 0..1.
        parameters: number of weights.
        zeros: share of exact zeros among them, 0..1.
        size: bytes on disk.
        latency: median seconds for one picture.
        speedup: latency of the first stage over this one's.
    """

    name: str
    accuracy: float
    parameters: int
    zeros: float
    size: int
    latency: float
    speedup: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made.

    Args:
        stages: one for each step, in order.
        folder: where plan, weights, artefacts, table and plot lie.
    """

    stages: tuple[Stage, ...]
    folder: Path

    def table(self) -> Table:
        """Return the stages as a table, the artefacts' sizes and latencies against those of the first stage."""
        columns = (
            Column("stage"),
            Column("test accuracy", "", ".2%"),
            Column("parameters", "", ",d"),
            Column("zeros", "", ".1%"),
            Column("size", "kB", ",.0f"),
            Column("latency, batch 1", "ms", ".2f"),
            Column("speed-up", "x", ".2f"),
        )
        rows = [
            (s.name, s.accuracy, s.parameters, s.zeros, s.size / 1e3, s.latency * 1e3, s.speedup) for s in self.stages
        ]
        return Table(columns, rows, title="scikit-learn digits, 360 test pictures")


def digits(size: int = 32) -> tuple[Batch, Batch]:
    """Return scikit-learn's 1,797 handwritten digits as a training and a test batch (80 % and 20 %, stratified).

    Args:
        size: pictures are resized (bilinear) from 8 to this many pixels.

    Returns:
        Two dicts: ``pixel_values`` float32 ``(N, 1, size, size)``, zero mean and unit variance over the training
        pictures; ``labels`` int64 ``(N,)``.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("sklearn", "demo") from error
    data: Any = load_digits()
    pictures = torch.from_numpy(data.images).float().unsqueeze(1)
    pictures = nn.functional.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    train_rows, test_rows = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    pictures = (pictures - pictures[train_rows].mean()) / pictures[train_rows].std()
    train_batch, test_batch = ({"pixel_values": pictures[i], "labels": labels[i]} for i in (train_rows, test_rows))
    return train_batch, test_batch


def resnet(seed: int = 0) -> nn.Module:
    """Return a small, untrained ``ResNetForImageClassification`` for one-channel pictures and ten classes."""
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError as error:
        raise MissingExtraError("transformers", "demo") from error
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label={i: str(i) for i in range(10)},
    )
    return ResNetForImageClassification(config)


def train(
    model: nn.Module, data: Batch, *, epochs: float, lr: float, seed: int = 0, callbacks: tuple[Any, ...] = ()
) -> None:
    """Train with the Hugging Face ``Trainer``; our callbacks are passed to it, and nothing is subclassed.

    Args:
        model: a Transformers model, or a captured one.
        data: ``pixel_values`` and ``labels``.
        epochs: passes over the data.
        lr: peak learning rate (AdamW, warm-up of a tenth, cosine decay).
        seed: of the order of the data.
        callbacks: for the Trainer.
    """
    from transformers import Trainer, TrainingArguments

    rows = [{"pixel_values": x, "labels": y} for x, y in zip(data["pixel_values"], data["labels"], strict=True)]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            seed=seed,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train()  # pyright: ignore
    model.eval()


def run_demo(out: str | Path = "demo_output", *, epochs: float = 6.0, seed: int = 0, runs: int = 200) -> DemoResult:
    """Run the main job and leave its results in a folder.

    Args:
        out: the folder; one that an earlier demo made is made anew.
        epochs: epochs of teacher and pruning; QAT takes half of it.
        seed: of everything random.
        runs: timed calls of each stage.

    Returns:
        The stages and the folder, which holds ``plan.json`` (with its tensors beside it), the weights of each stage
        (``.safetensors``), ``fp32`` and ``int8`` as ``.onnx`` and ``.pt2``, ``table.md`` and ``accuracy_vs_size.png``.

    Raises:
        ConfigError: the folder exists and is not a demo's.
        MissingExtraError: a package of the extra ``demo`` is not installed.
        VerificationError: an artefact is not what the model computes.
    """
    folder = _fresh(Path(out))
    data, test = digits()
    example = {name: value[:8] for name, value in data.items()}
    board = _Board(test, folder)

    _say("1/5 teacher: training a Transformers ResNet with the Hugging Face Trainer")
    teacher = resnet(seed)
    train(teacher, data, epochs=epochs, lr=2e-3, seed=seed)
    board.module("teacher, PyTorch eager", teacher, "teacher")

    _say("2/5 pruning: a captured copy goes to %.0f %% zeros while the teacher distils into it", 100 * SPARSITY)
    graph = capture(copy.deepcopy(teacher), kwargs=example)
    pruning, distillation = GradualPruning(sparsity=SPARSITY), Distillation(teacher)
    train(graph, data, epochs=epochs, lr=1e-3, seed=seed, callbacks=(pruning, distillation))
    board.module(f"pruned {SPARSITY:.0%}, distilled", graph, "pruned")
    plan = pruning.plan

    _say("3/5 quantization-aware training: fake-quantizers go in, ranges are calibrated, weights adapt")
    context = PassContext(calibration=_batches(data, size=64, count=8))
    plan += InsertFakeQuant(target="onnx", reduce_range=saturates("onnx"))(graph, context).plan
    plan += Calibrate()(graph, context).plan
    train(
        graph,
        data,
        epochs=epochs / 2,
        lr=3e-4,
        seed=seed,
        callbacks=(KeepZeros(), QuantizationSchedule(), Distillation(teacher)),
    )
    board.module("fine-tuned with fake-quant", graph, "qat")

    _say("4/5 lowering to int8, and export: each file is verified against its model before it is put in place")
    plan += ConvertQuantized()(graph).plan
    plan.save(folder)
    save_model(graph, str(folder / "int8.safetensors"))
    for name, module in (("fp32", teacher), ("int8", graph)):
        for suffix, runtime in ((".onnx", "ONNX Runtime"), (".pt2", "compiled PyTorch")):
            board.artifact(f"{name}, {runtime}", module, folder / f"{name}{suffix}", example, test)

    _say("5/5 measuring latency, one picture at a time, stages in turn")
    result = DemoResult(stages=board.stages(runs), folder=folder)
    (folder / "table.md").write_text(result.table().markdown() + "\n")
    points = [(s.name, s.size / 1e6, 100 * s.accuracy) for s in result.stages]
    scatter(points, folder / "accuracy_vs_size.png", title="scikit-learn digits: accuracy against size")
    return result


class _Board:
    """Collects the stages: how each classifies, and what it weighs."""

    def __init__(self, test: Batch, folder: Path) -> None:
        self._test, self._folder = test, folder
        self._rows: list[dict[str, Any]] = []
        self._run: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def module(self, name: str, module: nn.Module, file: str) -> None:
        """Add a PyTorch module, its weights saved as safetensors."""
        path = self._folder / f"{file}.safetensors"
        save_model(module, str(path))
        self._add(name, copy.deepcopy(module).eval(), path.stat().st_size, measure(module))

    def artifact(self, name: str, module: nn.Module, path: Path, example: Batch, test: Batch) -> None:
        """Export, verify, and add the artefact; its weights are those of the module."""
        artifact = export(module, path, example_inputs=example, verify_inputs=[test])
        self._add(name, artifact, artifact.size, measure(module))

    def _add(self, name: str, model: Callable[..., Any], size: int, cost: Any) -> None:
        labels = self._test["labels"]

        def run(pictures: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                extra = {"labels": labels[: len(pictures)]} if _wants_labels(model) else {}
                output = model(pixel_values=pictures, **extra)
            return output if isinstance(output, torch.Tensor) else output["logits"]

        right = (run(self._test["pixel_values"]).argmax(-1) == labels).float().mean()
        self._rows.append(
            {
                "name": name,
                "accuracy": float(right),
                "parameters": cost.parameters,
                "zeros": cost.sparsity,
                "size": size,
            }
        )
        self._run[name] = run

    def stages(self, runs: int) -> tuple[Stage, ...]:
        """Time all stages side by side and return the rows."""
        timings = benchmark(self._run, self._test["pixel_values"][:1], runs=runs, warmup=10)
        return tuple(
            Stage(**row, latency=timings[row["name"]].median, speedup=timings[row["name"]].speedup)
            for row in self._rows
        )


def _wants_labels(model: Any) -> bool:
    return "labels" in getattr(model, "input_names", ())


def _batches(data: Batch, size: int, count: int) -> list[Batch]:
    return [{name: value[i * size : (i + 1) * size] for name, value in data.items()} for i in range(count)]


def _fresh(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"{folder} exists and was not made by the demo: choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def _say(message: str, *values: object) -> None:
    logger.info(message, *values)
