"""LiteRT: what is in a .tflite file is what the model computes, in float and in int8."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deploy.compressed import compressed, graph_of, inputs_of
from tests.deploy.sources import get
from torchopt_passes.deploy import Artifact, LiteRtTarget, benchmark_files, compressed_size, export, open_artifact
from torchopt_passes.deploy.calls import run_source
from torchopt_passes.deploy.grids import fold_static, make_signed, unfold_weights
from torchopt_passes.deploy.litert import _from_file, _to_file
from torchopt_passes.deploy.program import read_program
from torchopt_passes.errors import ConfigError, ExportError
from torchopt_passes.graph.inference import to_inference

pytest.importorskip("litert_torch", reason="needs pip install 'torchopt_passes[litert]'")
# what the converter and jax warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")

SOURCES = ("plain", "plain int8", "plain pruned qat", "plain clustered", "bert int8")


def source(name: str) -> nn.Module:
    base, _, kind = name.partition(" ")
    return compressed(base, "litert", kind) if kind else graph_of(base)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("litert")
    return {name: export(source(name), folder / f"{name}.tflite") for name in SOURCES}


def error(artifact: Artifact, module: nn.Module, call: dict[str, torch.Tensor]) -> float:
    results = run_source(module, ((), call))
    want = results.get("logits", next(iter(results.values())))
    got = artifact(**call)
    assert isinstance(got, torch.Tensor)
    assert got.shape == want.shape and got.dtype == want.dtype
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", ["plain", "plain int8"])  # tests/deploy/test_compressed_sources.py has the others
@pytest.mark.parametrize("batch", [1, 8])
def test_equals_the_source_at_every_batch(files: dict[str, Artifact], name: str, batch: int) -> None:
    artifact = files[name]
    assert artifact.metadata.inputs[0].shape == ("batch", 3, 16, 16)
    assert artifact.metadata.precision == ("float32" if name == "plain" else "int8")
    assert error(artifact, source(name), inputs_of("plain", batch)) < (
        0.02 if artifact.metadata.precision == "int8" else 1e-5
    )


def test_bert_has_fixed_sizes_and_says_why(files: dict[str, Artifact]) -> None:
    artifact = files["bert int8"]
    assert [spec.shape for spec in artifact.metadata.inputs] == [(2, 12), (2, 12)]
    assert "aten.arange" in artifact.metadata.facts["sizes"]
    assert [spec.dtype for spec in artifact.metadata.inputs] == ["int64", "int64"]  # int32 in the file
    assert error(artifact, source("bert int8"), inputs_of("bert", 2)) < 0.02
    with pytest.raises(ConfigError, match=r"input_ids: int64 \(2, 12\) is wanted, not int64 \(1, 12\)"):
        artifact(**inputs_of("bert", 1))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("plain int8", {"CONV_2D int8": 3, "FULLY_CONNECTED int8": 1, "ADD int8": 1}),
        ("plain pruned qat", {"CONV_2D int8": 3, "FULLY_CONNECTED int8": 1, "ADD int8": 1}),
        ("bert int8", {"FULLY_CONNECTED int8": 14, "BATCH_MATMUL": 4}),
        ("plain", {"CONV_2D": 3, "FULLY_CONNECTED": 1, "ADD": 1}),
    ],
)
def test_int8_is_int8(files: dict[str, Artifact], name: str, kernels: dict[str, int]) -> None:
    found = {kernel: int(n) for kernel, n in (i.rsplit(" ", 1) for i in files[name].report()["kernels"].split(", "))}
    assert {kernel: found.get(kernel) for kernel in kernels} == kernels
    if "int8" in name or "qat" in name:
        assert "CONV_2D" not in found and "FULLY_CONNECTED" not in found


def test_scales_are_those_of_the_graph(files: dict[str, Artifact]) -> None:
    """Nothing is calibrated again: each scale of the graph is in the file, and no other."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(bytearray(files["plain pruned qat"].path.read_bytes()), 0)
    tensors = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    scales = {round(float(s), 9) for t in tensors for s in t.quantization.scale}
    graph = source("plain pruned qat")
    pairs = [n for n in graph.graph.nodes if "dequantize_per_tensor" in str(n.target)]
    state = graph.state_dict()
    own = {round(float(torch.tensor(n.args[1])), 9) for n in pairs}
    own |= {round(float(s), 9) for name, value in state.items() if name.endswith("_scale") for s in value}
    assert scales == own
    weights = [t for t in tensors if model.buffers[t.buffer].data is not None]
    assert {tuple(t.shape) for t in weights} == {(32, 3, 3, 3), (32, 3, 3, 32), (64, 3, 3, 32), (10, 64)}


