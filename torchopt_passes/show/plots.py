"""Plots, as files: no window, no global state of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchopt_passes.errors import ConfigError, MissingExtraError

__all__ = ["scatter"]


def scatter(
    points: Sequence[tuple[str, float, float]],
    path: str | Path,
    *,
    x_label: str = "size on disk (KiB)",
    y_label: str = "test accuracy (%)",
    title: str = "",
) -> Path:
    """Draw named points, such as the accuracy of each stage against its size, into a file.

    Args:
        points: ``(name, x, y)`` for each, in the order of the legend.
        path: of the file; its suffix says the format (``.png``, ``.svg``, ``.pdf``).
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        title: above the plot.

    Returns:
        The path.

    Raises:
        ConfigError: no points, a coordinate that is no finite number, or an unknown suffix.
        MissingExtraError: matplotlib is not installed.
    """
    from math import isfinite

    path = Path(path)
    if not points or not all(isfinite(x) and isfinite(y) for _, x, y in points):
        raise ConfigError(f"scatter needs points with finite coordinates, not {list(points)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    # a Figure of its own, not pyplot's: the user's backend, figures and style stay as they are
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    known = canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ConfigError(f"{path.name!r}: no image format has that suffix; there are {sorted(known)}")
    axes = figure.add_subplot()
    markers = "osD^vPX*<>hp"
    for index, (name, x, y) in enumerate(points):
        # an underscore in front would hide the name from the legend
        marker = markers[index % len(markers)]
        axes.scatter([x], [y], s=70, marker=marker, label=name.lstrip("_") or name, alpha=0.85, zorder=3)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if all(x >= 0 for _, x, _ in points):
        axes.set_xlim(left=0.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=150)
    return path
