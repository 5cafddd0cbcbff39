"""Plots as PNG files; the user's own pyplot state is not touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torchopt_passes.errors import ConfigError, MissingExtraError

__all__ = ["scatter"]


def scatter(
    points: Sequence[tuple[str, float, float]],
    path: str | Path,
    *,
    x: str = "size on disk [MB]",
    y: str = "accuracy [%]",
    title: str = "",
) -> Path:
    """Draw labelled points, accuracy against size by default, into a PNG file.

    Args:
        points: ``(label, x, y)`` for each, in the units that the axis labels name.
        path: where to; the folder must exist.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        title: above the plot.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: no points, a coordinate that is no finite number, or a path that does not end in ``.png``.
    """
    path = Path(path)
    if not points or not all(math.isfinite(left) and math.isfinite(up) for _, left, up in points):
        raise ConfigError(f"a plot needs points with finite coordinates, not {list(points)}")
    if path.suffix != ".png":
        raise ConfigError(f"a plot is a .png file, not {path.name!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, left, up) in enumerate(points):
        # the legend names the points: labels beside them would cover each other where stages are alike
        marker = "os^Dvp*X"[number % 8]
        # an underscore in front would hide a label from the legend
        axes.scatter([left], [up], label=label.lstrip("_") or label, marker=marker, s=70, color=f"C{number % 10}")
    if all(left >= 0 for _, left, _ in points):
        axes.set_xlim(left=0.0)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))
    return path
