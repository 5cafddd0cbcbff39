"""The command line, as it is run: output, exit codes, one line for each error."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import torchopt_passes as top
from torchopt_passes import demo
from torchopt_passes.cli import app
from torchopt_passes.deploy import export
from torchopt_passes.graph.pruning import PruneWeights


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr
    return result.stdout


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    graph_module = top.capture(model.eval(), (torch.randn(2, 4),))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "before.safetensors", {"format": "pt"})
    PruneWeights(sparsity=0.5)(graph_module).plan.save(tmp_path)
    return tmp_path


def test_version() -> None:
    assert run("--version").strip() == top.__version__


def test_help_names_the_commands() -> None:
    text = run("--help")
    for name in ("demo", "passes", "plan", "report", "targets", "apply", "bench"):
        assert name in text


def test_passes() -> None:
    rows = json.loads(run("passes", "--format", "json"))
    assert [row["pass"] for row in rows] == list(top.pass_types())
    row = next(row for row in rows if row["pass"] == "prune_weights")
    assert "sparsity=None, threshold=None, scope='tensor'" in row["options"]
    assert row["does"].startswith("Zero weights")
    assert "prune_weights" in run("passes")


def test_targets() -> None:
    rows = list(csv.DictReader(io.StringIO(run("targets", "-f", "csv"))))
    assert [row["target"] for row in rows] == ["executorch", "inductor", "litert", "onnx", "openvino", "tensorrt"]
    assert "| onnx" in run("targets", "-f", "markdown")


def test_plan_show(folder: Path) -> None:
    grouped = json.loads(run("plan", "show", folder, "-f", "json"))
    assert [(r["edit"], r["target"]) for r in grouped[:2]] == [
        ("mask_weights", "0.weight"),
        ("mask_weights", "2.weight"),
    ]
    assert grouped[2]["target"].startswith("4 others")
    everything = json.loads(run("plan", "show", folder / "plan.json", "--all", "-f", "json"))
    assert len(everything) == 2 + 4
    assert "plan: 2 edits, 4 skips" in run("plan", "show", folder)


def test_errors_are_one_line(tmp_path: Path) -> None:
    assert "there is no plan" in run("plan", "show", tmp_path / "missing.json", code=2)
    (tmp_path / "plan.json").write_text("{")
    assert run("plan", "show", tmp_path, code=2).startswith("Error: not a plan")
    assert "no file" in run("report", tmp_path / "missing.onnx", code=2)
    assert "suffix" in run("report", tmp_path / "model.bin", code=2)


def test_apply_is_what_the_plan_does_to_the_model(folder: Path, model: nn.Module) -> None:
    assert "2 edits applied" in run("apply", folder, folder / "before.safetensors", folder / "after.safetensors")
    expected = model.state_dict()  # the graph shares its parameters: pruned already
    after = load_file(folder / "after.safetensors")
    assert set(after) == set(expected)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert int((after["0.weight"] == 0).sum()) == 16
    assert after["1.num_batches_tracked"].dtype == torch.int64
    with safe_open(folder / "after.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_apply_leaves_nothing_when_it_fails(folder: Path) -> None:
    save_file({"0.weight": torch.ones(3, 3)}, folder / "other.safetensors")
    message = run("apply", folder, folder / "other.safetensors", folder / "after.safetensors", code=2)
    assert "0.weight has shape (3, 3)" in message
    (folder / "other.safetensors").write_bytes(b"nothing")
    assert "is no file of tensors" in run("apply", folder, folder / "other.safetensors", folder / "a", code=2)
    assert "no file" in run("apply", folder, folder / "none.safetensors", folder / "a", code=2)
    (folder / "full").mkdir()
    run("apply", folder, folder / "before.safetensors", folder / "full", code=2)
    (folder / "full").rmdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "before.safetensors",
        "other.safetensors",
        "plan.json",
        "plan.safetensors",
    ]


def test_report_of_an_artifact(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 4)
    artifact = export(model.eval(), tmp_path / "model.onnx", example_inputs=(x,))
    facts = {row["fact"]: row["value"] for row in json.loads(run("report", tmp_path / "model.onnx", "-f", "json"))}
    assert facts["bytes"] == artifact.size
    assert facts["target"] == "onnx"
    assert "float32" in facts["inputs"]


def test_demo_shows_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def fake(out: Path, *, seed: int) -> demo.DemoResult:
        calls.append((out, seed))
        stage = demo.Stage(
            name="teacher", accuracy=0.985, parameters=10, zeros=0.5, size=2000, latency=0.002, speedup=1.0
        )
        return demo.DemoResult(stages=(stage,), folder=out)

    monkeypatch.setattr(demo, "run_demo", fake)
    text = run("demo", "--out", tmp_path, "--seed", 3)
    assert calls == [(tmp_path, 3)]
    assert "teacher" in text and "98.50%" in text and "test accuracy" in text
    assert str(tmp_path) in text


def test_the_installed_command_and_its_exit_code() -> None:
    command = Path(sys.executable).with_name("torchopt-passes")
    done = subprocess.run([command, "plan", "show", "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
