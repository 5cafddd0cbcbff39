"""ClusterWeights(fit="gptq"): levels by the layer's output, against a slow reference, and in a language model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import torchopt_passes as top
from tests.graph.quantization.test_weight_only import capture, llama, logits, tokens
from torchopt_passes import ClusterWeights
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.quantization import StoreCodebook

CONTEXT = top.PassContext(calibration=[{"input_ids": tokens(16, 12, seed=seed)} for seed in range(3)])
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def graph() -> tuple[Any, Any]:
    """Return a model whose inputs are correlated, as a trained one's are: embeddings near a plane of 8 dimensions."""
    model = llama(tied=False)
    with torch.no_grad():
        plane = torch.randn(48, 8) @ torch.randn(8, 32) / 8**0.5
        model.get_input_embeddings().weight.copy_(0.02 * plane + 0.002 * torch.randn(48, 32))
    return model, capture(model)


def edits(plan: top.Plan) -> dict[str, StoreCodebook]:
    return {edit.target: edit for edit in plan.edits if isinstance(edit, StoreCodebook)}


def slow(weight: torch.Tensor, x: torch.Tensor, levels: list[torch.Tensor], size: int, keep: torch.Tensor) -> Any:
    """GPTQ of one matrix, one row at a time, in the order of the inputs' squares; `levels`: of each group of `size`.

    w_k -= (w_j - q_j) [H^-1]_jk / [H^-1]_jj over the columns that are left (Frantar et al. 2022, equation 2).
    """
    hessian = 2 * x.double().T @ x.double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    result = weight.double().clone()
    for row in range(len(weight)):
        left = list(order)
        for j in order:
            inverse = torch.linalg.inv(hessian[left][:, left])
            group = levels[row * -(-weight.shape[1] // size) + j // size] if len(levels) > 1 else levels[0]
            q = group[(group - result[row, j]).abs().argmin()] if not bool(keep[row, j]) else weight[row, j].double()
            place = left.index(j)
            result[row, left] -= (result[row, j] - q) / inverse[place, place] * inverse[place]
            result[row, j] = q
            left.remove(j)
    return result


OPTIONS: list[dict[str, Any]] = [
    {},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 12},  # 32 columns: the last group has 8
    {"grid": "log", "bits": 4},
    {"outliers": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_slow_reference_layer_by_layer(options: dict[str, Any]) -> None:
    """The second layer's inputs are those that the snapped first layer gives; zeros and outliers stay."""
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 20))
    with torch.no_grad():
        model[0].weight[torch.rand(24, 32) < 0.3] = 0
    x = torch.randn(200, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(200, 32)
    context = top.PassContext(calibration=[(x[:80],), (x[80:],)])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    every: dict[str, Any] = {"bits": 2, "min_numel": 16, "fit": "gptq", **options}
    result = ClusterWeights(**every)(top.capture(model, (x[:4],)), context)
    assert result.report.proof.status == "proven"
    found = edits(result.plan)
    inputs = x
    for fqn in ("0.weight", "2.weight"):
        edit, weight = found[fqn], weights[fqn]
        table = nn.functional.pad(edit.codebook, (1, 0)) if edit.keep_zero else edit.codebook
        keep = weight == 0
        if edit.outliers is not None:
            keep.view(-1)[edit.outliers.long()] = True
        size = edit.group_size or weight.shape[1]
        expected = slow(weight, inputs, list(table.double()), size, keep).float()
        snapped = edit.snapped()
        assert torch.equal(snapped[keep], weight[keep])
        # a value half-way between two levels may go either way in float32, and takes others of its row with it
        assert float((snapped == expected).all(1).double().mean()) >= 0.95
        error = float((inputs @ (weight - snapped).T).square().sum() / (inputs @ weight.T).square().sum())
        assert edit.numbers["output_error"] == pytest.approx(error, rel=1e-3)
        assert error < edit.numbers["output_error_nearest"] and edit.reason.endswith("GPTQ")
        inputs = torch.relu(inputs @ snapped.T + weights["0.bias"]) if fqn == "0.weight" else inputs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_outputs_of_a_llama_are_nearer_than_with_plain_k_means(graph: Any, bits: int) -> None:
    source, graph_module = graph
    errors: dict[str, float] = {}
    held_out = tokens(16, 12, seed=9)
    expected = logits(source, held_out)
    for fit in ("nearest", "gptq"):
        options: dict[str, Any] = {"bits": bits, "fit": fit, "min_numel": 256}
        plan = ClusterWeights(**options).plan(graph_module, CONTEXT)
        model = copy.deepcopy(source)
        plan.apply(model)
        errors[fit] = float((logits(model, held_out) - expected).square().mean())
        stored = edits(plan)
        assert len(stored) == 16  # 14 linears of two blocks, the head, the embedding
        rounded = {fqn for fqn, edit in stored.items() if "output_error" in edit.numbers}
        assert rounded == (stored.keys() - {"model.embed_tokens.weight"} if fit == "gptq" else set())
        for fqn in rounded:
            numbers = stored[fqn].numbers
            assert numbers["output_error"] < 0.5 * numbers["output_error_nearest"], fqn
        # packed indices and codebooks, nothing else
        held = sum(t.nbytes for name, t in model.state_dict().items() if "parametrizations" in name)
        assert held == sum(
            -(-edit.codebook.shape[0] * edit.layout.size * bits // 8) + edit.codebook.nbytes for edit in stored.values()
        )
    assert errors["gptq"] < 0.75 * errors["nearest"]


def test_generates_and_is_saved_as_the_dequantized_model(graph: Any, tmp_path: Path) -> None:
    source, graph_module = graph
    plan = ClusterWeights(bits=3, fit="gptq", granularity="channel", min_numel=256).plan(graph_module, CONTEXT)
    model, dense = copy.deepcopy(source), copy.deepcopy(source)
    plan.apply(model)
    for fqn, edit in edits(plan).items():
        dense.get_parameter(fqn).data.copy_(edit.snapped())
    ids = tokens(2, 8, seed=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = dense.generate(ids, **options)
    assert torch.equal(logits(model, ids), logits(dense, ids)) and torch.equal(model.generate(ids, **options), text)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids)) and torch.equal(again.generate(ids, **options), text)
    before = sum(p.nbytes for p in source.parameters())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < before


def test_convolutions_by_their_patches_and_the_rest_by_nearest() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3))
    x = torch.randn(6, 4, 9, 9).cumsum(-1)
    graph_module = top.capture(model, (x[:2],))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    every = ClusterWeights(bits=2, granularity="channel", fit="gptq", min_numel=16)
    found = edits(every(graph_module, top.PassContext(calibration=[(x,)])).plan)
    edit = found["0.weight"]
    assert "output_error" not in found["2.weight"].numbers  # what it multiplies is no matrix
    with torch.no_grad():
        expected = nn.functional.conv2d(x, before["0.weight"], groups=2, padding=1)
        got = nn.functional.conv2d(x, edit.snapped(), groups=2, padding=1)
    error = float((got - expected).square().sum() / expected.square().sum())
    assert edit.numbers["output_error"] == pytest.approx(error, rel=1e-4)
    assert error < 0.8 * edit.numbers["output_error_nearest"]


def test_without_data_it_is_refused(graph: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs data: PassContext\(calibration="):
        ClusterWeights(fit="gptq").plan(graph[1])
