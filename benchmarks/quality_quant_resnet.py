"""Arms of the quantization benchmark that are measured by accuracy: ResNet-20 on Fashion-MNIST, and what training buys.

Every arm starts from the trained float32 model of its seed and rounds every convolution and the classifier, the first
and the last too. What is trained gets one epoch, the same order of the data and the same schedule and rate (of our two
arms 0.01 was the better of two on validation images, with seed 0). Reported: accuracy on the 10,000 test images.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchopt_passes as top
from benchmarks import quality_data
from benchmarks import quality_quant_peers as peers
from benchmarks.quality_data import Budget, Split
from benchmarks.quality_models import Classifier, example

__all__ = ["ARMS", "MODELS", "row"]

CACHE = Path(os.environ.get("QUALITY_CACHE", Path(tempfile.gettempdir()) / "quality_channels"))
MODELS = {f"resnet20 seed {seed}": seed for seed in (0, 1, 2)}
CALIBRATION_BATCHES, ORDER = 32, 2_000  # ORDER is added to the seed for the order of what is trained
FINE_TUNING = Budget("sgd", rate=0.01, epochs=1, shift=2, bfloat16=False)
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """What every arm starts from.

    Args:
        base: the trained float32 model; arms work on copies.
        train: the training images.
        batches: what is calibrated with: training images.
        seed: of the model and of the order of the data.
    """

    base: Classifier
    train: Split
    batches: Sequence[Batch]
    seed: int

    @property
    def context(self) -> top.PassContext:
        """The data for passes."""
        return top.PassContext(calibration=self.batches, prove=False)

    def captured(self) -> Any:
        """Return a graph of a copy, in eval mode."""
        return top.capture(copy.deepcopy(self.base), kwargs=example(4), prove=False).eval()

    def fine_tune(self, model: nn.Module, **options: Any) -> None:
        """Train a model of any tool in place."""
        quality_data.train(model, self.train, FINE_TUNING, ORDER + self.seed, **options)


Make = Callable[[Start], nn.Module]


def ours_8_bits(start: Start) -> nn.Module:
    graph = start.captured()
    for step in (
        top.InsertFakeQuant(qat=False),
        top.Calibrate(method="mse"),
        top.RoundWeights(),
        top.CorrectBias(),
        top.ConvertQuantized(),
    ):
        step(graph, start.context)
    return graph


def ours_4_bits(start: Start) -> nn.Module:
    graph = start.captured()
    for step in (
        top.InsertFakeQuant(weight_bits=4, activation_bits=4),
        top.Calibrate(method="mse", weight_method="mse"),
        top.LearnSteps(method="lsq"),
    ):
        step(graph, start.context)
    start.fine_tune(graph, callbacks=[top.QuantizationSchedule()], undecayed=("fake_quant.",))
    top.ConvertQuantized()(graph.eval(), start.context)
    return graph


def ours_codebook(start: Start) -> nn.Module:
    graph = start.captured()
    top.ClusterWeights(bits=2, granularity="channel", min_numel=1)(graph, start.context)
    teacher = top.Distillation(copy.deepcopy(start.base), alpha=0.9, temperature=4.0)
    start.fine_tune(graph, callbacks=[teacher], undecayed=("original0",))
    return graph


def trained(make: Callable[..., nn.Module], **options: Any) -> Make:
    """Return a peer's arm, trained by the same loop."""

    def made(start: Start) -> nn.Module:
        def train(model: nn.Module, after_backward: Callable[[nn.Module], Any] | None) -> None:
            start.fine_tune(model, regularize=after_backward)

        return make(start.base, start.batches, train, steps=FINE_TUNING.steps, **options)

    return made


ARMS: Mapping[str, Make] = {
    "W8A8 PTQ: pt2e x86": lambda start: peers.pt2e_8_bits("x86", start.base, start.batches),
    "W8A8 PTQ: pt2e xnnpack": lambda start: peers.pt2e_8_bits("xnnpack", start.base, start.batches),
    "W8A8 PTQ: brevitas": lambda start: peers.brevitas_8_bits(start.base, start.batches),
    "W8A8 PTQ: ours": ours_8_bits,
    "W4A4 QAT: pt2e xnnpack": trained(peers.pt2e_qat, bits=4),
    "W4A4 QAT: brevitas": trained(peers.brevitas_qat, bits=4, activations=True),
    "W4A4 QAT: ours, LSQ": ours_4_bits,
    "2-bit weights: brevitas, uniform": trained(peers.brevitas_qat, bits=2, activations=False),
    "2-bit weights: ours, codebooks": ours_codebook,
}


def row(model: str, arm: str) -> dict[str, Any]:
    """Return the row of one arm and seed; `model` is one of `MODELS`."""
    seed, splits = MODELS[model], quality_data.load()
    torch.manual_seed(seed)
    base, _ = quality_data.base("resnet20", seed, splits["train"], CACHE)
    batches = list(quality_data.batches(splits["train"], CALIBRATION_BATCHES, ORDER + seed))
    started = time.process_time()
    made = ARMS[arm](Start(base, splits["train"], batches, seed))
    seconds = time.process_time() - started
    accuracy, exact = _accuracy(made, splits["test"]), _accuracy(base, splits["test"])
    return {
        "model": model,
        "arm": arm,
        "accuracy": accuracy,
        "float_accuracy": exact,
        "points_lost": round(100 * (exact - accuracy), 2),
        "cpu_seconds": round(seconds, 1),
    }


def _accuracy(model: nn.Module, split: Split) -> float:
    return quality_data.evaluate(model, split, FINE_TUNING)
