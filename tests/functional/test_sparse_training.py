"""The maths of sparsity over time against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.dynamic_sparsity import drop_and_grow, drop_fraction
from torchopt_passes.functional.layer_sparsities import erdos_renyi, layer_sparsities, uniform
from torchopt_passes.functional.mask_rules import MaskRule
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.functional.network_surgery import surgery_limits, surgery_mask
from torchopt_passes.functional.weight_scores import movement_gradient, sensitivity, soft_movement_gradient

SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=6)


@given(SHAPES, st.integers(0, 20).map(lambda k: k / 20))
def test_erdos_renyi_keeps_the_total_and_the_proportions(shapes: list[list[int]], sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    densities = [1.0 - s for s in erdos_renyi(shapes, sparsity)]
    kept = sum(d * size for d, size in zip(densities, sizes, strict=True))
    assert kept == pytest.approx((1 - sparsity) * sum(sizes), abs=1e-6)
    thin = [(d, r) for d, r in zip(densities, raw, strict=True) if d < 1.0 - 1e-9]
    scales = [d / r for d, r in thin]
    assert max(scales, default=0.0) - min(scales, default=0.0) < 1e-9
    # a dense weight is one whose share would be more than dense
    assert all(not thin or scales[0] * r >= 1.0 - 1e-6 for d, r in zip(densities, raw, strict=True) if d >= 1.0 - 1e-9)


@given(SHAPES)
def test_a_sparser_model_has_no_denser_weight(shapes: list[list[int]]) -> None:
    previous = [0.0] * len(shapes)
    for sparsity in (0.1, 0.3, 0.5, 0.9, 1.0):
        found = erdos_renyi(shapes, sparsity)
        assert all(new >= old - 1e-9 for new, old in zip(found, previous, strict=True))
        previous = found


def test_other_scopes() -> None:
    assert uniform([(3,), (4,)], 0.5) == layer_sparsities("uniform", [(3,), (4,)], 0.5) == [0.0, 0.5]
    with pytest.raises(ConfigError, match="no sparsity of single weights"):
        layer_sparsities("global", [(3,)], 0.5)


@settings(max_examples=40)
@given(
    st.sampled_from(["tensor", "global", "uniform", "erk"]),
    st.sampled_from(["", "block 2x2"]),
    st.integers(0, 10).map(lambda k: k / 10),
    st.integers(0, 100),
)
def test_a_rule_removes_as_many_as_it_says(scope: str, pattern: str, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (4, 6)), ("b", (2, 2, 3, 2)))}
    rule = MaskRule(scope, pattern)
    found = rule.masks(scores, sparsity)
    assert sum(int((~mask).sum()) for mask in found.values()) == rule.removed([(4, 6), (2, 2, 3, 2)], sparsity)
    if scope == "global" and not pattern:
        kept = [float(v) for name in scores for v in scores[name][found[name]]]
        gone = [float(v) for name in scores for v in scores[name][~found[name]]]
        assert not kept or not gone or max(gone) <= min(kept)
    if pattern:
        for mask in found.values():
            tiles = mask.flatten(1).unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))
            assert set(tiles.flatten().tolist()) <= {0, 4}


def test_drop_fraction_is_the_cosine() -> None:
    for step in range(101):
        assert drop_fraction(step, 100, 0.3) == pytest.approx(0.15 * (1 + math.cos(math.pi * step / 100)))
    assert drop_fraction(101, 100, 0.3) == 0.0


def slow_exchange(
    kept: list[float], growth: list[float], mask: list[bool], fraction: float
) -> tuple[list[bool], list[bool]]:
    """RigL, algorithm 1: drop the k lowest active ones, then grow the k highest of all that are not active now."""
    active = [i for i, on in enumerate(mask) if on]
    count = math.floor(fraction * len(active))
    stay = sorted(active, key=lambda i: (kept[i], i))[count:]
    candidates = sorted((i for i in range(len(mask)) if i not in stay), key=lambda i: (-growth[i], i))
    new = [i in stay or i in candidates[:count] for i in range(len(mask))]
    return new, [on and not before for on, before in zip(new, mask, strict=True)]


@given(st.data())
def test_drop_and_grow_is_the_slow_exchange(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 14))
    numbers = st.lists(st.integers(0, 4).map(float), min_size=n, max_size=n)
    kept, growth = data.draw(numbers), data.draw(numbers)
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    fraction = data.draw(st.integers(0, 8)) / 8
    new, grown = drop_and_grow(torch.tensor(kept), torch.tensor(growth), torch.tensor(mask), fraction)
    assert (new.tolist(), grown.tolist()) == slow_exchange(kept, growth, mask, fraction)
    assert int(new.sum()) == sum(mask)


def test_a_share_to_drop_that_is_none() -> None:
    ones = torch.ones(2)
    with pytest.raises(ConfigError, match="must be in"):
        drop_and_grow(ones, ones, ones.bool(), 1.1)


@given(st.lists(st.integers(-9, 9).map(lambda k: k / 4), min_size=2, max_size=20), st.integers(0, 2**20))
def test_surgery_is_the_three_cases_of_the_paper(values: list[float], bits: int) -> None:
    weight = torch.tensor(values)
    mask = torch.tensor([bool(bits >> i & 1) for i in range(len(values))])
    magnitudes = [abs(v) for v in values]
    mean = sum(magnitudes) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in magnitudes) / (len(values) - 1))
    low, high = surgery_limits(weight, 0.5, 0.9, 1.1)
    assert (low, high) == (pytest.approx(0.9 * (mean + 0.5 * spread)), pytest.approx(1.1 * (mean + 0.5 * spread)))
    expected = [
        False if v < low else bool(old) if v < high else True for v, old in zip(magnitudes, mask.tolist(), strict=True)
    ]
    assert surgery_mask(weight, mask, low, high).tolist() == expected


def test_surgery_limits_are_not_negative_and_in_order() -> None:
    assert surgery_limits(torch.tensor([1.0, 1.0, 4.0]), -3.0, 0.9, 1.1) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="0 < low <= high"):
        surgery_limits(torch.ones(2), 0.5, 1.1, 0.9)


def test_movement_and_sensitivity_are_derivatives() -> None:
    """By a soft mask m at m = 1: d loss(w * m) / dm."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    inputs = torch.randn(5, 4, generator=generator)
    factor = torch.ones(3, 4, requires_grad=True)
    masked = weight * factor
    masked.retain_grad()
    (inputs @ masked.T).tanh().sum().backward()
    assert masked.grad is not None
    assert factor.grad is not None
    assert torch.allclose(sensitivity(weight, masked.grad), factor.grad)
    assert torch.allclose(movement_gradient(weight, masked.grad), factor.grad)
    scores = torch.randn(3, 4, generator=generator, requires_grad=True)
    (7.0 * scores.sigmoid().mean()).backward()
    assert scores.grad is not None
    found = soft_movement_gradient(scores.detach(), weight, masked.grad, 7.0)
    assert torch.allclose(found, factor.grad + scores.grad)


def test_rules_that_are_none() -> None:
    with pytest.raises(ConfigError, match="scope must be one of"):
        MaskRule("layer")
    with pytest.raises(ConfigError, match="pattern must be"):
        MaskRule("tensor", "4:2")
    with pytest.raises(ConfigError, match="same share in each weight"):
        MaskRule("erk", "2:4")
    with pytest.raises(ConfigError, match="one input dimension"):
        MaskRule("tensor", "2:4").masks({"a": torch.ones(4, 4)}, 0.5)
    assert MaskRule("tensor", "2:4").share == 0.5
    assert MaskRule("tensor").removed([(10,)], 0.55) == removed_count(0.55, 10)
