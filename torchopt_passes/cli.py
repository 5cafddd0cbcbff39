"""The command line: ``torchopt-passes``. Every command is a few lines around what the library does."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchopt_passes.errors import ExportError, PlanError, TorchOptError
from torchopt_passes.show.tables import Column, Table, plan_table

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Turns what can go wrong into one line and exit code 2: a traceback says nothing to who runs a command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TorchOptError, OSError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


class Format(StrEnum):
    """How a table is written."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    json = "json"


app = typer.Typer(
    name="torchopt-passes",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Read the plans that passes write.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How the table is written.")]


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from torchopt_passes import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make PyTorch models small and fast, with every rewrite proven."""
    del version


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plan, weights, artefacts and plot; made anew.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Run the main job on handwritten digits: train, prune, distil, quantize, export, verify, measure."""
    from torchopt_passes.demo import run_demo

    steps = logging.getLogger("torchopt_passes.demo")
    steps.setLevel(logging.INFO)
    steps.addHandler(logging.StreamHandler())
    result = run_demo(out, seed=seed)
    _show(result.table())
    typer.echo(f"\nPlan, weights, artefacts and plot are in {result.folder}")


@app.command()
def passes(format: FormatOption = Format.text) -> None:
    """List the registered passes with their options and defaults, as a recipe names them."""
    from torchopt_passes.graph.registry import pass_types

    rows = [(name, _options(kind), _summary(kind)) for name, kind in pass_types().items()]
    _show(Table(["pass", "options", "does"], rows), format)


@app.command()
def targets(format: FormatOption = Format.text) -> None:
    """List the deployment targets, and how to install what is missing."""
    from torchopt_passes.deploy import targets as deploy_targets

    rows = [(t["target"], t["suffix"], t["installed"], t["missing"] or None, t["supports"]) for t in deploy_targets()]
    _show(Table(["target", "suffix", "installed", "missing", "takes"], rows), format)


@plan_app.command("show")
def show_plan(
    path: Annotated[Path, typer.Argument(help="plan.json, or the folder it is in.")],
    every: Annotated[bool, typer.Option("--all", help="One row for each skip, equal reasons not grouped.")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Show what a plan changes and leaves, and why."""
    from torchopt_passes.graph.plan import Plan

    _show(plan_table(Plan.load(path), group=not every), format)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="An exported artefact, such as model.onnx.")],
    format: FormatOption = Format.text,
) -> None:
    """Show what an exported file says about itself: precision, inputs, verification, versions. It is not run."""
    from torchopt_passes.deploy.artifact import Artifact
    from torchopt_passes.deploy.base import find_target

    target = find_target(path)
    if not path.is_file():
        raise ExportError(f"no file {str(path)!r}")
    target.require()

    def refuse(inputs: Any) -> Any:
        raise ExportError(f"{path.name} was opened for its report alone, not to run on {inputs}")

    facts = Artifact(path, target.read_metadata(path), refuse).report()
    rows = [(name, value if isinstance(value, int | float) else str(value)) for name, value in facts.items()]
    _show(Table(["fact", "value"], [(name, value) for name, value in rows if value != ""]), format)


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help="Exported artefacts of one model; ratios are against the first.")],
    batch: Annotated[list[int], typer.Option(help="Size of the batch; several times for several.")] = [1, 8],  # noqa: B006
    runs: Annotated[int, typer.Option(help="Timed calls of each.")] = 50,
    warmup: Annotated[int, typer.Option(help="Calls of each before that.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch and the runtimes, each on a CPU of its own.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="A .png of time against size, for the first batch size.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .json file for all figures.")] = None,
    format: FormatOption = Format.text,
) -> None:
    """Time artefacts side by side, in turn: medians and ratios with quartiles, load time, peak memory, size."""
    from torchopt_passes.deploy import benchmark_files

    result = benchmark_files(paths, batches=batch, runs=runs, warmup=warmup, threads=threads)
    columns: list[Column | str] = ["file", "target", "precision", "batch", Column("median", "ms", ".3f"), "quartiles"]
    columns += [Column("ratio", "", ".2f"), "ratio's quartiles", Column("size", "MB", ".2f")]
    columns += [Column("load", "ms", ".1f"), Column("first call", "ms", ".1f"), Column("peak", "MB", ".1f")]
    rows = [
        (
            *(t.name, t.target, t.precision, t.batch, 1e3 * t.median, f"{1e3 * t.low:.3f}-{1e3 * t.high:.3f}"),
            *(t.speedup, f"{t.speedup_low:.2f}-{t.speedup_high:.2f}", t.size / 1e6),
            *(1e3 * t.load, 1e3 * t.first_call, None if t.memory is None else t.memory / 1e6),
        )
        for t in result.timings
    ]
    _show(Table(columns, rows), format)
    if out is not None:
        facts = {"threads": result.threads, "cpus": result.cpus, "runs": result.runs, "warmup": result.warmup}
        out.write_text(json.dumps({**facts, "rows": result.rows()}, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from torchopt_passes.show.plots import scatter

        points = [(t.name, t.size / 1e6, 1e3 * t.median) for t in result.timings if t.batch == batch[0]]
        scatter(points, plot, y=f"time of a call, batch {batch[0]} [ms]")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json, or the folder it is in.")],
    weights: Annotated[Path, typer.Argument(help="The weights, as .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Apply a plan to a file of weights, without the model's code: for plans that change weights alone (masks)."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    from torchopt_passes.graph.plan import Plan

    loaded = Plan.load(plan)
    if not weights.is_file():
        raise PlanError(f"no file {str(weights)!r}")
    try:
        tensors = load_file(weights)
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata()
    except SafetensorError as error:
        raise PlanError(f"{weights.name} is no file of tensors: {error}") from error
    module = loaded.apply(_module_of(tensors))
    temporary = out.with_name(f".{out.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary, metadata)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    typer.echo(f"{len(loaded.edits)} edits applied, {out} written")


def _module_of(tensors: dict[str, Any]) -> Any:
    """Return a module that holds tensors under their dotted names, and nothing else."""
    from torch import nn

    root = nn.Module()
    for fqn, tensor in tensors.items():
        *path, name = fqn.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if tensor.is_floating_point():
            owner.register_parameter(name, nn.Parameter(tensor))
        else:
            owner.register_buffer(name, tensor)
    return root


def _options(kind: Any) -> str:
    from dataclasses import MISSING, fields

    shown = [f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(kind)]
    return ", ".join(shown)


def _summary(kind: Any) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _show(table: Table, format: Format = Format.text) -> None:
    if format is Format.text:
        from rich.console import Console

        Console().print(table)
    elif format is Format.markdown:
        typer.echo(table.markdown())
    elif format is Format.csv:
        typer.echo(table.csv(), nl=False)
    else:
        typer.echo(json.dumps(table.to_dict(), indent=1))
