"""The page and the plot of the quality benchmark, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"resnet20": "ResNet-20", "vit": "Small ViT (4 layers, 6 heads, width 96)"}
METHODS = {
    "ours": "`PruneChannels`",
    "ours, distilled": "`PruneChannels` + `Distillation`",
    "group_norm": "torch-pruning, group norm",
    "bn_scale": "torch-pruning, BN scale",
    "taylor": "torch-pruning, Taylor",
}

Record = dict[str, Any]


def values(record: Record, model: str, method: str, speedup: int, field: str = "accuracy") -> list[float]:
    """Return one number for each seed, from the test images."""
    key = {"split": "test", "model": model, "method": method, "speedup": speedup}
    cells = [cell for cell in record["cells"] if all(cell[name] == value for name, value in key.items())]
    return [cell[field] for cell in sorted(cells, key=lambda cell: cell["seed"])]


def percent(numbers: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{100 * mean(numbers):.2f}{spread}" if numbers else "-"


def describe(options: dict[str, Any]) -> str:
    parts = [f"{options['importance']}, {options['scope']}"]
    if options.get("normalizer", "mean") != "mean":
        parts.append(f"scores normalized by their {options['normalizer']}")
    parts += ["residual stream untouched"] if options.get("inner") else []
    parts += [name.replace("_", " ") for name in ("sparsity_learning",) if options.get(name)]
    if options.get("head_features"):
        parts.append("features of heads, not whole heads")
    if options.get("distillation"):
        parts.append("alpha {}, temperature {}".format(*options["distillation"]))
    return ", ".join(parts)


def methods_of(record: Record, model: str) -> list[str]:
    found = {cell["method"] for cell in record["cells"] if cell["model"] == model and cell["split"] == "test"}
    return [method for method in METHODS if method in found]


def speedups_of(record: Record) -> list[int]:
    return sorted({cell["speedup"] for cell in record["cells"] if cell["split"] == "test"})


def accuracy_table(record: Record, model: str) -> list[str]:
    speedups = speedups_of(record)
    bases = [row for row in record["bases"] if row["model"] == model]
    lines = [
        f"### {TITLES[model]}",
        "",
        f"Unpruned: {bases[0]['macs'] / 1e6:.2f} M MACs, {percent([row['accuracy'] for row in bases])} % accuracy.",
        "",
        "| method | " + " | ".join(f"{speedup}x" for speedup in speedups) + " | MACs left, mean | seconds to prune |",
        "|---" * (len(speedups) + 3) + "|",
    ]
    for method in methods_of(record, model):
        row = [percent(values(record, model, method, speedup)) for speedup in speedups]
        left = [values(record, model, method, speedup, "macs_after") for speedup in speedups]
        shares = " / ".join(f"{mean(numbers) / bases[0]['macs']:.3f}" if numbers else "-" for numbers in left)
        seconds = [number for speedup in speedups for number in values(record, model, method, speedup, "prune_seconds")]
        lines.append(f"| {METHODS[method]} | {' | '.join(row)} | {shares} | {mean(seconds):.1f} |")
    return [*lines, ""]


def before_table(record: Record, model: str) -> list[str]:
    speedups = speedups_of(record)
    lines = ["| before fine-tuning | " + " | ".join(f"{speedup}x" for speedup in speedups) + " |"]
    lines.append("|---" * (len(speedups) + 1) + "|")
    for method in methods_of(record, model):
        row = [percent(values(record, model, method, speedup, "accuracy_pruned")) for speedup in speedups]
        lines.append(f"| {METHODS[method]} | {' | '.join(row)} |")
    return [*lines, ""]


def choice_table(record: Record, model: str) -> list[str]:
    lines = [f"{TITLES[model]}:", "", "| method | options | validation accuracy |", "|---|---|---|"]
    cells = [cell for cell in record["cells"] if cell["split"] == "validation" and cell["model"] == model]
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method]
        best = max((cell["accuracy"] for cell in own), default=0.0)
        for cell in own:
            mark = "**" if cell["accuracy"] == best else ""
            lines.append(
                f"| {METHODS[method]} | {describe(cell['options'])} | {mark}{100 * cell['accuracy']:.2f}{mark} |"
            )
    return [*lines, ""]


TEXT = """# Accuracy after structured pruning

Made by `benchmarks/quality_channels.py` from `benchmarks/records/quality_channels.json`.

![accuracy against MACs]({plot})

{data}: the first {train_images:,} training images, a small budget on one core (read the differences, not the levels),
and the {test_images:,} test images. Mean and standard deviation over three seeds, in %; before fine-tuning, of the
first {images_before_fine_tuning:,} test images. {budgets}. Batches of {batch}; every arm starts from the same trained
models and sees the same images in the same order. MACs of both tools are counted by PyTorch's `FlopCounterMode`, and
every model is at or under its target. The options of each method were chosen on {validation_images:,} other images,
at 3x with the first seed, and are listed below. Distillation costs a forward of the teacher in each step, and
torch-pruning has none: like with like is the row without it. Seconds are processor time (for torch-pruning, of one
walk that passes the targets one after the other).

{versions}, Python {python}, {threads} thread ({processor}).

"""


def page(record: Record, plot: str) -> str:
    settings, environment = record["settings"], record["environment"]
    models = [model for model in TITLES if methods_of(record, model)]
    budgets = "; ".join(
        f"{TITLES[model].partition(' (')[0]}: {budget['optimizer']}, {settings['training'][model]['epochs']} epochs of "
        f"training and {budget['epochs']} of fine-tuning"
        for model, budget in settings["fine_tuning"].items()
    )
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "torch-pruning", "torchopt_passes"))
    lines: list[str] = []
    for model in models:
        lines += accuracy_table(record, model) + before_table(record, model)
    lines += ["## How the options were chosen", ""]
    for model in models:
        lines += choice_table(record, model)
    text = TEXT.format(plot=plot, budgets=budgets, versions=versions, **settings, **environment)
    return text + "\n".join(lines)


def draw(record: Record, path: Path) -> None:
    models = [model for model in TITLES if methods_of(record, model)]
    figure = Figure(figsize=(6 * len(models), 4.5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        bases = [row for row in record["bases"] if row["model"] == model]
        unpruned = 100 * mean(row["accuracy"] for row in bases)
        axes.axhline(unpruned, color="black", linewidth=1, linestyle=":", label="unpruned")
        for method in methods_of(record, model):
            points = []
            for speedup in speedups_of(record):
                accuracies = [100 * number for number in values(record, model, method, speedup)]
                if len(accuracies) > 1:
                    macs = mean(values(record, model, method, speedup, "macs_after")) / 1e6
                    points.append((macs, mean(accuracies), stdev(accuracies)))
            style = "-o" if method.startswith("ours") else "--s"
            label = METHODS[method].replace("`", "")
            if points:
                x, y, spread = zip(*points, strict=True)
                axes.errorbar(x, y, spread, fmt=style, capsize=3, markersize=5, label=label)
        axes.set(title=TITLES[model], xlabel="MACs for one image [M]", ylabel="test accuracy [%], mean of three seeds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    FigureCanvasAgg(figure).print_png(str(path))


def write_page(record: Record, path: Path) -> None:
    """Write the page, and the plot beside it."""
    draw(record, path.with_suffix(".png"))
    path.write_text(page(record, path.with_suffix(".png").name))
