"""QuantizationSchedule: ranges and batch statistics stop when they should, and stay so."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from tests.callbacks.loops import captured_net, collate, conv_net, images, quantized_net, train_plain
from torchopt_passes.callbacks import GradualPruning, QuantizationSchedule, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.masks import sparsity_of
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers


def test_ranges_and_statistics_move_until_their_moment() -> None:
    model = quantized_net()
    ranges: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def record(step: int, module: torch.nn.Module) -> None:
        ranges.append(torch.cat([q.max_val.flatten().clone() for _, q in fake_quantizers(module)]))
        means.append(module.get_buffer("bn.running_mean").clone())
        weights.append(module.get_parameter("conv.weight").detach().clone())

    train_plain(model, images(24), [QuantizationSchedule(observer_off=0.4, freeze_bn=0.6)], steps=10, seen=record)
    moved = [[not torch.equal(a, b) for a, b in itertools.pairwise(kind)] for kind in (ranges, means, weights)]
    # entry i: between step i + 1 and i + 2; the moments are steps 4 and 6
    assert moved[0] == [True] * 3 + [False] * 6
    assert moved[1] == [True] * 5 + [False] * 4
    assert moved[2] == [True] * 9


def test_frozen_statistics_are_used_in_training_and_outlast_it() -> None:
    model = quantized_net()
    train_plain(model, images(24), [QuantizationSchedule(observer_off=1, freeze_bn=2)], steps=4)
    batch = collate(images(8))
    for graph_module in (model, copy.deepcopy(model)):
        mean = graph_module.get_buffer("bn.running_mean").clone()
        train = graph_module.train()(**batch).logits
        assert torch.equal(graph_module.get_buffer("bn.running_mean"), mean)
        assert torch.equal(graph_module.eval()(**batch).logits, train)


def test_freeze_bn_none_never_freezes() -> None:
    model = quantized_net()
    train_plain(model, images(24), [QuantizationSchedule(observer_off=0, freeze_bn=None)], steps=4)
    mean = model.get_buffer("bn.running_mean").clone()
    model.train()(**collate(images(8)))
    assert not torch.equal(model.get_buffer("bn.running_mean"), mean)


def test_metrics_tell_how_many() -> None:
    model = quantized_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    count = len(list(fake_quantizers(model)))
    assert count > 2
    with attach(model, optimizer, [QuantizationSchedule(observer_off=1, freeze_bn=2)]) as session:
        found = [session.metrics()]
        for _ in range(2):
            optimizer.step()
            found.append(session.metrics())
    assert found == [
        {"observers_on": count, "bn_frozen": 0.0},
        {"observers_on": 0.0, "bn_frozen": 0.0},
        {"observers_on": 0.0, "bn_frozen": 1.0},
    ]


def test_a_pruned_model_keeps_its_zeros_while_it_is_quantized() -> None:
    model = quantized_net()
    callbacks = [QuantizationSchedule(), GradualPruning(sparsity=0.5, start=0.0, end=0.5)]
    train_plain(model, images(24), callbacks, steps=6)
    assert sparsity_of([model.get_parameter("conv.weight"), model.get_parameter("fc.weight")]) == 0.5
    hidden = [
        q(model.get_parameter("fc.weight").detach()) for name, q in fake_quantizers(model.eval()) if "fc_weight" in name
    ]
    assert sparsity_of(hidden) >= 0.5  # zero is on the grid


@pytest.mark.parametrize("build", [captured_net, conv_net])
def test_a_model_without_fake_quantizers_is_refused(build: object) -> None:
    model = build()  # type: ignore[operator]
    with pytest.raises(CallbackError, match="no fake-quantizers: capture it and run InsertFakeQuant first"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [QuantizationSchedule()], total_steps=9)


def test_wrong_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="observer_off must be"):
        QuantizationSchedule(observer_off=1.2)
    with pytest.raises(ConfigError, match="freeze_bn must be"):
        QuantizationSchedule(freeze_bn=-3)
    model = quantized_net()
    with pytest.raises(CallbackError, match="length is unknown"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [QuantizationSchedule()])
    assert not model._forward_hooks
