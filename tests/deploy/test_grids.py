"""Grids narrower than their dtype: a runtime knows the limits of uint8 and int8 alone, so the file has to clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from tests.deploy.compressed import graph_of
from torchopt_passes._compat import decomposed_ops
from torchopt_passes.deploy import export
from torchopt_passes.deploy.grids import clip_to_grids
from torchopt_passes.errors import ExportError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant


def converted(name: str, *, fold_weights: bool = True, **options: Any) -> fx.GraphModule:
    graph = graph_of(name)
    context = PassContext(calibration=[graph.meta["example_inputs"][1]])
    InsertFakeQuant(qat=False, **options)(graph, context)
    Calibrate()(graph, context)
    ConvertQuantized(fold_weights=fold_weights)(graph.eval(), context)
    return graph


@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
@pytest.mark.parametrize("bits", [4, 6])
@torch.no_grad()
def test_values_beyond_the_calibrated_range_are_clipped(tmp_path: Path, target: str, suffix: str, bits: int) -> None:
    graph = converted("plain", target=target, activation_bits=bits, reduce_range=True)
    artifact = export(graph, tmp_path / f"m{suffix}", tolerance=0.1)  # a rounding the other way is a large step here
    assert artifact.metadata.facts["clipped to narrow grids"].endswith(" values")
    far = {name: 5 * value for name, value in graph.meta["example_inputs"][1].items()}
    want, got = graph(**far), artifact(**far)
    assert isinstance(got, torch.Tensor)
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
@torch.no_grad()
def test_without_the_clip_they_are_lost(
    tmp_path: Path, target: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchopt_passes.deploy.program.clip_to_grids", lambda graph: {})
    graph = converted("plain", target=target, activation_bits=4, reduce_range=True)
    artifact = export(graph, tmp_path / f"m{suffix}", tolerance=2.0)
    far = {name: 5 * value for name, value in graph.meta["example_inputs"][1].items()}
    want, got = graph(**far), artifact(**far)
    assert isinstance(got, torch.Tensor)
    assert float((got - want).norm() / want.norm()) > 1


@pytest.mark.parametrize(
    ("options", "where"), [({"weight_bits": 12}, r"\.weight"), ({"activation_bits": 9}, "quantize")]
)
def test_grids_above_8_bits_are_refused(options: dict[str, Any], where: str, tmp_path: Path) -> None:
    graph = converted("plain", target="reference", **options)
    for suffix in (".onnx", ".pt2"):
        with pytest.raises(ExportError, match=rf"{where}.* has a grid above 8 bits.*at most 8 bits"):
            export(graph, tmp_path / f"m{suffix}")


def test_grids_as_wide_as_their_dtype_are_left_alone(tmp_path: Path) -> None:
    for target in ("onnx", "tensorrt"):
        # stored weights have no say in it: 7 bits of them do not saturate on any CPU
        artifact = export(converted("plain", target=target, reduce_range=True), tmp_path / "m.onnx", target)
        assert "clipped to narrow grids" not in artifact.metadata.facts


@pytest.mark.parametrize(
    "options",
    [
        {"target": "onnx", "weight_bits": 4, "activation_bits": 4, "fold_weights": False},
        {"target": "reference", "activation_range": "token", "activation_bits": 4, "activation_symmetric": False},
        {"target": "reference", "group_size": 8, "weight_bits": 4, "weight_symmetric": False, "fold_weights": False},
    ],
)
def test_the_clip_changes_no_value_in_torch_and_needs_no_other(options: dict[str, Any]) -> None:
    """With the limits of the rounding ops widened to those of the dtype, which is what runtimes do."""
    graph = converted("bert", **options)
    inputs = graph.meta["example_inputs"][1]
    before = graph(**inputs).logits
    assert clip_to_grids(graph)
    assert torch.equal(graph(**inputs).logits, before)
    ops = decomposed_ops()
    for node in graph.graph.nodes:
        if node.target in (ops.quantize_per_tensor.default, ops.quantize_per_channel.default):
            limits = torch.iinfo(node.args[-1])
            node.args = (*node.args[:-3], limits.min, limits.max, node.args[-1])
    graph.recompile()
    assert torch.equal(graph(**inputs).logits, before)
