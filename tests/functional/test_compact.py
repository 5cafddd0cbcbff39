"""Compact tensors: the bytes against the formula, the values bit for bit, and bytes that do not fit refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.compact import compact, expand

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2fnuz,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random(shape: tuple[int, ...], sparsity: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(7, 5, 3), (), (0, 4), (3001,)])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, sparsity: float, shape: tuple[int, ...]) -> None:
    tensor = (3 * random(shape, sparsity)).to(dtype)
    layout, parts = compact(tensor)
    again = expand(layout, parts)
    assert again.shape == tensor.shape and again.dtype == tensor.dtype
    assert torch.equal(bits(again), bits(tensor))
    assert sum(map(len, parts.values())) <= tensor.nbytes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0, float("nan"), float("inf"), 1e-42]), max_size=700))
def test_special_values_come_back(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(bits(expand(*compact(tensor))), bits(tensor))


def test_bytes_are_those_of_the_formula() -> None:
    n = 64 * 64
    layout, parts = compact(random((64, 64), 0.5))
    kept = layout.kept
    assert layout.zeros == "bitmask" and {k: len(v) for k, v in parts.items()} == {
        "positions": n / 8,
        "values": 4 * kept,
    }
    layout, parts = compact(random((64, 64), 0.95))
    where = random((64, 64), 0.95).flatten().nonzero().flatten().tolist()
    gaps = [b - a - 1 for a, b in zip([-1, *where[:-1]], where, strict=True)]
    assert layout.zeros == "gaps" and len(parts["positions"]) == sum(1 + g // 255 for g in gaps)
    clustered = torch.randint(0, 13, (64, 64), generator=torch.Generator().manual_seed(0)) / 7 - 1.05
    layout, parts = compact(clustered)
    assert (layout.zeros, layout.levels, layout.bits) == ("none", 13, 4)
    assert {k: len(v) for k, v in parts.items()} == {"levels": 13 * 4, "values": n / 2}
    both = clustered.masked_fill(random((64, 64), 0.8) == 0, 0)
    layout, parts = compact(both)
    assert layout.zeros == "bitmask" and layout.levels == 13  # the zero among the levels is no kept value
    assert len(parts["values"]) == math.ceil(layout.kept / 2)
    dense = random((64, 64))
    assert {k: len(v) for k, v in compact(dense)[1].items()} == {"values": 4 * n}


def test_long_runs_of_zeros() -> None:
    for where in ([0], [254], [255], [256], [509, 510, 511], [0, 256, 512, 1022], []):
        tensor = torch.zeros(1023)
        tensor[where] = torch.randn(len(where))
        layout, parts = compact(tensor)
        assert layout.zeros == "gaps"
        assert torch.equal(expand(layout, parts), tensor)


def test_negative_zeros_cost_one_bit_a_zero() -> None:
    mask = random((40, 50), 0.5) != 0
    weight = random((40, 50), seed=1)
    layout, parts = compact(weight * mask)  # how torch.nn.utils.prune masks
    assert layout.zeros == "bitmask" and len(parts["signs"]) == math.ceil((2000 - layout.kept) / 8)
    assert torch.equal(bits(expand(layout, parts)), bits(weight * mask))
    assert "signs" not in compact(weight.masked_fill(~mask, 0))[1]


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_bytes_that_do_not_fit_are_refused(sparsity: float) -> None:
    layout, parts = compact((random((20, 30), sparsity) * 2).round())
    assert layout.levels
    wrong = [
        (replace(layout, kept=layout.kept + 1), parts),
        (replace(layout, kept=-1), parts),
        (replace(layout, shape=(20, 31)), parts) if sparsity == 0.5 else (replace(layout, shape=(2, 3)), parts),
        (replace(layout, levels=layout.levels + 1), parts),
        (replace(layout, levels=1000), parts),
        (replace(layout, dtype=torch.float64), parts),
        (replace(layout, zeros="none"), parts),
        (layout, {k: v for k, v in parts.items() if k != "levels"}),
        (layout, {**parts, "more": parts["values"]}),
        (layout, {**parts, "values": np.append(parts["values"], np.uint8(0))}),
        (layout, {**parts, "values": np.full_like(parts["values"], 255)}),
        (layout, {**parts, "positions": np.full_like(parts["positions"], 255)}),
        (layout, {**parts, "positions": parts["positions"][:-1]}),
    ]
    for bad_layout, bad_parts in wrong:
        with pytest.raises(ConfigError):
            expand(bad_layout, bad_parts)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex128),
        torch.nn.parameter.Buffer(torch.ones(2)).as_subclass(type("Mine", (torch.Tensor,), {})),
    ],
    ids=["sparse", "meta", "complex128", "subclass"],
)
def test_what_is_no_dense_tensor_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ConfigError):
        compact(tensor)
