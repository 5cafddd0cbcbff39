"""An artefact says what is wrong with a call, and a file that is damaged, foreign or hostile is refused."""

from __future__ import annotations

import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.deploy.conftest import Exported
from tests.deploy.sources import Cnn, get
from torchopt_passes.deploy import Artifact, open_artifact
from torchopt_passes.deploy.inductor import InductorTarget
from torchopt_passes.errors import ConfigError, ExportError, VerificationError

SUFFIXES = (".onnx", ".pt2", ".xml")
X = torch.zeros(2, 3, 16, 16)
IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("source", "args", "kwargs", "message"),
    [
        ("plain", (), {}, r"missing or no tensor: \['x'\]; it takes x: float32 \(batch, 3, 16, 16\)"),
        ("plain", (X, X), {}, r"takes 1 inputs \['x'\], not 2"),
        ("plain", (), {"y": X}, r"unknown: \['y'\]"),
        ("plain", (X,), {"x": X}, r"given twice: \['x'\]"),
        ("plain", (X[:, :2],), {}, r"x: float32 \(batch, 3, 16, 16\) is wanted, not float32 \(2, 2, 16, 16\)"),
        ("plain", (X.double(),), {}, r"is wanted, not float64 \(2, 3, 16, 16\)"),
        ("plain", (X[0],), {}, r"is wanted, not float32 \(3, 16, 16\)"),
        ("plain", ([1.0],), {}, r"missing or no tensor: \['x'\]"),
        ("bert", (IDS,), {}, r"missing or no tensor: \['attention_mask'\]"),
        ("bert", (IDS, IDS[:1]), {}, r"batch is 2 in input_ids, 1 in attention_mask"),
        ("bert", (IDS, IDS[:, :3]), {}, r"input_ids_1 is 5 in input_ids, 3 in attention_mask"),
    ],
)
def test_wrong_calls_say_what_is_wanted(
    exported: Exported, source: str, args: tuple[object, ...], kwargs: dict[str, object], message: str
) -> None:
    for suffix in SUFFIXES:
        with pytest.raises(ConfigError, match=message):
            exported(source, suffix)(*args, **kwargs)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_moved_and_renamed_files_open(exported: Exported, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"other name{suffix}"
    for file in exported("plain", suffix).files:
        shutil.copy(file, path.with_suffix(file.suffix))
    artifact = open_artifact(str(path))
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(artifact(x), exported("plain", suffix)(x))
    assert artifact.metadata == exported("plain", suffix).metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_verify_accepts_the_source_and_refuses_another(exported: Exported, suffix: str) -> None:
    module, inputs = get("plain")
    artifact = exported("plain", suffix)
    assert artifact.verify(module, inputs).passed
    assert artifact.verify(module, (inputs["x"],)).error < 1e-5
    torch.manual_seed(1)
    with pytest.raises(VerificationError, match=r"is not what Cnn computes: error \d.*allowed 1.0e-04"):
        artifact.verify(Cnn(), inputs)
    with pytest.raises(VerificationError, match=r"allowed 0\.0e"):
        artifact.verify(Cnn(), inputs, tolerance=0.0)
    with pytest.raises(VerificationError, match=r"does not give the outputs \['output'\]"):
        artifact.verify(Named(), inputs)


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_benchmark_makes_up_inputs(exported: Exported, suffix: str) -> None:
    for source in ("plain", "bert"):
        result = exported(source, suffix).benchmark(runs=3, warmup=1)
        (timing,) = result.timings
        assert timing.runs == 3
        assert 0 < timing.low <= timing.median <= timing.high


def test_open_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no file"):
        open_artifact(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match="the suffix tells no target"):
        open_artifact(tmp_path / "model.bin")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_files_are_refused(exported: Exported, suffix: str, damage: str, tmp_path: Path) -> None:
    data = exported("plain", suffix).path.read_bytes()
    path = tmp_path / f"m{suffix}"
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"not a model at all"}[damage])
    with pytest.raises(ExportError, match=r"m\.(onnx|pt2|xml)"):
        open_artifact(path)


def test_foreign_onnx_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="not written by torchopt_passes"):
        open_artifact(tmp_path / "m.onnx")


def repacked(artifact: Artifact, path: Path, change: dict[str, bytes]) -> None:
    """Write the artefact's package again with members changed (by the end of their name) or added."""
    with zipfile.ZipFile(artifact.path) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            found = [data for end, data in change.items() if name.endswith(end)]
            new.writestr(name, found[0] if found else old.read(name))
        for end, data in change.items():
            if not any(name.endswith(end) for name in old.namelist()):
                new.writestr(end, data)


def test_a_package_with_changed_code_is_refused(exported: Exported, tmp_path: Path) -> None:
    repacked(exported("plain", ".pt2"), tmp_path / "m.pt2", {".so": b"\x7fELF other code"})
    with pytest.raises(ExportError, match="does not match its checksum"):
        open_artifact(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    "member",
    ["m/data/weights/weight_0", "m/models/model.json", "../escape.so", "/etc/passwd", "m/data/constants/obj"],
)
def test_a_package_with_anything_else_is_refused(exported: Exported, tmp_path: Path, member: str) -> None:
    """Such members are what ``torch.export.load`` would unpickle, or would be written outside the folder."""
    repacked(exported("plain", ".pt2"), tmp_path / "m.pt2", {member: b"\x80\x04."})
    with pytest.raises(ExportError, match="was not written by torchopt_passes"):
        open_artifact(tmp_path / "m.pt2")


def test_nothing_is_unpickled(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for suffix in SUFFIXES:
        assert open_artifact(exported("plain", suffix).path)(X).shape == (2, 10)


@pytest.mark.parametrize("change", [{"format": 2}, {"more": 1}, {"inputs": [{"name": "x"}]}, {"inputs": None}])
def test_metadata_is_read_strictly(exported: Exported, tmp_path: Path, change: dict[str, object]) -> None:
    import json

    artifact = exported("plain", ".pt2")
    text = json.dumps(json.loads(artifact.metadata.to_json()) | change).encode()
    repacked(artifact, tmp_path / "m.pt2", {"torchopt_passes.json": text})
    with pytest.raises(ExportError, match="metadata cannot be read"):
        open_artifact(tmp_path / "m.pt2")


def test_code_for_a_better_cpu_is_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported("plain", ".pt2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    later = replace(artifact.metadata, facts=artifact.metadata.facts | {"cpu": "AVX512"})
    with pytest.raises(ExportError, match="compiled for a CPU with AVX512, this one has AVX2: export it here"):
        InductorTarget.load(artifact.path, later)
    InductorTarget.load(artifact.path, replace(later, facts=artifact.metadata.facts | {"cpu": "AVX2"}))


def test_repr_tells_how_to_call_it(exported: Exported) -> None:
    text = repr(exported("plain", ".onnx"))
    assert "x: float32 (batch, 3, 16, 16) -> output: float32 (batch, 10)" in text
    assert "onnx float32" in text


def test_compressed_size_is_that_of_zlib(tmp_path: Path) -> None:
    import zlib

    from torchopt_passes.deploy import compressed_size

    data = io.BytesIO(torch.randint(0, 4, (3 << 20,), dtype=torch.uint8).numpy().tobytes()).getvalue()
    (tmp_path / "f").write_bytes(data)
    assert compressed_size(tmp_path / "f", level=1) == len(zlib.compress(data, 1))
    assert compressed_size(tmp_path / "f", level=1) < 0.5 * len(data)
