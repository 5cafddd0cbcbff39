"""Arms of the quantization benchmark that are measured by accuracy: ResNet-20 on Fashion-MNIST, and what training buys.

Every arm starts from the trained float32 model of its seed and rounds every convolution and the classifier, the first
and the last too. What is trained gets one epoch, the same order of the data and the same schedule; each arm has the
better of two learning rates on validation images, with seed 0. Reported: accuracy on the 10,000 test images.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchopt_passes as top
from benchmarks import quality_quant_peers as peers
from benchmarks import quality_training
from benchmarks.quality_models import Classifier, example
from benchmarks.quality_training import Budget, Split

__all__ = ["ARMS", "MODELS", "row"]

CACHE = Path(os.environ.get("QUALITY_CACHE", Path(tempfile.gettempdir()) / "quality_channels"))
MODELS = {f"resnet20 seed {seed}": seed for seed in (0, 1, 2)}
CALIBRATION_BATCHES, ORDER = 32, 2_000  # ORDER is added to the seed for the order of what is trained
RATES = (0.03, 0.01)
FINE_TUNING = Budget("sgd", rate=0.0, epochs=1, shift=2, bfloat16=False)
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

    def fine_tune(self, model: nn.Module, rate: float, **options: Any) -> None:
        """Train a model of any tool in place."""
        quality_training.train(model, self.train, replace(FINE_TUNING, rate=rate), ORDER + self.seed, **options)


Make = Callable[[Start, float], nn.Module]


def ours_8_bits(start: Start, rate: float) -> nn.Module:
    del rate
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


def ours_4_bits(start: Start, rate: float) -> nn.Module:
    graph = start.captured()
    for step in (
        top.InsertFakeQuant(weight_bits=4, activation_bits=4),
        top.Calibrate(method="mse", weight_method="mse"),
        top.LearnSteps(method="lsq"),
    ):
        step(graph, start.context)
    start.fine_tune(graph, rate, callbacks=[top.QuantizationSchedule()], undecayed=("fake_quant.",))
    top.ConvertQuantized()(graph.eval(), start.context)
    return graph


def ours_codebook(start: Start, rate: float) -> nn.Module:
    graph = start.captured()
    top.ClusterWeights(bits=2, granularity="channel", min_numel=1)(graph, start.context)
    teacher = top.Distillation(copy.deepcopy(start.base), alpha=0.9, temperature=4.0)
    start.fine_tune(graph, rate, callbacks=[teacher], undecayed=("original0",))
    return graph


def trained(make: Callable[..., nn.Module], **options: Any) -> Make:
    """Return a peer's arm, trained by the same loop."""

    def made(start: Start, rate: float) -> nn.Module:
        def train(model: nn.Module, after_backward: Callable[[nn.Module], Any] | None) -> None:
            start.fine_tune(model, rate, regularize=after_backward)

        return make(start.base, start.batches, train, steps=FINE_TUNING.steps, **options)

    return made


@dataclass(frozen=True)
class Arm:
    """One tool in one setting; `trains` says whether it needs a learning rate."""

    setting: str
    make: Make
    trains: bool = True


ARMS: Mapping[str, Arm] = {
    "W8A8 PTQ: pt2e x86": Arm("W8A8", lambda s, _: peers.pt2e_8_bits("x86", s.base, s.batches), trains=False),
    "W8A8 PTQ: pt2e xnnpack": Arm("W8A8", lambda s, _: peers.pt2e_8_bits("xnnpack", s.base, s.batches), trains=False),
    "W8A8 PTQ: brevitas": Arm("W8A8", lambda s, _: peers.brevitas_8_bits(s.base, s.batches), trains=False),
    "W8A8 PTQ: ours": Arm("W8A8", ours_8_bits, trains=False),
    "W4A4 QAT: pt2e xnnpack": Arm("W4A4", trained(peers.pt2e_qat, bits=4)),
    "W4A4 QAT: brevitas": Arm("W4A4", trained(peers.brevitas_qat, bits=4, activations=True)),
    "W4A4 QAT: ours, LSQ": Arm("W4A4", ours_4_bits),
    "2-bit weights: brevitas, uniform": Arm("W2", trained(peers.brevitas_qat, bits=2, activations=False)),
    "2-bit weights: ours, codebooks": Arm("W2", ours_codebook),
}


def row(model: str, name: str, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of one arm and seed.

    Args:
        model: one of `MODELS`.
        name: one of `ARMS`.
        known: rows that were made already: that of seed 0 says which rate is used.
    """
    seed, arm = MODELS[model], ARMS[name]
    splits = quality_training.load()
    torch.manual_seed(seed)
    base, _ = quality_training.base("resnet20", seed, splits["train"], CACHE)
    batches = list(quality_training.batches(splits["train"], CALIBRATION_BATCHES, ORDER + seed))
    start = Start(base, splits["train"], batches, seed)
    found: dict[str, Any] = {"model": model, "arm": name}
    rates: tuple[float, ...] = RATES if arm.trains else (0.0,)
    if seed:
        first = [one for one in known if (one["model"], one["arm"]) == ("resnet20 seed 0", name)]
        rates = (first[0]["rate"],) if first else rates
    started, made = time.process_time(), {rate: arm.make(start, rate) for rate in rates}
    seconds = (time.process_time() - started) / len(rates)
    if len(rates) > 1:
        found["validation"] = {str(rate): _accuracy(made[rate], splits["validation"]) for rate in rates}
    rate = max(rates, key=lambda one: found.get("validation", {}).get(str(one), 0.0))
    accuracy, exact = _accuracy(made[rate], splits["test"]), _accuracy(base, splits["test"])
    return found | {
        "setting": arm.setting,
        "rate": rate,
        "accuracy": accuracy,
        "float_accuracy": exact,
        "points_lost": round(100 * (exact - accuracy), 2),
        "cpu_seconds": round(seconds, 1),
    }


def _accuracy(model: nn.Module, split: Split) -> float:
    return quality_training.evaluate(model, split, FINE_TUNING)
