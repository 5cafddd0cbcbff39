"""How accurate a model stays at 2x, 3x and 4x fewer MACs: PruneChannels against torch-pruning, on Fashion-MNIST.

    python -m benchmarks.quality_channels peer ours    # hours on one core; continues where it was stopped
    python -m benchmarks.quality_channels --docs       # the page and the plot, from the record

ResNet-20 and a small ViT, three seeds each. Every arm starts from the same trained model and fine-tunes with the same
optimizer, schedule, steps and order of the data. The options of each method (scope, importance, ...) are chosen on
validation images, at 3x with the first seed; what is reported is measured on the test images. The record is written
after each cell, so a run that is stopped loses one cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import torchopt_passes as top
from benchmarks import quality_data, quality_peer
from benchmarks.quality_data import FINE_TUNING, TRAINING
from benchmarks.quality_models import Classifier, count_macs, example
from benchmarks.quality_page import write_page
from benchmarks.quality_peer import Peer

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "quality_channels.json"
PAGE = ROOT / "docs" / "quality_channels.md"
SPEEDUPS, SEEDS, CHOOSING = (2, 3, 4), (0, 1, 2), (3, 0)  # the options are chosen at one speed-up, with one seed
GRADIENT_BATCHES, PRUNED_IMAGES = 32, 1_000
ORDER = 1_000  # added to the seed for the order of fine-tuning, which base training has not seen

Scope = Literal["group", "global", "isomorphic"]


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Options of PruneChannels, and of Distillation from the unpruned model: ``(alpha, temperature)`` or None.

    `head_features`: features of every head leave, as in torch-pruning, where otherwise whole heads do; `inner`: the
    residual stream is left alone, as under torch-pruning's option of that name.
    """

    importance: str
    scope: Scope
    head_features: bool = False
    inner: bool = False
    distillation: tuple[float, float] | None = None


Options = Ours | Peer
Choice = TypeVar("Choice", Ours, Peer)
PEER: dict[str, dict[str, list[Peer]]] = {
    "resnet20": {
        "group_norm": [
            Peer(importance="group_norm"),
            Peer(importance="group_norm", scope="isomorphic"),
            Peer(importance="group_norm", scope="local"),
            Peer(importance="group_norm", normalizer="max", sparsity_learning=True),
        ],
        "bn_scale": [Peer(importance="bn_scale"), Peer(importance="bn_scale", scope="isomorphic")],
        "taylor": [
            Peer(importance="taylor"),
            Peer(importance="taylor", scope="isomorphic"),
            Peer(importance="taylor", scope="local"),
        ],
    },
    "vit": {  # no batch norm, so no bn_scale
        kind: [
            Peer(importance=kind),
            Peer(importance=kind, scope="isomorphic"),
            Peer(importance=kind, scope="local"),
            Peer(importance=kind, scope="isomorphic", inner=True),
        ]
        for kind in ("group_norm", "taylor")
    },
}
SIMPLE = [Ours(importance=kind, scope=scope) for kind in ("l2", "taylor") for scope in ("global", "isomorphic")]
OURS = {
    "resnet20": SIMPLE,
    "vit": [
        *SIMPLE,
        *(Ours(importance=kind, scope="isomorphic", head_features=True) for kind in ("l2", "taylor")),
        *(Ours(importance=kind, scope="isomorphic", inner=True) for kind in ("l2", "taylor")),
        *(Ours(importance=kind, scope="isomorphic", inner=True, head_features=True) for kind in ("l2", "taylor")),
    ],
}
DISTILLATIONS = [(0.5, 2.0), (0.9, 4.0)]


def prune_ours(
    base: Classifier, options: Ours, targets: Sequence[int], calibration: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[nn.Module, float]]:
    """Yield for each target a pruned graph, and the processor seconds of capture, plan, surgery and proof."""
    for target in targets:
        started = time.process_time()
        graph = top.capture(copy.deepcopy(base).eval(), kwargs=example(4))
        share = target / count_macs(base)
        prune = top.PruneChannels(
            macs=share,
            importance=options.importance,
            scope=options.scope,
            kinds=("channels", "head_dim" if options.head_features else "heads", "blocks"),
            overrides={"patches.weight:0": 0.0} if options.inner else {},
        )
        prune(graph, top.PassContext(calibration=list(calibration)))
        graph.zero_grad()
        yield graph, time.process_time() - started


