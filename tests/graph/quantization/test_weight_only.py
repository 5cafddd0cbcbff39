"""Weight-only quantization: fits, torchao's tensors in the source, generate, save and load, tied and untied heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import torchopt_passes as top
from torchopt_passes._compat import integer_weight, tell_transformers
from torchopt_passes.graph.quantization import StoreIntegers

pytestmark = pytest.mark.filterwarnings("default")


def llama(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval()
    return model.to(dtype)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(seed))


def capture(model: nn.Module) -> Any:
    return top.capture(model, (), {"input_ids": tokens(2, 8)}, prove=False)


@pytest.fixture(scope="module")
def graph() -> tuple[Any, Any]:
    model = llama()
    return model, capture(model)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


CONTEXT = top.PassContext(calibration=[{"input_ids": tokens(4, 12, seed=seed)} for seed in range(3)])


@pytest.mark.parametrize("fit", ["rtn", "mse", "hqq", "gptq", "awq"])
def test_the_source_computes_what_the_plan_says(graph: Any, fit: Any) -> None:
    source, graph_module = graph
    plan = top.QuantizeWeights(bits=4, group_size=16, fit=fit).plan(graph_module, CONTEXT)
    stored = [edit for edit in plan.edits if isinstance(edit, StoreIntegers)]
    assert len(stored) == 14 and all(
        edit.group_size == 16 and 4 < edit.numbers["bits_per_weight"] <= 6 for edit in stored
    )
    assert [skip.target for skip in plan.skips] == ["model.embed_tokens.weight"] and "tied" in plan.skips[0].reason
    rounded, quantized = copy.deepcopy(source), copy.deepcopy(source)
    top.Plan(tuple(e for e in plan.edits if not isinstance(e, StoreIntegers))).apply(rounded)
    for edit in stored:
        rounded.get_parameter(edit.target).data.copy_(edit.value())
    plan.apply(quantized)
    assert type(quantized.model.layers[0].mlp.up_proj.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
    torch.testing.assert_close(logits(quantized, tokens(2, 8)), logits(rounded, tokens(2, 8)))
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    assert not torch.equal(logits(quantized, tokens(2, 8)), logits(source, tokens(2, 8)))


def test_gptq_has_the_least_error_in_the_outputs(graph: Any) -> None:
    source, graph_module = graph
    errors: dict[str, float] = {}
    held_out, expected = tokens(4, 12, seed=9), logits(source, tokens(4, 12, seed=9))
    for fit in ("rtn", "mse", "gptq"):
        quantized = copy.deepcopy(source)
        plan = top.QuantizeWeights(bits=3, group_size=32, fit=fit).plan(graph_module, CONTEXT)  # pyright: ignore
        plan.apply(quantized)
        errors[fit] = float((logits(quantized, held_out) - expected).square().mean())
        for edit in plan.edits if fit == "gptq" else ():
            assert edit.numbers["output_error"] < edit.numbers["output_error_nearest"]
    assert errors["gptq"] < 0.8 * errors["rtn"] and errors["mse"] < errors["rtn"]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4, "group_size": 32, "embeddings": True},
        {"bits": 3, "group_size": 16, "symmetric": False, "fit": "hqq"},
        {"bits": 2, "group_size": 16, "overrides": {"*.down_proj.weight": 8}},
    ],
    ids=["int8", "int4 with the embedding", "int3 real zero points", "mixed"],
)
def test_generate_save_and_load_bit_for_bit(graph: Any, options: dict[str, Any], tmp_path: Path) -> None:
    source, graph_module = graph
    model = copy.deepcopy(source)
    top.QuantizeWeights(**options).plan(graph_module).apply(model)
    ids = tokens(2, 8, seed=3)
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), text)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    before = sum(p.numel() * 4 for p in source.parameters())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < before


def test_an_untied_head_and_embedding_are_stored_when_asked() -> None:
    model = llama(tied=False)
    graph_module = capture(model)
    names = {edit.target for edit in top.QuantizeWeights().plan(graph_module).edits}
    skipped = {skip.target: skip.reason for skip in top.QuantizeWeights().plan(graph_module).skips}
    assert (
        skipped.keys() == {"lm_head.weight", "model.embed_tokens.weight"} and "head=True" in skipped["lm_head.weight"]
    )
    everything = top.QuantizeWeights(head=True, embeddings=True).plan(graph_module)
    assert {edit.target for edit in everything.edits} == names | skipped.keys() and not everything.skips
    everything.apply(model)
    assert logits(model, tokens(1, 4)).isfinite().all()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_embeddings_alone_are_stored_when_asked() -> None:
    plan = top.QuantizeWeights(linears=False, embeddings=True).plan(capture(llama(tied=False)))
    assert [edit.target for edit in plan.edits] == ["model.embed_tokens.weight"]
    assert {skip.reason for skip in plan.skips} == {"float: a linear (linears=False)"}
    with pytest.raises(top.ConfigError, match="leaves nothing"):
        top.QuantizeWeights(linears=False)


def test_a_tied_weight_is_one_weight() -> None:
    model = llama()
    graph_module = capture(model)
    plan = top.QuantizeWeights(bits=4, group_size=32, embeddings=True).plan(graph_module)
    shared = [edit for edit in plan.edits if "embed" in edit.target or "head" in edit.target]
    assert len(shared) == 1 and "tied" in shared[0].reason
    plan.apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_graph_computes_the_same_and_is_proven() -> None:
    model = llama()
    twin = copy.deepcopy(model)
    graph_module = capture(model)
    pass_ = top.QuantizeWeights(bits=4, group_size=16, symmetric=False, embeddings=True)
    result = pass_(graph_module, CONTEXT)
    assert result.report.proof.status == "proven"
    state = graph_module.state_dict()
    assert state["model.layers.0.mlp.up_proj.weight"].dtype is torch.int8
    assert state["model.layers.0.mlp.up_proj.weight_scale"].shape == (64, 2, 1)
    result.plan.apply(twin)
    torch.testing.assert_close(logits(graph_module.eval(), tokens(2, 8)), logits(twin, tokens(2, 8)))
    again = pass_(graph_module, CONTEXT)
    assert not again.modified
    assert model.lm_head.weight.dtype is torch.float32  # the source is as it was


def test_bfloat16_stays_bfloat16() -> None:
    model = llama(dtype=torch.bfloat16)
    plan = top.QuantizeWeights(bits=4, group_size=32).plan(capture(model))
    plan.apply(model)
    assert logits(model, tokens(1, 4)).dtype is torch.bfloat16


def test_what_torchao_cannot_run_stays_float_with_the_reason() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48, n_positions=16)).eval()
    plan = top.QuantizeWeights().plan(capture(gpt2))
    assert not plan.edits and any("run in linears alone" in skip.reason for skip in plan.skips)
    edit = StoreIntegers(
        target="transformer.h.0.attn.c_attn.weight",
        reason="forced",
        integers=torch.zeros(16, 48, dtype=torch.int8),
        scale=torch.ones(16, 1),
        bits=4,
    )
    with pytest.raises(top.PlanError, match=r"only nn\.Linear"):
        top.Plan((edit,)).apply(gpt2)


def test_groups_that_do_not_divide_are_reported() -> None:
    model = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 72), nn.ReLU(), nn.Linear(72, 4), nn.Softmax(-1))
    graph_module = top.capture(model.eval(), (torch.randn(2, 48),))
    plan = top.QuantizeWeights(bits=4, group_size=32).plan(graph_module)
    groups = {edit.target: edit.group_size for edit in plan.edits if isinstance(edit, StoreIntegers)}
    assert groups == {"0.weight": 16, "2.weight": 8}
    assert "no groups of 32" in plan.edits[0].reason
    assert [skip.reason for skip in plan.skips] == ["float: 72 columns have no groups of 32"]


@pytest.mark.parametrize(
    "bad",
    [
        {"integers": torch.full((2, 4), 9, dtype=torch.int8)},
        {"integers": torch.zeros(2, 4)},
        {"scale": torch.ones(2, 3)},
        {"scale": torch.ones(3, 1)},
        {"zero_point": torch.ones(2, 2)},
        {"bits": 1},
    ],
)
def test_edits_that_do_not_fit_are_refused(bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "target": "weight",
        "reason": "",
        "integers": torch.zeros(2, 4, dtype=torch.int8),
        "scale": torch.ones(2, 1),
        "bits": 4,
    }
    layer = nn.Linear(4, 2)
    elsewhere: dict[str, Any] = good | {"target": "w"}
    with pytest.raises(top.PlanError, match="no parameter"):
        top.Plan((StoreIntegers(**elsewhere),)).apply(layer)
    wrong: dict[str, Any] = good | bad
    with pytest.raises(top.PlanError):
        StoreIntegers(**wrong)
    with pytest.raises(top.PlanError, match="has shape"):
        top.Plan((StoreIntegers(**good),)).apply(nn.Linear(8, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [None, 1.0, 0.25])
def test_torchaos_tensors_give_the_values_of_their_integers(bits: int, zero: float | None) -> None:
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 16), dtype=torch.int8)
    for groups in (1, 2):
        scale = torch.rand(4, groups) + 0.1
        zero_point = None if zero is None else torch.full((4, groups), zero)
        weight = integer_weight(q, scale, zero_point, bits=bits, dtype=torch.float32)
        expected = ((q.view(4, groups, -1) - (zero or 0.0)) * scale.unsqueeze(-1)).flatten(1)
        torch.testing.assert_close(weight.dequantize(), expected)
        layer, x = nn.Linear(16, 4), torch.randn(3, 16)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        # a per-row 8-bit weight with a zero point: torchao's fast product would forget it
        torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, layer.bias), rtol=1e-4, atol=1e-4)
    assert not tell_transformers(nn.Linear(2, 2), bits, 16)


def test_bad_options_and_missing_data(graph: Any) -> None:
    _, graph_module = graph
    with pytest.raises(top.ConfigError, match="needs data"):
        top.QuantizeWeights(fit="gptq").plan(graph_module)
    with pytest.raises(top.ConfigError, match="overrides"):
        top.QuantizeWeights(overrides={"no.such": 4}).plan(graph_module)
    kept = top.QuantizeWeights().plan(graph_module, top.PassContext(skip=("model.layers.1",)))
    assert len(kept.edits) == 7 and sum("skip pattern" in skip.reason for skip in kept.skips) == 7
