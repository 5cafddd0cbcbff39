"""The choice of bits against trying every choice, and the pass that it gives."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.models import build, tokens
from tests.search.models import bert, conv_net, fragile
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers
from torchopt_passes.search.mixed_precision import BitChoice, choose_bits
from torchopt_passes.search.sensitivity import Sensitivity, measure_sensitivity
from torchopt_passes.show.tables import report_table


@pytest.fixture(scope="module")
def conv_table() -> Sensitivity:
    return measure_sensitivity(*conv_net(), bits=(2, 4, 8))


def bytes_of(bits: tuple[int, ...]) -> int:
    """By hand: stem 216 values, conv 576, depthwise 72, fc 40; channels 8, 8, 8, 5; the rest in float32."""
    values, channels = (216, 576, 72, 40), (8, 8, 8, 5)
    rest = 4 * (2 * 4 * 8 + 8 + 8 + 5) + 2 * 8  # two batch norms and their int64 counters, three biases
    return rest + sum(math.ceil(v * b / 8) + 4 * c for v, b, c in zip(values, bits, channels, strict=True))


def test_equals_brute_force_under_a_size(conv_table: Sensitivity) -> None:
    graph_module, context = conv_net()
    names = ["stem.weight", "conv.weight", "depthwise.weight", "fc.weight"]
    for budget in (750, 900, 1000, 1200, 1400):
        choice = choose_bits(graph_module, context, size=budget, sensitivity=conv_table)
        every: list[tuple[int, ...]] = list(itertools.product((2, 4, 8), repeat=4))
        kept = [c for c in every if bytes_of(c) <= budget]
        costs = {c: sum(conv_table.cost(n, (b, 8)) for n, b in zip(names, c, strict=True)) for c in kept}
        chosen = tuple(row.weight_bits for row in choice.layers)
        assert chosen == min(costs, key=lambda c: costs[c])
        assert choice.totals["cost"] == pytest.approx(costs[chosen])
        assert choice.totals["bytes"] == bytes_of(chosen) <= budget
    with pytest.raises(ConfigError, match=rf"least that can be reached is {bytes_of((2, 2, 2, 2))}"):
        choose_bits(graph_module, context, size=600, sensitivity=conv_table)


def test_bitops_and_latency(conv_table: Sensitivity) -> None:
    graph_module, context = conv_net()
    macs = (144 * 216, 144 * 576, 144 * 72, 40)  # 12 x 12 positions
    names = ["stem.weight", "conv.weight", "depthwise.weight", "fc.weight"]
    everything = 64 * sum(macs)
    choice = choose_bits(graph_module, context, bitops=0.55, sensitivity=conv_table)
    spent = {c: sum(m * b * 8 for m, b in zip(macs, c, strict=True)) for c in itertools.product((2, 4, 8), repeat=4)}
    kept = [c for c, bitops in spent.items() if bitops <= 0.55 * everything]
    best = min(kept, key=lambda c: sum(conv_table.cost(n, (b, 8)) for n, b in zip(names, c, strict=True)))
    assert tuple(row.weight_bits for row in choice.layers) == best
    assert choice.totals["bitops"] == spent[best]
    table = {"conv.weight": {2: 1.0, 4: 2.0, 8: 5.0}}
    for budget, bits in ((1.5, 2), (4.9, 4), (5.0, 8)):
        choice = choose_bits(
            graph_module, context, latency=table, latency_budget=budget, size=1.0, sensitivity=conv_table
        )
        assert [row.weight_bits for row in choice.layers] == [8, bits, 8, 8]
    with pytest.raises(ConfigError, match=r"'conv\.weight' has no figure for \[4, 8\] bits"):
        choose_bits(
            graph_module, context, latency={"conv.weight": {2: 1.0}}, latency_budget=1.0, sensitivity=conv_table
        )


def test_the_pass_gives_each_layer_its_bits(conv_table: Sensitivity) -> None:
    graph_module, context = conv_net()
    choice = choose_bits(graph_module, context, size=1000, sensitivity=conv_table)
    prepared = copy.deepcopy(graph_module)
    choice.insert_fake_quant(qat=False)(prepared, context)
    Calibrate(method="minmax")(prepared, context)
    bits = {name: quantizer.bits for name, quantizer in fake_quantizers(prepared)}
    assert len({row.weight_bits for row in choice.layers}) > 1
    for row in choice.layers:
        assert bits[f"fake_quant.{row.layer.replace('.', '_')}"] == row.weight_bits
    assert BitChoice.from_json(choice.to_json()) == choice
    for text in ("{", "{}"):
        with pytest.raises(ConfigError):
            BitChoice.from_json(text)
    reasons = {row.layer: row.reason for row in choice.layers}
    widest = next(row.layer for row in choice.layers if row.weight_bits == 8)
    assert reasons[widest].startswith("4 bits would add")
    narrow = next(row.layer for row in choice.layers if row.weight_bits < 8)
    assert "bytes more, and" in reasons[narrow]
    text = report_table(choice.report).text()
    assert "stem.weight" in text and "inputs 8" in text


def test_the_fragile_layer_gets_more_bits() -> None:
    graph_module, context = fragile()
    for by in ("sqnr", "leave_one_out"):
        choice = choose_bits(graph_module, context, bits=(4, 8), size=0.29, sensitivity=by)
        bits = {row.layer: row.weight_bits for row in choice.layers}
        assert bits["layers.2.weight"] == 8, by
        assert 4 in bits.values()


def test_bert_under_a_size_with_float_allowed(tmp_path: Path) -> None:
    graph_module, context = bert()
    state = tmp_path / "state.json"
    choice = choose_bits(graph_module, context, bits=(4, 8, 32), size=0.75, state=state)
    again = choose_bits(graph_module, context, bits=(4, 8, 32), size=0.75, state=state)
    assert again == choice
    assert choice.totals["bytes"] <= choice.totals["bytes_budget"]
    assert any("scaled_dot_product" in skip.reason or "product of two" in skip.reason for skip in choice.left)
    assert {row.weight_bits for row in choice.layers} >= {8, 32}
    prepared = copy.deepcopy(graph_module)
    result = choice.insert_fake_quant(qat=False)(prepared, context)
    floats = {skip.target for skip in result.plan.skips if "gives" in skip.reason}
    assert floats == {row.layer for row in choice.layers if row.weight_bits == 32}


def test_a_weight_that_an_embedding_reads_stays_stored_in_float() -> None:
    model, _ = build("tied_twice")
    graph_module = top.capture(model.eval(), tokens()).eval()
    context = top.PassContext(calibration=[tokens()])
    choice = choose_bits(graph_module, context, bits=(8,), size=2.0e4)
    bytes_by_layer = {row.layer: row.numbers["bytes"] for row in choice.layers}
    assert bytes_by_layer["embed.weight"] == 11 * 8 + 4 * 11 + 4 * 88  # int8, scales, and float for the embedding
    assert bytes_by_layer["block.weight"] == 64 + 4 * 8  # called twice, stored once


def test_products_and_activation_bits_that_follow() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) @ self.b(x).transpose(1, 2)

    x = torch.randn(2, 5, 8)
    graph_module = top.capture(Product().eval(), (x,)).eval()
    context = top.PassContext(calibration=[x])
    insert = InsertFakeQuant(target="onnx")
    choice = choose_bits(graph_module, context, bits=(4, 8), activation_bits=None, bitops=0.6, insert=insert)
    assert [(row.has_weight, row.weight_bits == row.activation_bits) for row in choice.layers] == [
        (True, True),
        (True, True),
        (False, True),
    ]
    macs = (5 * 64, 5 * 64, 25 * 8)
    spent = sum(m * row.weight_bits**2 for m, row in zip(macs, choice.layers, strict=True))
    assert choice.totals["bitops"] == spent <= 0.6 * 64 * sum(macs)
    prepared = copy.deepcopy(graph_module)
    result = choice.insert_fake_quant(qat=False)(prepared, context)
    assert result.report.proof.status == "proven"
    bits = {name: quantizer.bits for name, quantizer in fake_quantizers(prepared)}
    assert {bits["fake_quant.a_weight"], bits["fake_quant.b_weight"]} == {r.weight_bits for r in choice.layers[:2]}


def test_without_a_budget() -> None:
    graph_module, context = fragile()
    with pytest.raises(ConfigError, match="needs a budget"):
        choose_bits(graph_module, context)
    with pytest.raises(ConfigError, match="go together"):
        choose_bits(graph_module, context, latency={}, size=0.5)