class Benchmark:
    """The record, and the cells that fill it."""

    def __init__(self, record: Path, cache: Path, data: Path) -> None:
        self.path, self.cache = record, cache
        self.splits = quality_data.load(data)
        self.record: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"bases": [], "cells": []}
        names = ("torch", "torch-pruning", "torchopt_passes", "safetensors", "numpy")
        self.record["environment"] = {
            "machine": platform.machine(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        }
        self.record["settings"] = {
            "data": "Fashion-MNIST",
            "train_images": quality_data.TRAIN,
            "validation_images": quality_data.VALIDATION,
            "test_images": len(self.splits["test"].labels),
            "images_before_fine_tuning": PRUNED_IMAGES,
            "batch": quality_data.BATCH,
            "gradient_batches": GRADIENT_BATCHES,
            "training": {name: asdict(budget) for name, budget in TRAINING.items()},
            "fine_tuning": {name: asdict(budget) for name, budget in FINE_TUNING.items()},
        }

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.path)

    def base(self, model: str, seed: int) -> Classifier:
        base, seconds = quality_data.base(model, seed, self.splits["train"], self.cache)
        if not any((row["model"], row["seed"]) == (model, seed) for row in self.record["bases"]):
            accuracy = quality_data.evaluate(base, self.splits["test"], TRAINING[model])
            row = {"model": model, "seed": seed, "macs": count_macs(base), "accuracy": accuracy, "seconds": seconds}
            self.record["bases"].append(row)
            self.save()
        return base

    def find(self, **key: Any) -> list[dict[str, Any]]:
        return [cell for cell in self.record["cells"] if all(cell[name] == value for name, value in key.items())]

    def run(self, split: str, model: str, method: str, options: Options, seed: int, speedups: Sequence[int]) -> None:
        """Prune, fine-tune and evaluate what is missing."""
        key = {"split": split, "model": model, "method": method, "options": plain(options), "seed": seed}
        missing = [speedup for speedup in speedups if not self.find(**key, speedup=speedup)]
        if not missing:
            return
        base = self.base(model, seed)
        macs, budget, train = count_macs(base), FINE_TUNING[model], self.splits["train"]
        calibration = list(quality_data.batches(train, GRADIENT_BATCHES, ORDER + seed))
        prune: Any = prune_ours if isinstance(options, Ours) else quality_peer.prune
        start = base
        if isinstance(options, Peer) and options.sparsity_learning:
            start, budget = quality_peer.learn_sparsity(base, options, train, budget, ORDER + seed)
        targets = [macs // speedup for speedup in missing]
        for speedup, (pruned, seconds) in zip(missing, prune(start, options, targets, calibration), strict=True):
            if count_macs(pruned) > macs // speedup:
                raise RuntimeError(f"{method}: {count_macs(pruned)} of {macs} MACs stay, more than at {speedup}x")
            before = quality_data.evaluate(pruned, self.splits[split], budget, PRUNED_IMAGES)
            teacher = options.distillation if isinstance(options, Ours) else None
            callbacks = (
                [top.Distillation(copy.deepcopy(base), alpha=teacher[0], temperature=teacher[1])] if teacher else []
            )
            training = quality_data.train(pruned, train, budget, ORDER + seed, callbacks=callbacks)
            cell = {
                "speedup": speedup,
                "macs_before": macs,
                "macs_after": count_macs(pruned),
                "parameters_after": sum(parameter.numel() for parameter in pruned.parameters()),
                "accuracy_pruned": before,
                "accuracy": quality_data.evaluate(pruned, self.splits[split], budget),
                "prune_seconds": round(seconds, 2),
                "train_seconds": round(training, 2),
            }
            self.record["cells"].append(key | cell)
            self.save()
            print(
                model, method, f"{split} seed {seed} {speedup}x", f"{before:.3f} -> {cell['accuracy']:.4f}", flush=True
            )

    def choose(self, model: str, method: str, candidates: Sequence[Choice]) -> Choice:
        """Return the candidate with the best validation accuracy at `CHOOSING`."""
        speedup, seed = CHOOSING
        for options in candidates:
            self.run("validation", model, method, options, seed, [speedup])
        key = {"split": "validation", "model": model, "method": method, "seed": seed, "speedup": speedup}
        return max(candidates, key=lambda options: self.find(**key, options=plain(options))[0]["accuracy"])

    def measure(self, model: str, methods: Mapping[str, Options]) -> None:
        for seed in SEEDS:
            for method, options in methods.items():
                self.run("test", model, method, options, seed, SPEEDUPS)


def plain(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))


def tool(name: str) -> str:
    if name not in ("peer", "ours"):
        raise argparse.ArgumentTypeError("peer or ours")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", type=tool, help="whose cells to fill: peer, ours")
    parser.add_argument("--models", nargs="+", choices=list(TRAINING), default=list(TRAINING))
    parser.add_argument("--docs", action="store_true", help="write the page and the plot")
    parser.add_argument("--data", type=Path, default=quality_data.DATA)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quality_channels")
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.tools:
        benchmark = Benchmark(arguments.record, arguments.cache, arguments.data)
        for which in arguments.tools:
            for model in arguments.models:
                if which == "peer":
                    methods = {name: benchmark.choose(model, name, several) for name, several in PEER[model].items()}
                else:
                    best = benchmark.choose(model, "ours", OURS[model])
                    distilled = [replace(best, distillation=weights) for weights in DISTILLATIONS]
                    with_teacher = benchmark.choose(model, "ours, distilled", distilled)
                    methods = {"ours": best, "ours, distilled": with_teacher}
                benchmark.measure(model, methods)
    if arguments.docs:
        write_page(json.loads(arguments.record.read_text()), PAGE)


if __name__ == "__main__":
    main()
