"""Weights beside the file: they come, go and are checked with it, and models above 2 GB are written that way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.sources import get
from torchopt_passes.deploy import Artifact, OnnxTarget, OpenVinoTarget, export, onnx_graph, open_artifact
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ExportError, VerificationError

onnx = pytest.importorskip("onnx")


def written(path: Path, target: str = "onnx", **options: Any) -> Artifact:
    module, inputs = get("plain")
    return export(module, path, target, example_inputs=inputs, **options)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_weights_of_the_replaced_file_go_with_it(tmp_path: Path, target: str) -> None:
    both = written(tmp_path / "m.onnx", target, external_data=True)
    assert [file.name for file in both.files] == names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert both.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    (tmp_path / "m.bin").write_bytes(b"of somebody else")
    one = written(tmp_path / "m.onnx", target)
    assert names(tmp_path) == ["m.bin", "m.onnx"]
    assert one.files == (tmp_path / "m.onnx",)
    assert one.size == (tmp_path / "m.onnx").stat().st_size
    # data that belongs to no file of ours is not counted, and stays
    (tmp_path / "n.onnx.data").write_bytes(b"of somebody else")
    assert written(tmp_path / "n.onnx", target).files == (tmp_path / "n.onnx",)
    assert (tmp_path / "n.onnx.data").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(("suffix", "beside"), [(".onnx", "m.onnx.data"), (".xml", "m.bin")])
@pytest.mark.parametrize("new", [True, False])
def test_both_old_files_are_back_when_a_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, beside: str, new: bool
) -> None:
    old = {f"m{suffix}": b"the graph before", beside: b"the weights before"}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    replace = os.replace

    def full(source: Path, place: Path) -> None:
        if Path(place) == tmp_path / f"m{suffix}":
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", full)
    options = {"external_data": new} if suffix == ".onnx" else {}
    with pytest.raises(ExportError, match=r"No space left.*Nothing was changed: free space or choose a folder on anot"):
        written(tmp_path / f"m{suffix}", "onnx" if suffix == ".onnx" else "openvino", **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


@pytest.mark.parametrize("place", ["graph", "weights", "metadata", "data", "data gone", "other data"])
def test_damage_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "other").mkdir()
    external = "data" in place and place != "metadata"
    path = written(tmp_path / "m.onnx", external_data=external).path
    module, _ = get("plain")
    weight = module.get_parameter("c3.weight").detach().numpy().tobytes()[:64]
    file = path.with_name("m.onnx.data") if external else path
    data = bytearray(file.read_bytes())
    at = {"graph": data.find(b"Relu"), "metadata": data.find(b'"note"') + 1}.get(place, data.find(weight) + 5)
    assert at > 5
    data[at] ^= 1
    file.write_bytes(data)
    if place == "data gone":
        file.unlink()
    if place == "other data":
        file.write_bytes(data[:-1])
    wanted = r"m\.onnx\.data is missing" if place == "data gone" else r"m\.onnx.*damaged|metadata cannot be read"
    with pytest.raises(ExportError, match=wanted):
        open_artifact(path)


def test_intact_files_open_and_say_the_same(tmp_path: Path) -> None:
    _, inputs = get("plain")
    for external in (False, True):
        artifact = written(tmp_path / "m.onnx", external_data=external)
        again = open_artifact(artifact.path)
        assert again.report() == artifact.report()
        assert torch.equal(again(**inputs), artifact(**inputs))  # pyright: ignore


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_models_above_the_limit_of_a_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(onnx_graph, "_TWO_GB", 400_000)  # the weights are 455 kB
    saved: list[bool] = []
    save = onnx_graph.to_onnx

    class Watched:
        def __init__(self, program: Any) -> None:
            self.model = program.model
            self.save = lambda path, external_data: (
                saved.append(external_data),
                program.save(path, external_data=external_data),
            )

    monkeypatch.setattr(onnx_graph, "to_onnx", lambda program, opset: Watched(save(program, opset)))
    artifact = written(tmp_path / f"m{suffix}", "onnx" if suffix == ".onnx" else "openvino")
    assert saved == [True]
    assert names(tmp_path) == sorted(file.name for file in artifact.files)
    assert len(artifact.files) == 2 and artifact.files[1].stat().st_size >= 450_000
    assert "Conv" in artifact.metadata.facts["kernels"]
    module, inputs = get("plain")
    assert open_artifact(artifact.path).verify(module, inputs).error < 1e-5


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_first_wrong_layer_of_such_a_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(onnx_graph, "_TWO_GB", 400_000)
    module, _ = get("plain")
    weight = module.get_parameter("c2.weight").detach().numpy().tobytes()

    def tampered(write: Any) -> Any:
        def wrong(self: Any, program: Program, path: Path) -> dict[str, str]:
            facts = write(self, program, path)
            file = path.with_suffix(".bin") if suffix == ".xml" else path.with_name(f"{path.name}.data")
            ten = torch.tensor([10.0]).numpy().tobytes()
            file.write_bytes(file.read_bytes().replace(weight, ten + weight[4:]))
            return facts

        return wrong

    target = OnnxTarget if suffix == ".onnx" else OpenVinoTarget
    monkeypatch.setattr(target, "write", tampered(target.write))
    with pytest.raises(VerificationError, match=r"first layer that differs: conv2d_1 \(error"):
        written(tmp_path / f"m{suffix}") if suffix == ".onnx" else written(tmp_path / "m.xml", "openvino")
    assert not names(tmp_path)
