"""Attention in ONNX files equals torch's for every kind of mask, and is spelled so that runtimes fuse it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchopt_passes as top

pytest.importorskip("onnxruntime")
BATCH, TOKENS, HEADS, SIZE = 4, 9, 4, 8


class Attention(nn.Module):
    def __init__(self, kind: str, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.groups = kind, groups
        self.query = nn.Linear(HEADS * SIZE, HEADS * SIZE)
        self.key = nn.Linear(HEADS * SIZE, HEADS // groups * SIZE)
        self.value = nn.Linear(HEADS * SIZE, HEADS // groups * SIZE)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in parts)
        low = float("-inf") if self.kind == "infinite" else torch.finfo(x.dtype).min
        given = {"truth": mask, "infinite": torch.where(mask, 0.0, low), "lowest": torch.where(mask, 0.0, low)}
        found = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=given.get(self.kind),
            is_causal=self.kind == "causal",
            scale=0.3 if self.kind == "scaled" else None,
            enable_gqa=self.groups > 1,
        )
        return found.transpose(1, 2).flatten(2) + 0.0 * mask.float().mean()


def call() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and a mask with queries that have no key, and one sample of nothing else."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, TOKENS, HEADS * SIZE, generator=generator)
    mask = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=generator) > 0.5
    mask[1, :, 3] = False
    mask[2] = False
    return x, mask


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["truth", "infinite", "lowest", "causal", "scaled", "none"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_files_compute_what_torch_computes(target: str, kind: str, groups: int, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
        if kind == "infinite":
            pytest.skip("the runtime reads infinities of a file as the lowest number, and export refuses")
    module, inputs = Attention(kind, groups).eval(), call()
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[target]
    artifact = top.export(module, tmp_path / f"file{suffix}", target=target, example_inputs=inputs)
    with torch.no_grad():
        wanted = module(*inputs)
    torch.testing.assert_close(artifact(*inputs), wanted, rtol=0, atol=2e-6)
    if kind in ("truth", "infinite"):
        assert torch.equal(wanted[2], torch.zeros_like(wanted[2]))  # the sample without keys


def test_probabilities_are_searched_for_nothing(tmp_path: Path) -> None:
    import onnx

    module = Attention("truth", 1).eval()
    top.export(module, tmp_path / "file.onnx", example_inputs=call())
    kinds = [node.op_type for node in onnx.load(tmp_path / "file.onnx").graph.node]
    assert "IsNaN" not in kinds
    assert kinds.count("MatMul") == 5
    assert kinds.count("Softmax") == 1


def test_openvino_computes_attention_in_one_kernel(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    module = Attention("truth", 1).eval()
    kernels = top.export(module, tmp_path / "file.xml", example_inputs=call()).report()["kernels"]
    assert "Subgraph" in kernels
    assert "Softmax" not in kernels
