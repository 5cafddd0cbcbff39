"""The folder of a pruned model is data from a stranger: what does not fit is refused, and no code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import torchopt_passes as top
from tests.graph.pruning.source_plans import bert_plan
from tests.hf_models import MODELS
from torchopt_passes.graph.pruning.pruned_files import load_pruned
from torchopt_passes.graph.pruning.pruned_record import KEY, PrunedRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruned")
    model: Any = MODELS["bert"].build()
    bert_plan(model, (1,), (0, 5), (0, 1)).apply(model)
    model.save_pretrained(path)
    return path


HEADS = "bert.encoder.layer.0.attention.self.num_attention_heads"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
HOSTILE: dict[str, Any] = {
    "no record": lambda d: d.pop(KEY),
    "record no object": lambda d: d.update({KEY: [1]}),
    "unknown part": lambda d: d[KEY].update(code="import os"),
    "missing part": lambda d: d[KEY].pop("sizes"),
    "other version": lambda d: d[KEY].update(version=2),
    "class no text": lambda d: d[KEY].update({"class": ["BertModel"]}),
    "other class": lambda d: d[KEY].update({"class": "BertModel"}),
    "class of another library": lambda d: (d[KEY].update({"class": "Popen"}), d.update(architectures=["Popen"])),
    "class no model": lambda d: (d[KEY].update({"class": "Trainer"}), d.update(architectures=["Trainer"])),
    "dotted class": lambda d: (d[KEY].update({"class": "os.system"}), d.update(architectures=["os.system"])),
    "model type unknown": lambda d: d.update(model_type="os"),
    "model type gone": lambda d: d.pop("model_type"),
    "another architecture": lambda d: d.update(model_type="gpt2"),
    "larger tensor": lambda d: d[KEY]["sizes"].update({QUERY: [999, 16]}),
    "too few dimensions": lambda d: d[KEY]["sizes"].update({QUERY: [12]}),
    "size of nothing": lambda d: d[KEY]["sizes"].update({QUERY: [0, 16]}),
    "size no integer": lambda d: d[KEY]["sizes"].update({QUERY: [12.0, 16]}),
    "size a bool": lambda d: d[KEY]["sizes"].update({QUERY: [True, 16]}),
    "size huge": lambda d: d[KEY]["sizes"].update({QUERY: [2**62, 16]}),
    "sizes no list": lambda d: d[KEY]["sizes"].update({QUERY: "12"}),
    "unlike the file": lambda d: d[KEY]["sizes"].update({QUERY: [8, 16]}),
    "left out": lambda d: d[KEY]["sizes"].pop(QUERY),
    "unknown tensor": lambda d: d[KEY]["sizes"].update({"bert.nothing": [1]}),
    "dunder tensor": lambda d: d[KEY]["sizes"].update({"__class__": [1]}),
    "unknown attribute": lambda d: d[KEY]["attributes"].update({"bert.encoder.nothing": 1}),
    "private attribute": lambda d: d[KEY]["attributes"].update({"bert._modules": 1}),
    "dunder attribute": lambda d: d[KEY]["attributes"].update({"bert.__class__": 1}),
    "attribute of no module": lambda d: d[KEY]["attributes"].update({"nothing.here": 1}),
    "attribute a method": lambda d: d[KEY]["attributes"].update({"bert.forward": 1}),
    "attribute a bool": lambda d: d[KEY]["attributes"].update({"bert.training": 1}),
    "attribute text": lambda d: d[KEY]["attributes"].update({HEADS: "3"}),
    "attribute a list": lambda d: d[KEY]["attributes"].update({HEADS: [3]}),
    "attribute negative": lambda d: d[KEY]["attributes"].update({HEADS: -3}),
    "buffer unknown": lambda d: d[KEY]["buffers"].update({"bert.nothing": {"0": [1]}}),
    "buffer in the file": lambda d: d[KEY]["buffers"].update({QUERY: {"0": [1]}}),
    "buffer beyond": lambda d: d[KEY]["buffers"].update({"bert.embeddings.position_ids": {"1": [999]}}),
    "buffer dimension": lambda d: d[KEY]["buffers"].update({"bert.embeddings.position_ids": {"7": [0]}}),
    "buffer order": lambda d: d[KEY]["buffers"].update({"bert.embeddings.position_ids": {"1": [2, 1]}}),
    "config unknown": lambda d: d[KEY]["config"].update(nothing=3),
    "config of a number": lambda d: d[KEY]["config"].update({"hidden_size.x": 3}),
    "config private": lambda d: d[KEY]["config"].update({"__class__": 3}),
}


def copied(folder: Path, to: Path) -> dict[str, Any]:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return json.loads((to / "config.json").read_text())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    data = copied(folder, tmp_path)
    HOSTILE[name](data)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(top.TorchOptError):
        load_pruned(tmp_path)


def test_what_names_code_is_left_out(folder: Path, tmp_path: Path) -> None:
    data = copied(folder, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    data["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    data["attn_implementation"] = data["_attn_implementation"] = "someone/kernel"
    data["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    load_pruned(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_or_corrupted(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    for change, says in (
        ({k: v for k, v in tensors.items() if k != QUERY}, "missing"),
        ({**tensors, "extra": torch.ones(1)}, "unexpected"),
        ({**tensors, QUERY: torch.ones(3, 16)}, "no pruned model"),
    ):
        save_file(change, weights)
        with pytest.raises(top.TorchOptError, match=says):
            load_pruned(tmp_path)
    weights.write_bytes(b"\x80\x04garbage")
    with pytest.raises(top.PlanError, match="cannot be read"):
        load_pruned(tmp_path)
    weights.unlink()
    with pytest.raises(top.PlanError, match="cannot be read"):
        load_pruned(tmp_path)
    for shard in ("../x.safetensors", "/x.safetensors", "x.bin", "gone.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QUERY: shard}}))
        with pytest.raises(top.PlanError, match=r"shards lie beside|is missing"):
            load_pruned(tmp_path)
    with pytest.raises(top.PlanError, match="cannot be read"):
        load_pruned(tmp_path / "nowhere")


def test_a_model_that_was_never_pruned(tmp_path: Path) -> None:
    model: Any = MODELS["bert"].build()
    model.save_pretrained(tmp_path)
    with pytest.raises(top.PlanError, match="from_pretrained"):
        load_pruned(tmp_path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_any_json_is_no_record(data: Any) -> None:
    with pytest.raises(top.PlanError):
        PrunedRecord.parse(data, "config.json")