def test_sizes(files: dict[str, Artifact], tmp_path: Path) -> None:
    float32, module = files["plain"], source("plain")
    assert files["plain int8"].size <= 0.3 * float32.size
    assert files["plain pruned qat"].size <= 0.12 * float32.size
    assert compressed_size(files["plain clustered"].path) <= 0.2 * float32.size
    half = export(module, tmp_path / "h.tflite", weights="float16")
    assert half.size <= 0.52 * float32.size
    assert half.metadata.precision == "float16"
    assert error(half, module, inputs_of("plain", 3)) < 2e-3
    dynamic = export(module, tmp_path / "d.tflite", weights="int8")
    assert dynamic.size <= 0.3 * float32.size
    assert dynamic.metadata.precision == "int8"
    assert error(dynamic, module, inputs_of("plain", 3)) < 0.02


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "foreign", "metadata", "flipped"])
def test_damaged_and_foreign_files_are_refused(files: dict[str, Artifact], tmp_path: Path, damage: str) -> None:
    data = bytearray(files["plain"].path.read_bytes())
    place = data.find(b'"format"')
    data = {
        "empty": lambda: b"",
        "cut": lambda: data[: len(data) // 2],
        "header": lambda: struct.pack("<I", 2**31) + data[4:],
        "foreign": lambda: data.replace(b"torchopt_passes\0", b"something_other\0"),
        "flipped": lambda: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        "metadata": lambda: data[:place] + b"\xff" + data[place + 1 :],
    }[damage]()
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    with pytest.raises(
        ExportError, match=r"damaged|not written by torchopt_passes|metadata cannot be read|cannot open"
    ):
        open_artifact(path)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: source("plain").bfloat16(), {"dynamic": False}, r"LiteRT computes in float32"),
        (lambda: source("plain int8"), {"weights": "float16"}, r"weights='float16' is for a float32 model, not int8"),
        (lambda: source("plain"), {"weights": "int4"}, r"weights"),
        (lambda: source("plain"), {"weights": "int16x8"}, r"weights=\"int16x8\" needs calibration="),
        (
            lambda: source("plain"),
            {"weights": "int16x8", "quantization": "int8", "calibration": []},
            r"quantizes by itself: leave quantization= out",
        ),
    ],
)
def test_what_it_cannot_store_is_refused(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = make()
    x = torch.zeros(2, 3, 16, 16, dtype=next(module.parameters()).dtype)
    with pytest.raises((ConfigError, ExportError), match=message):
        export(module, tmp_path / "m.tflite", example_inputs=(x,), **options)
    assert not list(tmp_path.iterdir())


def test_rewrites_change_no_value() -> None:
    graph = compressed("plain", "onnx", "int8")  # uint8 activations, weights stored as integers
    (x,) = inputs_of("plain", 3).values()
    plain, signed = to_inference(graph), to_inference(graph)
    make_signed(signed, "LiteRT")
    unfold_weights(signed)
    assert torch.equal(plain(x)[0], signed(x)[0])
    assert not [n for n in signed.graph.nodes if n.op == "call_function" and torch.uint8 in n.args]
    clustered = to_inference(source("plain clustered"))
    want = clustered(x)[0]
    fold_static(clustered)
    assert torch.equal(clustered(x)[0], want)
    assert not [n for n in clustered.graph.nodes if "bitwise" in str(n.target)]


def test_the_graph_itself_is_left_alone() -> None:
    graph = source("plain int8")
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    code = graph.code
    read_program(graph, prepare=LiteRtTarget().prepare)
    assert graph.code == code
    after = graph.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def test_int8_in_one_call(tmp_path: Path) -> None:
    module, call = get("plain")
    rows = [{"x": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    artifact = export(
        module, tmp_path / "m.tflite", example_inputs=call, quantization="int8", calibration=(row for row in rows)
    )
    assert "CONV_2D int8 3" in artifact.report()["kernels"]
    got, want = artifact(**rows[0]), module(**rows[0])
    assert isinstance(got, torch.Tensor)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_int8_weights_with_int16_activations(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(16, 3, 16, 16, generator=generator)} for _ in range(8)]
    module = source("plain")
    rows.append(module.meta["example_inputs"][1])  # what is beyond the ranges is cut off
    artifact = export(module, tmp_path / "m.tflite", weights="int16x8", calibration=(row for row in rows))
    assert artifact.metadata.precision == "int8"
    assert artifact.size <= 0.3 * sum(weight.numel() * 4 for weight in module.parameters())
    report = artifact.report()
    assert report["activations"] == "int16"
    assert "CONV_2D int16 3" in report["kernels"] and "FULLY_CONNECTED int16 1" in report["kernels"]
    again = open_artifact(artifact.path)
    assert error(again, module, rows[0]) < 0.03
    for batch in (1, 8):
        call = {"x": rows[1]["x"][:batch]}
        assert error(again, module, call) < 0.05
        assert torch.equal(again(**call), artifact(**call))  # pyright: ignore


def test_equal_vectors_stand_in_a_file_once(files: dict[str, Artifact]) -> None:
    import flatbuffers  # pyright: ignore[reportMissingImports]
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    content = files["plain int8"].path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
    grids = [t.quantization for t in model.subgraphs[0].tensors if t.quantization is not None]
    lengths = [len(grid.zeroPoint) for grid in grids if grid.zeroPoint is not None]
    repeated = 8 * (sum(lengths) - sum(set(lengths)))  # int64; all are zero where there is more than one
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    assert repeated > 500 and len(builder.Output()) - len(content) >= repeated - 8 * lengths.count(1)


def test_names_of_values_have_no_paths_of_classes(files: dict[str, Artifact]) -> None:
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    graph = schema.Model.GetRootAs(files["plain int8"].path.read_bytes(), 0).Subgraphs(0)
    names = [graph.Tensors(place).Name() for place in range(graph.TensorsLength())]
    assert len(names) > 10 and not any(b"." in name for name in names)


@pytest.mark.parametrize(("dtype", "zero_point"), [(torch.int8, -3), (torch.int16, 0), (torch.uint8, 128)])
def test_values_are_rounded_as_torch_rounds_them(dtype: torch.dtype, zero_point: int) -> None:
    scale, limits = 0.037, torch.iinfo(dtype)
    detail = {"quantization": (scale, zero_point), "dtype": np.dtype(str(dtype).removeprefix("torch.")).type}
    x = torch.randn(4, 3, 9, 9) * 4
    x.view(-1)[:3] = torch.tensor([1e6, -1e6, 0.0])
    wanted = (x * (1.0 / scale)).round().add(zero_point).clamp(limits.min, limits.max)
    found = _to_file(x, detail)
    assert found.dtype == detail["dtype"] and torch.equal(torch.from_numpy(found).float(), wanted)
    torch.testing.assert_close(_from_file(found, detail), (wanted - zero_point) * scale)
    ids = torch.tensor([[1, 2**30]])
    assert _to_file(ids, {"quantization": (0.0, 0), "dtype": np.int32}).tolist() == ids.tolist()


def test_files_are_timed_side_by_side(files: dict[str, Artifact]) -> None:
    paths = [files[name].path for name in ("plain", "plain int8")]
    rows = benchmark_files(paths, batches=(1, 8), runs=2, warmup=1, threads=1).rows()
    assert [(row["target"], row["precision"], row["batch"]) for row in rows] == [
        ("litert", precision, batch) for batch in (1, 8) for precision in ("float32", "int8")
    ]
    assert all(row["median"] > 0 and row["load"] > 0 and row["size"] > 0 for row in rows)
