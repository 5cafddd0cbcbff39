"""ExecuTorch: what is in a .pte file is what the model computes, in float and in int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.deploy.compressed import compressed, graph_of, inputs_of
from tests.deploy.sources import get
from torchopt_passes.deploy import Artifact, ExecuTorchTarget, benchmark_files, compressed_size, export, open_artifact
from torchopt_passes.deploy.calls import run_source
from torchopt_passes.errors import ConfigError, ExportError

pytest.importorskip("executorch", reason="needs pip install 'torchopt_passes[executorch]'")
# what the exporter warns of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")

SOURCES = ("plain", "plain int8", "plain pruned qat", "plain clustered", "bert int8")


def source(name: str) -> nn.Module:
    base, _, kind = name.partition(" ")
    return compressed(base, "executorch", kind) if kind else graph_of(base)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("executorch")
    return {name: export(source(name), folder / f"{name}.pte", max_batch=8) for name in SOURCES}


# tests/deploy/test_compressed_sources.py has the others
@pytest.mark.parametrize("name", ["plain", "plain int8", "bert int8"])
@pytest.mark.parametrize("batch", [1, 8])
def test_equals_the_source_at_every_batch(files: dict[str, Artifact], name: str, batch: int) -> None:
    artifact, call = files[name], inputs_of(name.partition(" ")[0], batch)
    results = run_source(source(name), ((), call))
    want = results.get("logits", next(iter(results.values())))
    got = artifact(**call)
    assert isinstance(got, torch.Tensor)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert artifact.metadata.precision == ("float32" if name == "plain" else "int8")
    assert float((got - want).norm() / want.norm()) < (1e-5 if name == "plain" else 0.02)


def test_sizes_are_open_up_to_a_stated_bound(files: dict[str, Artifact]) -> None:
    assert files["plain"].metadata.inputs[0].shape == ("batch", 3, 16, 16)
    assert files["plain"].report()["largest sizes"] == "batch 8"
    # the model has 64 positions, fewer than `max_length`
    assert files["bert int8"].report()["largest sizes"] == "batch 8, input_ids_1 64"
    with pytest.raises(ExportError, match=r"cannot run inputs of sizes \[\(9, 3, 16, 16\)\] \(largest: batch 8\)"):
        files["plain"](torch.zeros(9, 3, 16, 16))
    with pytest.raises(ConfigError, match="at least 3"):
        ExecuTorchTarget(max_batch=1)


def test_results_are_not_overwritten_by_the_next_call(files: dict[str, Artifact]) -> None:
    first = files["plain"](**inputs_of("plain", 2))
    assert isinstance(first, torch.Tensor)
    kept = first.clone()
    files["plain"](torch.zeros(2, 3, 16, 16))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("plain int8", {"convolution int8": 3, "linear int8": 1, "add int8": 1, "portable mean": 1}),
        ("plain pruned qat", {"convolution int8": 3, "linear int8": 1, "add int8": 1}),
        ("bert int8", {"linear int8": 14, "bmm": 4}),
        ("plain", {"convolution": 3, "linear": 1, "add": 1}),
    ],
)
def test_int8_is_int8(files: dict[str, Artifact], name: str, kernels: dict[str, int]) -> None:
    found = {kernel: int(n) for kernel, n in (i.rsplit(" ", 1) for i in files[name].report()["kernels"].split(", "))}
    assert {kernel: found.get(kernel) for kernel in kernels} == kernels
    if name != "plain":
        assert "convolution" not in found and "linear" not in found


def test_sizes_on_disk(files: dict[str, Artifact]) -> None:
    assert files["plain int8"].size <= 0.3 * files["plain"].size
    assert files["plain pruned qat"].size <= 0.12 * files["plain"].size
    assert compressed_size(files["plain clustered"].path) <= 0.2 * files["plain"].size


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "flipped"])
def test_damaged_and_foreign_files_are_refused(files: dict[str, Artifact], tmp_path: Path, damage: str) -> None:
    data = files["plain"].path.read_bytes()
    half = len(data) // 2
    path = tmp_path / "m.pte"
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:half],
            "foreign": data.replace(b"torchopt_passes", b"something_other"),
            "flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
        }[damage]
    )
    with pytest.raises(ExportError, match=r"damaged|was not written by torchopt_passes"):
        open_artifact(path)


def test_a_graph_rounded_for_another_runtime_says_what_to_do(tmp_path: Path) -> None:
    graph = compressed("plain", "onnx", "int8")  # its linear returns float, and is given no bias
    with pytest.raises(ExportError, match=r'dequantize_per_channel.*InsertFakeQuant\(target="executorch"\)'):
        export(graph, tmp_path / "m.pte", dynamic=False)
    assert not list(tmp_path.iterdir())


def test_int8_in_one_call(tmp_path: Path) -> None:
    module, call = get("plain")
    rows = [{"x": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    artifact = export(
        module, tmp_path / "m.pte", example_inputs=call, quantization="int8", calibration=(row for row in rows)
    )
    assert "convolution int8 3" in artifact.report()["kernels"]
    got, want = artifact(**rows[0]), module(**rows[0])
    assert isinstance(got, torch.Tensor)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_files_are_timed_side_by_side(files: dict[str, Artifact]) -> None:
    paths = [files[name].path for name in ("plain", "plain int8")]
    rows = benchmark_files(paths, batches=(1, 8), runs=2, warmup=1, threads=1).rows()
    assert [(row["target"], row["precision"], row["batch"]) for row in rows] == [
        ("executorch", precision, batch) for batch in (1, 8) for precision in ("float32", "int8")
    ]
    assert all(row["median"] > 0 and row["load"] > 0 and row["size"] > 0 for row in rows)
