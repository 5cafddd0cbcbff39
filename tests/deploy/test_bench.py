"""Artefact files side by side: what is measured, in which order, on which inputs, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import torchopt_passes as top
from tests.deploy.conftest import Exported
from torchopt_passes.cli import app
from torchopt_passes.deploy import bench
from torchopt_passes.deploy.footprint import Footprint
from torchopt_passes.errors import ConfigError, ExportError


def paths(exported: Exported) -> list[Path]:
    return [exported("plain", ".onnx").path, exported("plain", ".pt2").path]


def test_files_of_any_target_are_timed_side_by_side(exported: Exported) -> None:
    files = paths(exported)
    affinity = os.sched_getaffinity(0)
    result = top.benchmark_files(files, batches=(1, 3), runs=3, warmup=1, threads=1)
    assert [(t.name, t.target, t.batch) for t in result.timings] == [
        ("plain.onnx", "onnx", 1),
        ("plain.pt2", "inductor", 1),
        ("plain.onnx", "onnx", 3),
        ("plain.pt2", "inductor", 3),
    ]
    for timing in result.timings:
        assert 0 < timing.low <= timing.median <= timing.high
        assert timing.speedup_low <= timing.speedup_high
        assert timing.load > 0 and timing.first_call > 0 and timing.precision == "float32"
        assert timing.size == next(path for path in files if path.name == timing.name).stat().st_size
        # its 115 thousand weights take 0.46 MB; the peak cannot be below them, nor a hundred times as much
        assert timing.memory is not None and 0.4e6 < timing.memory < 200e6
    assert [t.speedup for t in result.timings if t.name == "plain.onnx"] == [1.0, 1.0]
    assert (result.threads, len(result.cpus), result.runs, result.warmup) == (1, 1, 3, 1)
    assert os.sched_getaffinity(0) == affinity and torch.get_num_threads() == 1
    assert json.loads(json.dumps(result.rows()))[0]["name"] == "plain.onnx"


def test_made_up_inputs_follow_the_metadata(exported: Exported) -> None:
    metadata = exported("bert", ".onnx").metadata
    ids, mask = metadata.made_up(5)
    assert ids.shape == mask.shape == (5, 12) and ids.dtype == torch.int64 and bool((ids == 1).all())
    image = exported("plain", ".onnx").metadata.made_up(2)[0]
    assert image.shape == (2, 3, 16, 16) and torch.equal(image, exported("plain", ".onnx").metadata.made_up(2)[0])


def test_a_footprint_is_of_a_process_of_its_own(exported: Exported) -> None:
    ballast = torch.ones(50_000_000)  # 200 MB that a process forked from this one would seem to have
    found = top.footprint(paths(exported)[0], batch=2)
    assert found.memory is not None and found.memory < 150e6 and found.load > 0 < found.first_call
    del ballast
    with pytest.raises(ExportError, match=r"none\.onnx could not be measured: .*no file"):
        top.footprint("none.onnx")


def test_what_cannot_be_compared_is_refused(exported: Exported, tmp_path: Path) -> None:
    files = paths(exported)
    for wrong, options, says in (
        ([], {}, "needs files"),
        (files, {"batches": ()}, "needs files"),
        (files, {"batches": (0,)}, "batch sizes >= 1"),
        (files, {"threads": 0}, "threads >= 1"),
        (files, {"threads": 100_000}, "CPUs for them"),
        ([files[0], files[0]], {}, "stands twice"),
        ([files[0], exported("bert", ".onnx").path], {}, "not one model's files"),
        (files, {"runs": 0}, "runs >= 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            top.benchmark_files(wrong, **options)  # type: ignore[arg-type]
    fixed = top.export(
        torch.nn.Linear(3, 2).eval(), tmp_path / "f.onnx", example_inputs=(torch.ones(2, 3),), dynamic=False
    )
    with pytest.raises(ConfigError, match="fixed batch"):
        top.benchmark_files([fixed.path], batches=(1,))


def test_the_command(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "footprint", lambda *_, **__: Footprint(load=0.25, first_call=0.5, memory=None))
    plot, out = tmp_path / "bench.png", tmp_path / "bench.json"
    command = ["bench", *map(str, paths(exported)), "--batch", "2", "--runs", "2", "--warmup", "0", "-f", "json"]
    done = CliRunner().invoke(app, [*command, "--plot", str(plot), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert (rows[0]["file"], rows[0]["batch"], rows[0]["ratio"]) == ("plain.onnx", 2, 1.0)
    assert (rows[1]["load"], rows[1]["first call"], rows[1]["peak"]) == (250.0, 500.0, None)
    record = json.loads(out.read_text())
    assert record["runs"] == 2 and record["threads"] == 1 and record["rows"][1]["target"] == "inductor"
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(app, [*command[:-2]], env={"COLUMNS": "240"})
    assert text.exit_code == 0 and "plain.pt2" in text.stdout and "ratio" in text.stdout
    wrong = CliRunner().invoke(app, ["bench", "none.onnx"])
    assert wrong.exit_code == 2 and wrong.stderr.strip() == "Error: no file 'none.onnx'"
