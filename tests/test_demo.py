"""The demo, shortened: what its table says is true of the files it leaves, and the plan rebuilds the int8 model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

import torchopt_passes as top
from torchopt_passes.demo import MARKER, digits, resnet, run_demo


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(0)
    return run_demo(tmp_path_factory.mktemp("demo") / "out", epochs=2.0, runs=5)


def test_int8_keeps_accuracy_and_is_3_5_times_smaller(result) -> None:
    stages = {stage.name: stage for stage in result.stages}
    teacher = next(iter(stages.values()))
    assert teacher.accuracy > 0.9
    for runtime in ("ONNX Runtime", "compiled PyTorch"):
        small, large = stages[f"int8, {runtime}"], stages[f"fp32, {runtime}"]
        assert small.accuracy >= teacher.accuracy - 0.01
        assert large.size / small.size >= 3.5
        assert small.zeros == pytest.approx(0.6, abs=0.005)
    assert len(result.table().rows) == 7


def test_the_table_is_true_of_the_files(result) -> None:
    _, test = digits()
    for stage, name in zip(result.stages[3:], ("fp32.onnx", "fp32.pt2", "int8.onnx", "int8.pt2"), strict=True):
        path = result.folder / name
        assert path.stat().st_size == stage.size
        logits = top.open_artifact(path)(pixel_values=test["pixel_values"])
        assert float((logits.argmax(-1) == test["labels"]).float().mean()) == pytest.approx(stage.accuracy)
    assert (result.folder / "accuracy_vs_size.png").read_bytes()[:4] == b"\x89PNG"
    assert "int8, ONNX Runtime" in (result.folder / "table.md").read_text()


def test_plan_and_weights_rebuild_the_int8_model_from_the_architecture(result) -> None:
    data, test = digits()
    fresh = top.capture(resnet(), kwargs={name: value[:8] for name, value in data.items()})
    top.Plan.load(result.folder / "plan.json").apply(fresh)
    load_model(fresh, result.folder / "int8.safetensors")
    assert load_file(result.folder / "int8.safetensors").keys() == fresh.state_dict().keys()
    fresh.eval()
    with torch.no_grad():
        logits = fresh(**test).logits
    artifact = top.open_artifact(result.folder / "int8.onnx")
    assert float((artifact(pixel_values=test["pixel_values"]).argmax(-1) == logits.argmax(-1)).float().mean()) >= 0.995


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(top.ConfigError, match="not made by the demo"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine" and not (tmp_path / MARKER).exists()
