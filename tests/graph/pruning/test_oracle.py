"""The oracle itself, against smaller models cut by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.graph.pruning.attention_blocks import Attention
from tests.graph.pruning.norms import GroupNorm, LayerNorm, ManualLayerNorm, ManualRMSNorm, RMSNorm, Spanning
from tests.graph.pruning.oracle import Removed, difference, tensors, without
from tests.graph.pruning.random_networks import randomise

MIDDLES = {
    "batch": (nn.BatchNorm2d, {1, 5}),
    "group": (lambda n: GroupNorm(2, n), {1, 5}),
    "manual layer": (ManualLayerNorm, {0, 2, 3}),
    "layer": (LayerNorm, {0, 4}),
    "rms": (RMSNorm, {0, 4}),
    "manual rms": (ManualRMSNorm, {5}),
    "softmax": (lambda n: Spanning("softmax", n), {0, 4}),
    "center": (lambda n: Spanning("center", n), {2}),
}


def cut(model: nn.Module, removed: Removed) -> nn.Module:
    """Remove indices by hand, in a float64 copy."""
    small = copy.deepcopy(model).double().eval()
    for (fqn, dim), indices in removed.items():
        owner, _, name = fqn.rpartition(".")
        tensor = tensors(small)[fqn]
        kept = [i for i in range(tensor.shape[dim]) if i not in indices]
        smaller = tensor.detach().index_select(dim, torch.tensor(kept))
        parameter = isinstance(tensor, nn.Parameter)
        setattr(small.get_submodule(owner), name, nn.Parameter(smaller) if parameter else smaller)
    return small


@pytest.mark.parametrize("name", MIDDLES)
def test_what_spans_channels_runs_on_the_kept_set(name: str) -> None:
    make, indices = MIDDLES[name]
    if name in ("batch", "group", "manual layer"):
        layers, x = (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)), torch.randn(2, 3, 5, 5).double()
    else:
        layers, x = (nn.Linear(3, 6), nn.Linear(6, 5)), torch.randn(2, 4, 3).double()
    model = randomise(nn.Sequential(layers[0], make(6), layers[1]))
    removed = {("0.weight", 0): indices, ("0.bias", 0): indices, ("2.weight", 1): indices}
    removed |= {(fqn, 0): indices for fqn, t in tensors(model).items() if fqn.startswith("1.") and t.dim()}
    small = cut(model, removed)
    for module in small.modules():
        if isinstance(module, GroupNorm):
            module.num_channels = 4
    oracle = without(model, removed)
    assert difference(oracle(x), small(x)) < 1e-12
    assert difference(copy.deepcopy(model).double().eval()(x), small(x)) > 1e-3
    del removed["2.weight", 1]  # a forgotten consumer: here its input is 0
    assert difference(without(model, removed)(x), small(x)) < 1e-12
    removed["2.weight", 1] = {(i + 1) % 6 for i in indices}  # a wrong one
    assert difference(without(model, removed)(x), small(x)) > 1e-3


def test_heads_and_features_of_attention() -> None:
    large = Attention(heads=4, features=4, scale=True, rotary="half", bias_table=True, qk_norm="rms")
    model = randomise(nn.Sequential(large.make((5, 6))))  # pyright: ignore[reportArgumentType]
    head, x = {4, 5, 6, 7}, torch.randn(2, 5, 6).double()
    removed = {(f"0.{name}.{part}", 0): head for name in "qkv" for part in ("weight", "bias")}
    removed |= {("0.out.weight", 1): head, ("0.table", 1): {1}}
    small = cut(model, removed)
    small[0].heads = small[0].kv = 3  # pyright: ignore[reportIndexIssue]
    assert difference(without(model, removed)(x), small(x)) < 1e-12

    pair = {0, 2}
    inner = {4 * head + i for head in range(4) for i in pair}
    removed = {(f"0.{name}.{part}", 0): inner for name in "qkv" for part in ("weight", "bias")}
    removed |= {("0.out.weight", 1): inner, ("0.q_norm.weight", 0): pair, ("0.k_norm.weight", 0): pair}
    removed |= {("0.cos", 1): pair, ("0.sin", 1): pair}
    small = cut(model, removed)
    small[0].features = 2  # pyright: ignore[reportIndexIssue]
    assert difference(without(model, removed)(x), small(x)) < 1e-12


def test_the_difference_is_infinite_where_outputs_do_not_match() -> None:
    x = torch.ones(2, 3)
    assert difference(x, x) == 0
    assert difference(x, x[:1]) == difference([x], [x, x]) == difference(x * torch.nan, x) == float("inf")
    assert difference(x * 1.5, x) == pytest.approx(0.5)
