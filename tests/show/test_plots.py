"""A PNG with the points in it, and no trace in the user's pyplot."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from torchopt_passes.errors import ConfigError, MissingExtraError
from torchopt_passes.show.plots import scatter

POINTS = [("teacher", 4.9, 98.6), ("int8", 1.3, 98.3)]


def test_png(tmp_path: Path) -> None:
    pixels = pytest.importorskip("PIL.Image")
    before = "matplotlib.pyplot" in sys.modules
    path = scatter(POINTS, tmp_path / "plot.png", title="digits")
    assert path == tmp_path / "plot.png"
    with pixels.open(path) as image:
        image.load()
        colours = {pixel[:3] for _, pixel in image.getcolors(maxcolors=1 << 24)}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours  # one colour for each of the two points
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_figures_and_backend_of_the_user_stay(tmp_path: Path) -> None:
    import matplotlib as mpl

    backend = mpl.rcParams._get("backend")  # reading it plainly would choose one
    scatter(POINTS, tmp_path / "plot.png")
    assert mpl.rcParams._get("backend") is backend


def test_bad_calls_leave_no_file(tmp_path: Path) -> None:
    for points in ([], [("nan", 1.0, float("nan"))], [("inf", float("inf"), 1.0)]):
        with pytest.raises(ConfigError, match="finite coordinates"):
            scatter(points, tmp_path / "plot.png")
    with pytest.raises(ConfigError, match=r"\.png"):
        scatter(POINTS, tmp_path / "plot.pdf")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"torchopt_passes\[plot\]"):
        scatter(POINTS, tmp_path / "plot.png")
