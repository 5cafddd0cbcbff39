"""The page of the training benchmark, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["write_page"]

Record = dict[str, Any]

TEXT = """# What the training callbacks are worth

Made by `benchmarks/quality_training.py` from `benchmarks/records/quality_training.json`.

{tasks}

Every arm of a task and a seed starts from the same small model, trained on the labels alone, and learns on for the same
number of steps, from the same data in the same order; `dense` is that without a callback. Accuracy on the test data in
%; mean and standard deviation where there are several seeds ({seeds}). With one seed a difference below 0.3 points on
the images, and below a whole point on the mails, says nothing. The budgets are small: read differences, not levels.
Options are not tuned.

{environment}

"""
TASK = """- **{name}**: {data}. {models}: {large[0]:,} parameters, {large[1]:.2f} M MACs and {steps[large]} steps of
  training for the large one, {small[0]:,}, {small[1]:.2f} M and {steps[small]} for the small one; {steps[further]}
  steps more for each arm."""
DATA = {
    "Fashion-MNIST": "20,000 training and 10,000 test images, in a plain loop (`top.attach`)",
    "SpamAssassin": "the first 47 words of the bodies of 3,500 mails to train with and 1,316 to test with, each text "
    "once, without headers, in the Trainer. One mail is 0.08 points, and most parameters are embeddings, which no arm "
    "prunes",
}
MODELS = {"Fashion-MNIST": "Five convolutions with batch norms", "SpamAssassin": "BERTs of 2 layers and of 1 layer"}


class Page:
    """Tables of a record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.tasks = [name for name in DATA if self.rows(name, "dense")]

    def rows(self, task: str, arm: str) -> list[dict[str, Any]]:
        found = [row for row in self.record["rows"] if (row["task"], row["arm"]) == (task, arm)]
        return sorted(found, key=lambda row: row["seed"])

    def values(self, task: str, arm: str, field: str = "accuracy") -> list[float]:
        return [row[field] for row in self.rows(task, arm)]

    def accuracy(self, task: str, arm: str) -> str:
        return percent(self.values(task, arm))

    def lost(self, task: str, arm: str, other: str = "dense") -> str:
        """Return the mean and spread of the differences to another arm, seed by seed, in points."""
        base = {row["seed"]: row["accuracy"] for row in self.rows(task, other)}
        return signed([row["accuracy"] - base[row["seed"]] for row in self.rows(task, arm) if row["seed"] in base])

    def shares(self, task: str, beginning: str) -> list[str]:
        """Return what follows the beginning in the names of arms."""
        names = {row["arm"] for row in self.record["rows"] if row["task"] == task}
        return sorted(name.removeprefix(beginning) for name in names if name.startswith(beginning))

    def schedule(self) -> list[str]:
        lines = [
            "## Magnitude pruning, cubic schedule",
            "",
            SCHEDULE,
            "",
            "| task | sparsity | cubic | against dense | one shot | against dense |",
            "|---|---|---|---|---|---|",
        ]
        for task in self.tasks:
            lines.append(f"| {task} | dense | {self.accuracy(task, 'dense')} | | | |")
            for share in self.shares(task, "cubic "):
                cells = [f"{self.accuracy(task, arm + share)} | {self.lost(task, arm + share)}" for arm in KINDS]
                lines.append(f"| {task} | {100 * float(share):.0f} % | {' | '.join(cells)} |")
        return [*lines, "", PUBLISHED, ""]

    def distillation(self) -> list[str]:
        lines = [
            "## Distillation into a model a quarter as large",
            "",
            "| task | teacher | small, labels alone | small, distilled | gain |",
            "|---|---|---|---|---|",
        ]
        for task in self.tasks:
            alpha, temperature = self.record["settings"][task]["distillation"]
            arm = "distilled from the start"
            cells = [self.accuracy(task, name) for name in ("large", "small", arm)]
            gain = self.lost(task, arm, "small")
            lines.append(f"| {task} (alpha {alpha}, temperature {temperature:g}) | {' | '.join(cells)} | {gain} |")
        return [*lines, ""]

    def weights(self) -> list[str]:
        lines = [
            "## Gates on weights against magnitude, at equal sparsity",
            "",
            "| task | zeros | `L0Pruning` | `GradualPruning` | L0 - magnitude |",
            "|---|---|---|---|---|",
        ]
        for task in self.tasks:
            for share in self.shares(task, "L0 "):
                zeros = mean(self.values(task, f"L0 {share}", "sparsity"))
                cells = [self.accuracy(task, f"{kind} {share}") for kind in ("L0", "cubic")]
                difference = self.lost(task, f"L0 {share}", f"cubic {share}")
                lines.append(f"| {task} | {100 * zeros:.1f} % | {' | '.join(cells)} | {difference} |")
        return [*lines, ""]

    def channels(self) -> list[str]:
        lines = [
            "## Information bottleneck and gates on units against magnitude, at equal numbers of units",
            "",
            CHANNELS,
            "",
            "| task | method | units removed | parameters left | MACs left | accuracy | against dense |",
            "|---|---|---|---|---|---|---|",
        ]
        for task in self.tasks:
            small = self.record["settings"][task]
            for strength in self.shares(task, "bottleneck "):
                for title, beginning in UNITS.items():
                    arm = f"{beginning}{strength}"
                    left = [
                        f"{100 * mean(self.values(task, arm, kind)) / small[kind]['small']:.0f} %"
                        for kind in ("parameters", "macs")
                    ]
                    removed = f"{100 * mean(self.values(task, arm, 'units_removed')):.0f} %"
                    name = title.format(strength=strength)
                    cells = [task, name, removed, *left, self.accuracy(task, arm), self.lost(task, arm)]
                    lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]

    def together(self) -> list[str]:
        settings = self.record["settings"]
        bits = "; ".join(f"{task}: W{settings[task]['bits'][0]}A{settings[task]['bits'][1]}" for task in self.tasks)
        lines = [
            "## Pruned, distilled and quantized, in one run",
            "",
            TOGETHER.format(pruned=100 * settings["pruned"], bits=bits),
            "",
            f"| | {' | '.join(f'{task} | against dense' for task in self.tasks)} |",
            f"|{'---|' * (1 + 2 * len(self.tasks))}",
        ]
        for arm in WAYS:
            own = f"cubic {settings['pruned']}" if arm == "pruned" else arm
            cells = [f"{self.accuracy(task, own)} | {self.lost(task, own)}" for task in self.tasks]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        return [*lines, ""]

    def text(self) -> str:
        settings, environment = self.record["settings"], self.record["environment"]
        tasks: list[str] = []
        for task in self.tasks:
            own = settings[task]
            sizes = {size: (own["parameters"][size], own["macs"][size] / 1e6) for size in ("large", "small")}
            names = {"name": task, "data": DATA[task], "models": MODELS[task], "steps": own["steps"]}
            tasks.append(TASK.format(**names, **sizes))
        versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "torchopt_passes"))
        where = f"{versions}, Python {environment['python']}, one thread ({environment['processor']})."
        seeds = ", ".join(map(str, settings["seeds"]))
        head = TEXT.format(tasks="\n".join(tasks), seeds=seeds, environment=where)
        parts = [self.schedule(), self.distillation(), self.weights(), self.channels(), self.together()]
        return head + "\n".join(line for part in parts for line in part)


