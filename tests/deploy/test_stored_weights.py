"""Weights that are stored as integers stay integers in a file, and compute what the graph computes."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

import torchopt_passes as top
from torchopt_passes.deploy import export
from torchopt_passes.deploy.stored_weights import find_stored, gather_integers, matmul_nbits, multiply_packed
from torchopt_passes.graph.inference import to_inference

HIDDEN, VOCABULARY, LINEARS = 64, 256, 15


@cache
def llama() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    ids = torch.randint(0, VOCABULARY, (2, 12))
    return LlamaForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stored(**options: Any) -> fx.GraphModule:
    model, inputs = llama()
    graph = top.capture(model, kwargs=inputs, prove=False)
    top.QuantizeWeights(embeddings=True, head=True, **options)(graph, top.PassContext(prove=False))
    return graph.eval()


def call(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, VOCABULARY, (batch, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


GRIDS = [
    ({"bits": 8}, "8-bit"),
    ({"bits": 4, "group_size": 32}, "4-bit"),
    ({"bits": 4, "group_size": 16, "symmetric": False}, "4-bit"),
    ({"bits": 3, "group_size": 64, "fit": "hqq", "symmetric": False}, "4-bit"),
    ({"bits": 6, "group_size": 32, "symmetric": False}, "8-bit"),
]


@pytest.mark.parametrize(("options", "bits"), GRIDS)
@torch.no_grad()
def test_rewritten_graphs_compute_the_same(options: dict[str, Any], bits: str) -> None:
    graph = to_inference(stored(**options))
    ids, mask = call(3).values()
    (before,) = graph(ids, mask)
    assert gather_integers(graph) == {"stored as integers": "1 embeddings"}
    assert torch.equal(graph(ids, mask)[0], before)  # the same numbers in another order
    assert multiply_packed(graph) == {"packed weights": f"{LINEARS} linears"}
    torch.testing.assert_close(graph(ids, mask)[0], before, rtol=1e-5, atol=1e-6)
    assert not any(find_stored(node) for node in graph.graph.nodes)
    weights = [t for n, t in graph.state_dict().items() if n.endswith("_packed")]
    linears = sum(p.numel() for n, p in llama()[0].named_parameters() if p.ndim == 2) - VOCABULARY * HIDDEN
    assert {t.dtype for t in weights} == {torch.uint8}
    assert sum(t.numel() for t in weights) == linears * int(bits[0]) // 8


def test_a_layer_that_is_called_twice_is_packed_once() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu()) + x

    graph = top.capture(Twice().eval(), (torch.randn(3, 32),))
    top.QuantizeWeights(bits=4, group_size=16, head=True)(graph)
    inference, x = to_inference(graph.eval()), torch.randn(3, 32)
    (before,) = inference(x)
    assert multiply_packed(inference) == {"packed weights": "2 linears"}
    torch.testing.assert_close(inference(x)[0], before, rtol=1e-5, atol=1e-6)
    assert sum(t.numel() for t in inference.state_dict().values() if t.dtype is torch.uint8) == 32 * 32 // 2


def test_the_product_is_that_of_its_formula() -> None:
    """From the packed bytes, one value at a time."""
    rows, blocks, size = 3, 2, 16
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (rows, blocks, size // 2), generator=generator, dtype=torch.uint8)
    scales, zeros = torch.rand(rows, blocks, generator=generator), torch.rand(rows, blocks, generator=generator)
    x = torch.randn(2, blocks * size, generator=generator)
    for offsets in (zeros, None):
        slow = torch.zeros(2, rows)
        for row in range(rows):
            for column in range(blocks * size):
                block, place = divmod(column, size)
                byte = int(packed[row, block, place // 2])
                code = byte >> 4 if place % 2 else byte & 15
                zero = 8.0 if offsets is None else float(offsets[row, block])
                slow[:, row] += x[:, column] * (code - zero) * float(scales[row, block])
        torch.testing.assert_close(matmul_nbits(x, packed, scales, offsets, 4, size), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "bits"), GRIDS[:3])
@torch.no_grad()
def test_a_language_model_is_small_in_onnx_runtime(options: dict[str, Any], bits: str, tmp_path: Path) -> None:
    model, _ = llama()
    graph = stored(**options)
    artifact = export(graph, tmp_path / "m.onnx")
    assert artifact.metadata.layers[f"linear {bits} weights"] == LINEARS
    assert f"MatMulNBits {LINEARS}" in artifact.metadata.facts["kernels"]
    import onnx

    kept = {t.name: t for t in onnx.load(str(artifact.path)).graph.initializer}
    weights = sum(len(t.raw_data) for t in kept.values())
    embedding, linears = VOCABULARY * HIDDEN, sum(p.numel() for p in model.parameters()) - VOCABULARY * HIDDEN
    scales = linears // options.get("group_size", HIDDEN) * (1 if options.get("symmetric", True) else 2)
    assert weights < 1.1 * (embedding + linears * int(bits[0]) / 8 + 4 * scales) + 4 * embedding / 16
    for batch in (1, 8):
        inputs = call(batch)
        torch.testing.assert_close(artifact(**inputs), graph(**inputs).logits, rtol=1e-4, atol=1e-5)
    save_file(call(8), tmp_path / "in.safetensors")
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; import torchopt_passes as top;"
        "from safetensors.torch import load_file, save_file; p = Path(sys.argv[1]);"
        "y = top.open_artifact(p / 'm.onnx')(**load_file(p / 'in.safetensors'));"
        "save_file({'y': y}, p / 'out.safetensors')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["y"], artifact(**call(8)))


@torch.no_grad()
def test_int8_models_store_their_embeddings_in_int8(tmp_path: Path) -> None:
    from tests.deploy.sources import bert

    module, inputs = bert()
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    options: dict[str, Any] = {"example_inputs": inputs, "quantization": "int8", "calibration": [inputs]}
    for suffix in (".onnx", ".xml"):
        artifact = export(module, tmp_path / f"m{suffix}", **options)
        assert artifact.metadata.facts["stored as integers"] == "3 embeddings"
