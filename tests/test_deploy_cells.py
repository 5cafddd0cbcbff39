"""The page of the deployment cells says what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import deploy_cells
from benchmarks.deploy_cells_page import page


def row(target: str, precision: str, maker: str, ms: float, **more: Any) -> dict[str, Any]:
    found = {"model": "resnet50", "target": target, "precision": precision, "maker": maker}
    return found | {"ms": {"1": ms, "8": None}, "compile ms": {"1": 80.0}, "run": "first"} | more


FAITHFUL = {"cosine": 0.99, "agreement": 0.9}
RECORD = {
    "rows": [
        row("compile", "float32", "peer", 80.0),
        row("onnx", "float32", "ours", 40.0, bytes=100_000_000),
        row("onnx", "int8", "ours", 20.0, bytes=28_000_000, fidelity=FAITHFUL, error=0.02, tolerance=0.03),
        row("onnx", "int8", "peer", 19.0, bytes=26_000_000, fidelity={"cosine": 0.98, "agreement": 0.8}),
        row("onnx", "int8", "pruned", 8.0, bytes=9_000_000, fidelity={"cosine": 0.1, "agreement": 0.0}),
        row("litert", "int8", "ours", 0.0, failed="ExportError: no a|b"),
    ]
}


def test_figures_and_goals() -> None:
    text = page({"CPU with VNNI": RECORD})
    faith = "0.9900 (0.9800) | 0.900 (0.800) | 2.0e-02 (3.0e-02) |"
    assert f"| onnx | int8 | 20.00 (4.00x) | 0.95 | - | - | 28.0 (0.28) | {faith}" in text
    assert "0.97 of the speed of the runtime's own tools**: 0 of 1 cells. Not: resnet50 onnx int8 batch 1 0.95." in text
    assert "int8 at least as faithful (cosine, to 0.0005)**: 1 of 1 cells." in text
    assert "int8 files at most 0.27 of the float32 file**: 0 of 1 cells. Not: resnet50 onnx int8 0.280." in text
    assert "**ResNet-50 with half of its channels, onnx int8**: 2.50 times the speed of int8 alone" in text


def test_times_of_two_runs_are_not_compared() -> None:
    """The machine was half as fast in the second run: its ratio is that of its own `torch.compile`."""
    other = row("onnx", "int8", "ours", 40.0, bytes=28_000_000, fidelity=FAITHFUL)
    other |= {"run": "second", "compile ms": {"1": 160.0}}
    rows = [other if r["precision"] == "int8" and r["maker"] == "ours" else r for r in RECORD["rows"]]
    text = page({"CPU with VNNI": {"rows": rows}})
    assert "| onnx | int8 | 40.00 (4.00x) | - |" in text and "0 of 0 cells" in text
    assert "half of its channels" not in text


def test_a_cell_that_does_not_work_gives_its_reason() -> None:
    text = page({"CPU with VNNI": RECORD})
    assert "| litert | int8 | does not work |" in text
    assert "- litert int8, ours: `ExportError: no a/b`" in text


def test_a_row_holds_times_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_cells, "RECORDS", tmp_path)
    (tmp_path / "resnet50").mkdir()
    arm = "onnx-int8-ours"
    built = {"model": "resnet50", "arm": arm, "batch": 1, "open": True, "bytes": 9}
    (tmp_path / "resnet50" / f"{arm}-1.json").write_text(json.dumps(built))
    base = deploy_cells.COMPILE
    both = {(base, 1): 0.1, (base, 8): 0.8, (arm, 1): 0.05, (arm, 8): 0.4}
    for medians in (both, {(base, 1): 0.2, (arm, 1): 0.1}, {}):  # the last builds alone: times stay
        deploy_cells.record("resnet50", tmp_path, medians)
    rows = json.loads((tmp_path / f"deploy_cells_{deploy_cells.machine()}.json").read_text())["rows"]
    (found,) = [row for row in rows if row["arm"] == arm]
    assert found["ms"] == {"1": 100.0} and found["compile ms"] == {"1": 200.0}
    assert "| onnx | int8 | 100.00 (2.00x) |" in page({"CPU": {"rows": rows}})