KINDS = ("cubic ", "one shot ")
UNITS = {
    "`InformationBottleneck(strength={strength})`": "bottleneck ",
    "`GradualChannelPruning`": "magnitude, as bottleneck ",
    "`L0ChannelPruning`": "L0, as bottleneck ",
}
WAYS = ("dense", "pruned", "distilled", "QAT", "pruned + distilled + QAT")
PUBLISHED = """Distiller's published runs of this schedule (`examples/agp-pruning`, its language model), against their
dense models: ResNet-50 26 % zeros +0.39 points, 80 % -0.16, 84.6 % -0.49; ResNet-18 59.9 % +0.11; ResNeXt-101
75 % +0.47; AlexNet 88.3 % -0.02; MobileNet v1 51.6 % -0.10; perplexity of the LSTM 83.85 dense, 82.93 at 70 %, 83.64 at
80.4 %, 85.67 at 90 %, 92.79 at 95 %. The shape: nothing lost, or a little gained, up to about 75 %; a small loss at 80
to 85 %; more beyond 90 %. Those models are larger and were trained for longer."""
SCHEDULE = """`GradualPruning(sparsity=..., start=0.0, end=0.6)`, the same share in each weight but the first layer and
the classifier, which stay dense. One shot removes all of it before the first step. Points against dense."""
CHANNELS = """The bottleneck decides by its strength how many units leave; the others get that share for their ratio.
Where they leave is up to each method, so that parameters and MACs differ."""
TOGETHER = """{pruned:.0f} % zeros by magnitude, the large model as teacher, steps learnt by LSQ ({bits}), all at once;
next to each alone."""


def percent(numbers: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{100 * mean(numbers):.2f}{spread}" if numbers else "-"


def signed(numbers: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{100 * mean(numbers):+.2f}{spread}" if numbers else "-"


def write_page(record: Record, path: Path) -> None:
    """Write the page."""
    path.write_text(Page(record).text())
