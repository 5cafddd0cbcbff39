"""Quantization made visible: a table of every layer, and pictures of values on their grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchopt_passes.errors import ConfigError, MissingExtraError
from torchopt_passes.show.tables import Cell, Column, Table

if TYPE_CHECKING:
    from torchopt_passes.graph.quantization.layer_histograms import LayerHistogram
    from torchopt_passes.graph.quantization.layer_report import LayerReport

__all__ = ["histogram_plot", "quantization_table"]

_DPI = 100
_LONGEST = 120  # rows of a picture: 120 * 1.6 inches at 100 dpi stay far below the 65536 pixels that it may have


def quantization_table(rows: Sequence[LayerReport]) -> Table:
    """Return what `layer_report` found: rounded layers, worst at the output first; float ones; the outputs."""
    rounded = [row for row in rows if row.kind != "output" and not row.why_float]
    rounded.sort(key=lambda row: math.inf if row.output_sqnr is None else row.output_sqnr)
    floats = [row for row in rows if row.why_float]
    columns = [
        "layer",
        "operation",
        Column("weight", "bits"),
        Column("input", "bits"),
        "weight range",
        "input range",
        Column("weight SQNR", "dB", ".1f"),
        Column("SQNR", "dB", ".1f"),
        Column("at output", "dB", ".1f"),
        "why float",
    ]
    outputs = [row for row in rows if row.kind == "output"]
    title = f"{len(rounded)} layers rounded, {len(floats)} float; worst at the output first"
    return Table(columns, [_cells(row) for row in [*rounded, *floats, *outputs]], title=title)


def histogram_plot(histograms: Sequence[LayerHistogram], path: str | Path) -> Path:
    """Draw how weights and inputs lie on their grids into a PNG file: a row for each layer, a line for each level.

    Args:
        histograms: of `layer_histograms`; at most 120 layers.
        path: where to; the folder must exist.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: there is nothing to draw, or too much, or the path does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ConfigError(f"a plot is a .png file, not {path.name!r}")
    layers = list(dict.fromkeys(item.layer for item in histograms))
    if not 1 <= len(layers) <= _LONGEST:
        raise ConfigError(f"a picture has 1 to {_LONGEST} layers, not {len(layers)}: choose some with layers=")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    figure = Figure(figsize=(11, 1.6 * len(layers) + 0.6), dpi=_DPI, layout="constrained")
    grid: Any = figure.subplots(len(layers), 2, squeeze=False)
    for row, layer in enumerate(layers):
        own = [item for item in histograms if item.layer == layer]
        for column, axes in enumerate(grid[row]):
            if column < len(own):
                _draw(axes, own[column])
            else:
                axes.set_axis_off()
    figure.supxlabel("steps of the grid; red: its levels", fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _cells(row: LayerReport) -> tuple[Cell, ...]:
    return (
        row.layer,
        row.kind,
        row.weight_bits,
        row.activation_bits,
        _range(row.weight_range),
        _range(row.activation_range),
        row.weight_sqnr,
        row.sqnr,
        row.output_sqnr,
        row.why_float or None,
    )


def _range(pair: tuple[float, float] | None) -> str | None:
    return None if pair is None else f"{pair[0]:.3g} .. {pair[1]:.3g}"


def _draw(axes: Any, item: LayerHistogram) -> None:
    levels = range(item.low, item.high + 1)
    # many levels are drawn faint, so that the values stay visible behind them
    axes.vlines(
        levels, 0, 1, transform=axes.get_xaxis_transform(), color="C3", linewidth=0.8, alpha=min(0.6, 20 / len(levels))
    )
    axes.vlines([item.low, item.high], 0, 1, transform=axes.get_xaxis_transform(), color="C3", linewidth=1.2)
    axes.stairs(item.counts, item.edges, fill=True, color="C0")
    axes.set_yscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_xlim(item.edges[0], item.edges[-1])
    clipped = f", {item.clipped:.2%} clipped" if item.clipped else ""
    axes.set_title(f"{item.layer}: {item.operand}, {item.bits} bits, step {item.step:.3g}{clipped}", fontsize="small")
    axes.tick_params(labelsize="x-small")
