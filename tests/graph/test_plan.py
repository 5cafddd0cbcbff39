"""A plan file is data from a stranger: whatever is wrong with it is refused, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchopt_passes as top


def a_plan() -> top.Plan:
    mask = torch.tensor([[True, False], [False, True]])
    edit = top.MaskWeights(target="0.weight", reason="small", numbers={"removed": 2.0}, mask=mask)
    return top.Plan((edit,), (top.Skip(target="0.bias", reason="a bias"),), ({"prune_weights": {"sparsity": 0.5}},))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2))


def test_save_and_load(tmp_path: Path) -> None:
    path = a_plan().save(tmp_path / "folder")
    assert path == tmp_path / "folder" / "plan.json"
    assert top.Plan.load(path) == a_plan() == top.Plan.load(tmp_path / "folder")
    module = model()
    expected = module[0].weight.detach() * a_plan().edits[0].mask  # pyright: ignore
    assert torch.equal(top.Plan.load(path).apply(module)[0].weight, expected)


HOSTILE: dict[str, Any] = {
    "wrong name": lambda d: d["edits"][0].update(target="1.weight"),
    "a module, not a parameter": lambda d: d["edits"][0].update(target="0"),
    "empty name": lambda d: d["edits"][0].update(target=""),
    "dunder name": lambda d: d["edits"][0].update(target="__class__.__init__"),
    "unknown key": lambda d: d.update(extra=1),
    "missing key": lambda d: d.pop("skips"),
    "unknown edit key": lambda d: d["edits"][0].update(code="import os"),
    "unknown kind": lambda d: d["edits"][0].update(kind="os.system"),
    "kind no text": lambda d: d["edits"][0].update(kind=["mask_weights"]),
    "kind missing": lambda d: d["edits"][0].pop("kind"),
    "field missing": lambda d: d["edits"][0].pop("mask"),
    "wrong type": lambda d: d["edits"][0].update(reason=3),
    "mask no tensor": lambda d: d["edits"][0].update(mask=[[True, False], [False, True]]),
    "unknown tensor": lambda d: d["edits"][0].update(mask={"$tensor": "7.mask"}),
    "number NaN": lambda d: d["edits"][0]["numbers"].update(removed=float("nan")),
    "number infinite": lambda d: d["edits"][0]["numbers"].update(removed=float("inf")),
    "other version": lambda d: d.update(version=2),
    "other format": lambda d: d.update(format="pickle"),
    "edits no list": lambda d: d.update(edits={}),
    "edit no object": lambda d: d.update(edits=["x"]),
    "tensor file outside": lambda d: d["tensors"].update(file="../plan.safetensors"),
    "tensor file absolute": lambda d: d["tensors"].update(file="/etc/passwd"),
    "tensor file of another kind": lambda d: d["tensors"].update(file="plan.json"),
    "tensor file gone": lambda d: d["tensors"].update(file="other.safetensors"),
    "checksum": lambda d: d["tensors"].update(sha256="0" * 64),
    "tensors no object": lambda d: d.update(tensors="plan.safetensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plan_is_refused_with_nothing_changed(name: str, tmp_path: Path) -> None:
    path = a_plan().save(tmp_path)
    document = json.loads(path.read_text())
    HOSTILE[name](document)
    path.write_text(json.dumps(document))
    module = model()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(top.PlanError):
        top.Plan.load(path).apply(module)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(top.PlanError):
        top.Plan.from_json(text)


def test_corrupted_tensor_file(tmp_path: Path) -> None:
    path = a_plan().save(tmp_path)
    tensors = path.with_suffix(".safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(top.PlanError, match="checksum"):
        top.Plan.load(path)
    tensors.unlink()
    with pytest.raises(top.PlanError, match="not beside"):
        top.Plan.load(path)


def test_symlinked_tensor_file_is_refused(tmp_path: Path) -> None:
    path = a_plan().save(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere.safetensors"
    path.with_suffix(".safetensors").rename(elsewhere)
    path.with_suffix(".safetensors").symlink_to(elsewhere)
    with pytest.raises(top.PlanError, match="not beside"):
        top.Plan.load(path)


@pytest.mark.parametrize("where", ["../plan.safetensors", "{parent}/plan.safetensors"])
def test_a_good_tensor_file_outside_the_folder_is_refused(where: str, tmp_path: Path) -> None:
    path = a_plan().save(tmp_path / "inside")
    path.with_suffix(".safetensors").rename(tmp_path / "plan.safetensors")
    document = json.loads(path.read_text())
    document["tensors"]["file"] = where.format(parent=tmp_path)
    path.write_text(json.dumps(document))
    with pytest.raises(top.PlanError, match="must lie beside"):
        top.Plan.load(path)


def test_wrong_shape_is_refused_before_anything_changes() -> None:
    good, module = a_plan().edits[0], nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    bad = top.MaskWeights(target="1.weight", reason="", mask=torch.ones(2, 2, dtype=torch.bool))
    before = module[0].weight.detach().clone()
    with pytest.raises(top.PlanError, match=r"shape \(3, 3\)"):
        top.Plan((good, bad)).apply(module)
    assert torch.equal(module[0].weight, before)


def test_float_mask_is_refused() -> None:
    with pytest.raises(top.PlanError, match="must be bool"):
        top.MaskWeights(target="x", reason="", mask=torch.ones(2))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_any_json_is_refused_with_a_plan_error(document: Any) -> None:
    with pytest.raises(top.PlanError):
        top.Plan.from_json(json.dumps(document))


def test_plans_add_up() -> None:
    both = a_plan() + a_plan()
    assert len(both.edits) == 2 and len(both.skips) == 2 and bool(both) and not bool(top.Plan())
    assert top.Plan.from_json(both.to_json(), both.tensors()) == both
