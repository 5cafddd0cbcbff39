"""Plans on Transformers models: equal to the masked model, generate(), save_pretrained and load_pruned elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.pruning.source_plans import (
    BERT_READERS,
    GPT2_READERS,
    LLAMA_READERS,
    bert_plan,
    gpt2_plan,
    llama_plan,
    masked,
    plan_of,
    remove,
)
from tests.hf_models import MODELS
from torchopt_passes.graph.pruning.pruned_files import load_pruned

Make = Callable[[nn.Module], top.Plan]
PLANS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "bert": (lambda model: bert_plan(model, (1, 3), (0, 5, 31), (0, 1)), BERT_READERS),
    "bert_mlm": (lambda model: bert_plan(model, (0,), range(16), (1,)), BERT_READERS),
    "llama": (lambda model: llama_plan(model, 0, range(3, 20)), LLAMA_READERS),
    "mistral": (lambda model: llama_plan(model, 1, (7,)), LLAMA_READERS),
    "gpt2": (lambda model: gpt2_plan(model, (2,), range(0, 64, 3)), GPT2_READERS),
}
DECODERS = ("llama", "mistral", "gpt2")


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    model = MODELS[name].build().eval().to(dtype)
    return model, MODELS[name].case(3)[1]


@pytest.mark.parametrize("name", PLANS)
def test_logits_and_gradients_equal_the_masked_models(name: str) -> None:
    model, inputs = built(name)
    make, readers = PLANS[name]
    plan = make(model)
    reference: Any = masked(model, plan, *readers)
    before = sum(p.numel() for p in model.parameters())
    assert top.Plan.from_json(plan.to_json()).apply(model) is model
    assert sum(p.numel() for p in model.parameters()) < before
    output, expected = model(**inputs), reference(**inputs)
    assert torch.allclose(output.logits, expected.logits, rtol=1e-9, atol=1e-12 if name == "bert" else 1e-9)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate_with_its_cache_equals_the_masked_model(name: str, sampling: dict[str, Any]) -> None:
    model, inputs = built(name)
    make, readers = PLANS[name]
    plan = make(model)
    reference: Any = masked(model, plan, *readers)
    plan.apply(model)
    ids = inputs["input_ids"][:2]
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "use_cache": True,
        "pad_token_id": 0,
        **sampling,
    }
    mask = torch.ones_like(ids)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **options), reference.generate(ids, attention_mask=mask, **options)
    )


LOAD = """
import sys, torch
from torchopt_passes.graph.pruning.pruned_files import load_pruned
torch.set_num_threads(1)
model = load_pruned(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saved_and_loaded_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    model, inputs = built(name, torch.float32)
    PLANS[name][0](model).apply(model)
    model.save_pretrained(tmp_path / "model")
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / file) for file in ("model", "inputs.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(files[2], weights_only=True), model(**inputs).logits)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shards", [False, True])
def test_saved_and_loaded(name: str, shards: bool, tmp_path: Path) -> None:
    model, inputs = built(name, torch.float32)
    PLANS[name][0](model).apply(model)
    model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    loaded: Any = load_pruned(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config.name_or_path == str(tmp_path)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert [m.extra_repr() for m in loaded.modules()] == [m.extra_repr() for m in model.modules()]
    if hasattr(model, "generation_config"):
        assert loaded.generation_config == model.generation_config
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_half_precision_and_ties_come_back(tmp_path: Path) -> None:
    model, _ = built("gpt2", torch.bfloat16)
    PLANS["gpt2"][0](model).apply(model)
    model.save_pretrained(tmp_path)
    loaded: Any = load_pruned(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_pruned_three_times_trained_between_saved_and_loaded_after_each(tmp_path: Path) -> None:
    model, inputs = built("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for round_, (heads, units) in enumerate([((0,), (1, 30)), ((2,), (0,)), ((0,), (3, 9, 20))]):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plan = bert_plan(model, heads, units, (0,) if round_ == 1 else (0, 1))
        reference: Any = masked(model, plan, *BERT_READERS)
        plan.apply(model, optimizer)
        assert torch.allclose(model(**inputs).logits, reference(**inputs).logits, rtol=1e-9)
        model.save_pretrained(tmp_path / str(round_))
        loaded: Any = load_pruned(tmp_path / str(round_))
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert loaded.bert.encoder.layer[0].attention.self.num_attention_heads == 4 - round_ - 1
    plan = bert_plan(loaded, (0,), (5,), (1,))  # a loaded model is pruned on, and saved again
    plan.apply(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = load_pruned(tmp_path / "again")
    assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)


def test_transformers_alone_refuses_the_folder(tmp_path: Path) -> None:
    model, _ = built("bert", torch.float32)
    PLANS["bert"][0](model).apply(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ismatch"):
        type(model).from_pretrained(tmp_path)


def test_a_failed_plan_leaves_no_record_and_the_old_configuration(tmp_path: Path) -> None:
    model, inputs = built("llama")
    before, expected = model.config.to_dict(), model(**inputs).logits
    bad = remove("model.norm.weight", 0, (0,), 19)
    with pytest.raises(top.PlanError, match="made for 19"):
        (llama_plan(model, 0, (1,)) + plan_of(bad)).apply(model)
    assert model.config.to_dict() == before and torch.equal(model(**inputs).logits, expected)


def test_a_buffer_that_is_in_no_file_comes_back_cut(tmp_path: Path) -> None:
    """Position ids lie beside the embedding of positions, and in no state dict; removed positions leave both."""
    model, inputs = built("bert", torch.float32)
    path = "bert.embeddings"
    for size, gone in ((40, range(30, 40)), (30, (28, 29))):
        plan_of(
            remove(f"{path}.position_embeddings.weight", 0, gone, size),
            remove(f"{path}.position_ids", 1, gone, size),
            remove(f"{path}.token_type_ids", 1, gone, size),
        ).apply(model)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["torchopt_passes"]
    assert record["buffers"][f"{path}.position_ids"] == {"1": list(range(28))}
    loaded: Any = load_pruned(tmp_path)
    assert torch.equal(loaded.bert.embeddings.position_ids, model.bert.embeddings.position_ids)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_to_a_device(tmp_path: Path) -> None:
    model, _ = built("bert", torch.float32)
    PLANS["bert"][0](model).apply(model)
    model.save_pretrained(tmp_path)
    assert {p.device.type for p in load_pruned(tmp_path, device="meta").parameters()} == {"meta"}


def test_torch_attention_inside_a_transformers_model(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model: Any = SiglipVisionModel(
        SiglipVisionConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)
    ).eval()
    path = next(name for name, m in model.named_modules() if type(m) is nn.MultiheadAttention)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    packed = [16 * part + row for part in range(3) for row in rows]
    plan = plan_of(
        remove(f"{path}.in_proj_weight", 0, packed, 48),
        remove(f"{path}.in_proj_bias", 0, packed, 48),
        remove(f"{path}.out_proj.weight", 1, rows, 16),
    )
    reference: Any = masked(model, plan, "out_proj.weight")
    plan.apply(model)
    pixels = torch.randn(2, 3, 16, 16)
    output = model(pixels).pooler_output
    assert torch.allclose(output, reference(pixels).pooler_output, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded: Any = load_pruned(tmp_path)
    assert torch.equal(loaded(pixels).pooler_output, output) and loaded.get_submodule(path).num_heads == 2
