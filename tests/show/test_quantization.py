"""The table of layers, and the picture with the grid in it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from torchopt_passes.errors import ConfigError, MissingExtraError
from torchopt_passes.graph.quantization.layer_histograms import LayerHistogram
from torchopt_passes.graph.quantization.layer_report import LayerReport
from torchopt_passes.show.quantization import histogram_plot, quantization_table

ROWS = (
    LayerReport(
        layer="a.weight",
        kind="conv2d",
        weight_bits=4,
        activation_bits=8,
        weight_range=(-1.25, 1.25),
        activation_range=(0.0, 6.0),
        weight_sqnr=20.04,
        sqnr=18.0,
        output_sqnr=30.0,
    ),
    LayerReport(layer="b.weight", kind="linear", sqnr=17.0, why_float="float: skip pattern 'b'"),
    LayerReport(layer="c.weight", kind="linear", weight_bits=8, activation_bits=8, output_sqnr=25.5),
    LayerReport(layer="0", kind="output", sqnr=16.0, output_sqnr=16.0),
)


def test_table() -> None:
    table = quantization_table(ROWS)
    rows = table.to_dict()
    assert [row["layer"] for row in rows] == ["c.weight", "a.weight", "b.weight", "0"]
    assert rows[1] == {
        "layer": "a.weight",
        "operation": "conv2d",
        "weight": 4,
        "input": 8,
        "weight range": "-1.25 .. 1.25",
        "input range": "0 .. 6",
        "weight SQNR": 20.04,
        "SQNR": 18.0,
        "at output": 30.0,
        "why float": None,
    }
    assert rows[2]["why float"] == "float: skip pattern 'b'"
    assert table.title == "2 layers rounded, 1 float; worst at the output first"
    cells = [cell.strip() for cell in table.markdown().splitlines()[3].split("|")]
    assert cells[5:-1] == ["-1.25 .. 1.25", "0 .. 6", "20.0", "18.0", "30.0", ""]


def histogram(layer: str = "a.weight", operand: str = "weight", bits: int = 3) -> LayerHistogram:
    top = 2 ** (bits - 1) - 1
    return LayerHistogram(
        layer=layer,
        operand=operand,
        bits=bits,
        low=-top,
        high=top,
        step=0.1,
        counts=(0, 5, 9, 5, 0),
        edges=(-4.0, -2.0, -1.0, 1.0, 2.0, 4.0),
        clipped=0.01,
    )


def test_picture_has_values_and_levels(tmp_path: Path) -> None:
    pixels = pytest.importorskip("PIL.Image")
    path = histogram_plot([histogram(), histogram(operand="input"), histogram(layer="b.weight")], tmp_path / "h.png")
    assert path == tmp_path / "h.png"
    with pixels.open(path) as image:
        image.load()
        picture = image.convert("RGB")
    width, height = picture.size
    assert (width, height) == (1100, round(100 * (1.6 * 2 + 0.6)))
    colours = {colour: count for count, colour in picture.getcolors(maxcolors=1 << 24)}
    assert colours[0x1F, 0x77, 0xB4] > 1000  # the values of three histograms
    # the levels: reddish columns, seven in each of the two histograms of the first row
    row = [picture.getpixel((x, 35)) for x in range(width)]
    reddish = [r > b + 20 and r > g + 20 for r, g, b in row]
    starts = sum(now and not before for before, now in zip([False, *reddish], reddish, strict=False))
    assert starts == 14


def test_bad_calls_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png"):
        histogram_plot([histogram()], tmp_path / "h.pdf")
    with pytest.raises(ConfigError, match="1 to 120 layers, not 0"):
        histogram_plot([], tmp_path / "h.png")
    with pytest.raises(ConfigError, match="1 to 120 layers, not 121"):
        histogram_plot([histogram(layer=str(i)) for i in range(121)], tmp_path / "h.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"torchopt_passes\[plot\]"):
        histogram_plot([histogram()], tmp_path / "h.png")
