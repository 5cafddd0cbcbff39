"""GradualBits: the width is a function of the step, the range stays, and the graph ends with its own bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import collate, conv_net, images, narrow_net, quantized_net, train_plain
from torchopt_passes.callbacks import GradualBits, QuantizationSchedule, attach
from torchopt_passes.callbacks.gradual_bits import bits_at
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.quantization import ConvertQuantized
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers


@pytest.mark.parametrize(("start", "end", "wide", "narrow"), [(0, 6, 8, 5), (2, 12, 8, 2), (3, 3, 8, 4), (0, 2, 8, 3)])
def test_every_width_has_its_turn(start: int, end: int, wide: int, narrow: int) -> None:
    widths = [bits_at(step, start, end, wide, narrow) for step in range(end + 4)]
    assert widths == sorted(widths, reverse=True) and widths[:start] == [wide] * start
    assert set(widths[end:]) == {narrow} and all(narrow <= w < wide for w in widths[start:])
    if end - start >= wide - narrow:
        seen = widths[start:end]
        counts = [seen.count(bits) for bits in range(narrow, wide)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1, "each for about as many steps"


def widths_of(model: nn.Module) -> dict[str, int]:
    return {name.removeprefix("fake_quant."): q.bits for name, q in fake_quantizers(model)}


def test_widths_follow_the_schedule_and_end_where_they_began() -> None:
    model = narrow_net()
    own = widths_of(model)
    assert set(own.values()) == {4, 5}
    seen: list[dict[str, int]] = []
    callback = GradualBits(start=1, end=5)
    train_plain(model, images(24), [callback], steps=8, seen=lambda _, m: seen.append(widths_of(m)))
    for step, widths in enumerate(seen, 1):
        assert widths == {name: bits_at(step, 1, 5, 8, bits) for name, bits in own.items()}
    assert widths_of(model) == own
    result = ConvertQuantized()(model)
    assert result.report.proof.status == "proven"
    assert int(model.get_buffer("fc.weight").abs().max()) <= 7


def test_the_range_stays_when_the_width_changes() -> None:
    model = narrow_net()
    ranges = {n: (q.min_val.clone(), q.max_val.clone(), q.scale.clone()) for n, q in fake_quantizers(model)}
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualBits()], total_steps=9):
        for name, quantizer in fake_quantizers(model):
            low, high, scale = ranges[name]
            # a zero point is an integer: an end may move by half a (wide) step
            torch.testing.assert_close(quantizer.min_val, low, rtol=0, atol=float(scale.max()))
            torch.testing.assert_close(quantizer.max_val, high, rtol=0, atol=float(scale.max()))
            assert bool((quantizer.scale < scale / 3.9).all()) and int(quantizer.bit_width) == quantizer.bits == 7


def test_early_end_and_error_leave_the_own_bits() -> None:
    model = narrow_net()
    own = widths_of(model)

    def fail(step: int, trained: nn.Module) -> None:
        assert set(widths_of(trained).values()) == {8}
        raise RuntimeError(f"stop at {step}")

    with pytest.raises(RuntimeError, match="stop at 1"):
        train_plain(model, images(24), [GradualBits(start=0.5)], seen=fail)
    assert widths_of(model) == own


def test_the_width_is_part_of_the_state() -> None:
    model = narrow_net()
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualBits(start=0.5)], total_steps=9):
        state = copy.deepcopy(model.state_dict())
        batch = collate(images(4))
        expected = model.eval()(**batch).logits
    other = narrow_net()
    other.load_state_dict(state)
    assert set(widths_of(other).values()) == {8}
    assert torch.equal(other.eval()(**batch).logits, expected)


def test_weights_or_activations_alone_and_metrics() -> None:
    model = narrow_net()
    with attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualBits(start=0.5, activations=False)], total_steps=9
    ) as session:
        assert {n: b for n, b in widths_of(model).items() if n.startswith("act_")} == {
            n: 5 for n in widths_of(model) if n.startswith("act_")
        }
        assert session.metrics() == {"bits": 8.0}
    assert session.metrics() in ({}, {"bits": 4.0})


def test_it_goes_with_the_other_schedule() -> None:
    model = narrow_net()
    train_plain(model, images(24), [GradualBits(end=0.5), QuantizationSchedule(observer_off=0.6)], steps=6)
    assert set(widths_of(model).values()) == {4, 5} and not any(q.observing for _, q in fake_quantizers(model))


def test_what_does_not_fit_is_refused() -> None:
    wrong: list[dict[str, Any]] = [{"start_bits": 9}, {"start_bits": 2}, {"start": 1.5}, {"end": -1}]
    for options in wrong:
        with pytest.raises(ConfigError, match="must be"):
            GradualBits(**options)
    for model, message in ((quantized_net(), "narrower than start_bits=8"), (conv_net(), "no fake-quantizers")):
        with pytest.raises(CallbackError, match=message):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualBits()], total_steps=9)
    model = narrow_net()
    with pytest.raises(ConfigError, match="is behind end"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualBits(start=0.9)], total_steps=9)
