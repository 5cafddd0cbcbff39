"""PruneWeights against slow references and the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.models import build


def prune(model: nn.Module, inputs: tuple[torch.Tensor, ...], context: top.PassContext | None = None, **options):
    graph_module = top.capture(model, inputs)
    return graph_module, top.PruneWeights(**options)(graph_module, context)


def zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_exact_count_and_smallest_magnitudes_of_each_tensor(sparsity: float) -> None:
    model, inputs = build("conv_residual")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    prune(model, inputs, sparsity=sparsity)
    for name in ("stem.weight", "conv.weight", "depthwise.weight", "fc.weight"):
        weight = model.get_parameter(name)
        removed = int(sparsity * weight.numel() + 0.5)
        ranked = sorted(range(weight.numel()), key=lambda i: (abs(float(before[name].flatten()[i])), i))
        expected = before[name].flatten().clone()
        expected[ranked[:removed]] = 0
        assert torch.equal(weight.flatten(), expected) and zeros(weight) == removed
    for name in ("bn1.weight", "conv.bias", "fc.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_global_ranks_all_weights_together() -> None:
    model, inputs = build("conv_residual")
    model.get_parameter("fc.weight").data.mul_(100)
    prune(model, inputs, sparsity=0.5, scope="global")
    weights = [model.get_parameter(f"{n}.weight") for n in ("stem", "conv", "depthwise", "fc")]
    total = sum(w.numel() for w in weights)
    assert sum(map(zeros, weights)) == int(0.5 * total + 0.5) and zeros(weights[-1]) == 0
    kept = torch.cat([w[w != 0].abs().flatten() for w in weights])
    model2, _ = build("conv_residual")
    gone = torch.cat(
        [
            model2.get_parameter(f"{n}.weight")[w == 0].abs()
            for n, w in zip(("stem", "conv", "depthwise"), weights, strict=False)
        ]
    )
    assert kept.min() >= gone.max()


def test_threshold() -> None:
    model, inputs = build("attention")
    before = model.get_parameter("up.weight").detach().clone()
    prune(model, inputs, threshold=0.1)
    assert torch.equal(model.get_parameter("up.weight"), torch.where(before.abs() <= 0.1, 0.0, before))


def test_two_of_four_along_the_input_dimension() -> None:
    model, inputs = build("attention")
    _, result = prune(model, inputs, pattern="2:4")
    for name in ("qkv", "out", "up", "down"):
        assert bool(((model.get_parameter(f"{name}.weight").view(-1, 4) != 0).sum(1) == 2).all())
    assert all(row.numbers["sparsity"] == 0.5 for row in result.report.changed)


def test_two_of_four_of_a_direct_weight_runs_along_its_rows() -> None:
    model, inputs = build("tied_twice")
    prune(model, inputs, pattern="2:4")
    direct = model.get_parameter("direct")  # x @ direct sums over dimension 0
    assert bool(((direct.t().reshape(-1, 4) != 0).sum(1) == 2).all())


def test_pattern_that_does_not_fit_is_skipped_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    _, result = prune(model, (torch.randn(2, 6),), pattern="2:4")
    reasons = {row.target: row.reason for row in result.report.skipped}
    assert "6" in reasons["0.weight"] and zeros(model.get_parameter("0.weight")) == 0


def test_blocks_go_whole_by_mean_magnitude() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = model.get_parameter("0.weight").detach().clone()
    prune(model, (torch.randn(2, 8),), pattern="block 4x2", sparsity=0.5)
    blocks = before.abs().view(2, 4, 4, 2).mean((1, 3)).flatten()
    gone = sorted(range(8), key=lambda i: float(blocks[i]))[:4]
    kept = torch.ones(8, dtype=torch.bool)
    kept[gone] = False
    mask = kept.view(2, 1, 4, 1).expand(2, 4, 4, 2).reshape(8, 8)
    assert torch.equal(model.get_parameter("0.weight"), before * mask)


def test_random_depends_on_the_seed_alone() -> None:
    masks = []
    for seed in (0, 0, 1):
        model, inputs = build("attention")
        prune(model, inputs, top.PassContext(seed=seed), sparsity=0.5, method="random")
        masks.append(model.get_parameter("up.weight") == 0)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert int(masks[0].sum()) == masks[0].numel() // 2


def test_tied_weight_is_found_once_through_the_head() -> None:
    model, inputs = build("tied_twice")
    graph_module, result = prune(model, inputs, sparsity=0.5)
    assert [row.target for row in result.report.changed].count("embed.weight") == 1
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    assert zeros(model.get_parameter("embed.weight")) == 44
    assert not model.get_parameter("frozen.weight").requires_grad and zeros(model.get_parameter("frozen.weight")) == 32
    assert graph_module.get_parameter("embed.weight") is model.get_parameter("embed.weight")


def test_include() -> None:
    model, inputs = build("attention")
    _, result = prune(model, inputs, sparsity=0.5, include=("up", "do*"))
    assert {row.target for row in result.report.changed} == {"up.weight", "down.weight"}
    with pytest.raises(top.ConfigError, match="include pattern 'upp' matches no"):
        prune(*build("attention"), sparsity=0.5, include=("upp",))


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "x", "block", "block 0x1", "2:4:8"])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(top.ConfigError, match="pattern"):
        top.PruneWeights(pattern=pattern)
