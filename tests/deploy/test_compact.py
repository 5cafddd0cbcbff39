"""Compact files: exact, small by the numbers, whole or not there, and refused when damaged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import torchopt_passes as top
from tests.deploy.sources import Cnn, get
from torchopt_passes.deploy import compact as compact_module
from torchopt_passes.deploy import compact_file
from torchopt_passes.errors import ConfigError, ExportError, MissingExtraError, VerificationError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a)


def pruned(sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = Cnn()
    graph = top.capture(model, (torch.randn(2, 3, 16, 16),))
    top.PruneWeights(sparsity=sparsity)(graph)
    return model


@pytest.mark.parametrize("compression", ["none", "zlib"])
@pytest.mark.parametrize(("sparsity", "bits_a_weight"), [(0.5, 17.0), (0.8, 7.4), (0.95, 2.0)])
def test_sparse_weights_take_the_room_of_what_is_left(
    tmp_path: Path, sparsity: float, bits_a_weight: float, compression: compact_file.Compression
) -> None:
    model = pruned(sparsity)
    report = top.save_compact(model, tmp_path / "model.compact", compression=compression)
    weights = [row for row in report.tensors if row.name.endswith("weight") and row.name != "c1.weight"]
    plain = 8 * sum(row.plain for row in weights) / sum(row.dense / 4 for row in weights)
    # 32 bits a value that is left, and 1 bit a weight or 8 bits a value for where it is
    assert plain == pytest.approx(bits_a_weight, rel=0.03)
    assert report.size == (tmp_path / "model.compact").stat().st_size < report.dense * (bits_a_weight + 1) / 32 + 6000
    assert_same(top.read_compact(report.path), model.state_dict())
    torch.manual_seed(1)
    other = Cnn()
    parameters = list(other.parameters())
    assert top.load_compact(report.path, other) is other
    assert_same(other.state_dict(), model.state_dict())
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))


def test_clustered_weights_take_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cnn()
    graph = top.capture(model, (torch.randn(2, 3, 16, 16),))
    top.ClusterWeights(bits=4)(graph)
    snapped = {name: value for name, value in graph.state_dict().items() if value.is_floating_point()}
    report = top.save_compact(graph.state_dict(), tmp_path / "a.compact", compression="none")
    assert_same(top.read_compact(report.path), dict(graph.state_dict()))
    total = sum(p.numel() for n, p in Cnn().named_parameters() if n.endswith("weight"))
    assert snapped and report.plain < 0.55 * total + 5000
    # a user's own snapped floats, no codebook of ours
    levels = torch.randn(16)
    own = {"w": levels[torch.randint(0, 16, (64, 64))]}
    row = top.save_compact(own, tmp_path / "b.compact", compression="none").tensors[0]
    assert (row.layout, row.plain) == ("dense, 16 levels", 64 * 64 // 2 + 16 * 4)
    assert_same(top.read_compact(tmp_path / "b.compact"), own)


def test_two_of_four_compresses_below_its_bitmask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 128)
    graph = top.capture(model, (torch.randn(2, 256),))
    top.PruneWeights(pattern="2:4")(graph)
    report = top.save_compact(model, tmp_path / "m", compression="zlib")
    row = next(row for row in report.tensors if row.name == "weight")
    assert row.plain == 128 * 256 // 2 * 4 + 128 * 256 // 8
    runs = compact_file.read_manifest(tmp_path / "m")["tensors"]["weight"]["parts"]
    # six patterns of 4 bits: log2(6) / 4 = 0.65 bits a weight and no compressor gets below
    assert 0.64 < runs["positions"]["stored"] / runs["positions"]["bytes"] < 0.8


def test_a_captured_graph_loads_in_a_fresh_process_without_the_models_code(tmp_path: Path) -> None:
    shared, inputs = get("bert")
    source = copy.deepcopy(shared).eval()
    graph = top.capture(source, kwargs=inputs)
    top.PruneWeights(sparsity=0.8)(graph)
    expected = graph(**inputs)["logits"]
    report = top.save_compact(graph, tmp_path / "bert.compact")
    torch.save({"inputs": inputs, "logits": expected.detach()}, tmp_path / "call.pt")
    code = (
        "import sys, torch, torchopt_passes as top;"
        f"graph = top.load_compact({str(report.path)!r});"
        f"call = torch.load({str(tmp_path / 'call.pt')!r}, weights_only=True);"
        "sys.exit(0 if torch.equal(graph(**call['inputs'])['logits'], call['logits']) else 'differs')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = top.load_compact(report.path)
    assert not again.training
    assert_same(again.state_dict(), graph.state_dict())
    assert_same(top.read_compact(report.path), graph.state_dict())
    assert_same(top.load_compact(report.path, copy.deepcopy(source)).state_dict(), graph.state_dict())
    assert {row.name for row in report.tensors} >= {n for n, _ in source.named_parameters()}


def test_ties_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.register_buffer("rows", self.a.weight.detach()[:3])

    model = Tied()
    report = top.save_compact(model, tmp_path / "m", compression="none")
    assert sorted(row.name for row in report.tensors) == ["a.bias", "a.weight", "b.bias", "rows"]
    state = top.read_compact(tmp_path / "m")
    assert state["a.weight"] is state["b.weight"]
    assert_same(state, model.state_dict())


def test_zstd_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(0.8)
    try:
        import zstandard  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"torchopt_passes\[zstd\]"):
            top.save_compact(model, tmp_path / "m", compression="zstd")
        assert list(tmp_path.iterdir()) == []
        return
    top.save_compact(model, tmp_path / "m", compression="zstd")
    assert_same(top.read_compact(tmp_path / "m"), model.state_dict())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"torchopt_passes\[zstd\]"):
        top.read_compact(tmp_path / "m")


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"w": torch.randn(9, 9).masked_fill(torch.rand(9, 9) < 0.7, 0), "i": torch.arange(5)}
    path = tmp_path / "m"
    top.save_compact(state, path)
    whole = path.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            assert_same(top.read_compact(path), state)
        except ExportError:
            noticed += 1
    assert noticed > 0.9 * len(range(0, len(whole), 3))
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError):
            top.read_compact(path)
        with pytest.raises(ExportError):
            top.compact_report(path)


def test_a_manifest_made_by_hand_gets_no_further_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m"
    top.save_compact({"w": torch.zeros(1000).index_fill(0, torch.tensor([3]), 1.0)}, path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for change, says in (
        ({"shape": [1000000, 1000000]}, "damaged"),
        ({"dtype": "load"}, "no dtype"),
        ({"zeros": "magic"}, "damaged"),
        ({"kept": -1}, "damaged"),
    ):
        manifest = json.loads(header["torchopt_passes.compact"])
        manifest["tensors"]["w"] |= change
        text = json.dumps(manifest)
        fields = {"torchopt_passes.compact": text, "sha256": compact_file._sha256(text.encode())}
        save_file(tensors, path, fields)
        with pytest.raises(ExportError, match=says):
            top.read_compact(path)
    save_file(tensors, path)
    with pytest.raises(ExportError, match="plain safetensors"):
        top.read_compact(path)


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    top.save_compact({"w": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"w cannot be written"):
        top.save_compact({"w": torch.ones(3, device="meta")}, path)
    with pytest.raises(ExportError, match="not a tensor"):
        top.save_compact({"_extra_state": 3}, path)  # type: ignore[dict-item]
    with pytest.raises(ExportError, match="make it first"):
        top.save_compact({"w": torch.ones(3)}, tmp_path / "no" / "m")
    with pytest.raises(ConfigError, match="compression"):
        top.save_compact({"w": torch.ones(3)}, path, compression="rar")  # type: ignore[arg-type]
    monkeypatch.setattr(compact_module, "read_tensors", lambda _: ({"w": torch.zeros(3)}, {}))
    with pytest.raises(VerificationError, match="was not read back"):
        top.save_compact({"w": torch.ones(3)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m"
    top.save_compact(nn.Linear(3, 2), path)
    for model, says in (
        (nn.Linear(3, 4), r"weight is torch.float32 \(2, 3\) in m, torch.float32 \(4, 3\)"),
        (nn.Linear(3, 2, dtype=torch.float64), "weight is torch.float32"),
        (nn.Linear(3, 2, bias=False), "which Linear has not"),
        (nn.Sequential(nn.Linear(3, 2)), "which Sequential has"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ExportError, match=says):
            top.load_compact(path, model)
        assert_same(before, model.state_dict())
    with pytest.raises(ConfigError, match="weights alone"):
        top.load_compact(path)
    with pytest.raises(ExportError, match="no file"):
        top.load_compact(tmp_path / "none")


def test_plain_safetensors_tools_see_the_runs(tmp_path: Path) -> None:
    report = top.save_compact({"w": torch.eye(64)}, tmp_path / "m.safetensors", compression="none")
    with safe_open(report.path, "pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert parts["0.values"].dtype == torch.uint8
    assert "dense" in str(report) and report.rows()[0]["dense"] == 64 * 64 * 4
