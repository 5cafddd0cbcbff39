"""QuantizationNoise: a share of the entries in training, all in eval; and QAT that keeps zeros, with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import conv_net, images, make_trainer, quantized_net, same_state, train_plain
from torchopt_passes.callbacks import (
    Callback,
    Distillation,
    KeepZeros,
    QuantizationNoise,
    QuantizationSchedule,
    attach,
)
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.capture import CapturedModule
from torchopt_passes.graph.pruning import PruneWeights
from torchopt_passes.graph.quantization import ConvertQuantized, LearnSteps
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, Noise, fake_quantizers


def test_a_share_is_rounded_in_training_and_all_in_eval() -> None:
    quantizer = FakeQuantizer(bits=4, signed=True, channel_dim=0, channels=40, momentum=1.0).train()
    w = torch.randn(40, 100, requires_grad=True)
    full = quantizer(w).detach()
    for share in (0.1, 0.5, 1.0):
        drawn = set[int]()
        for seed in range(3):
            quantizer.noise = Noise(share, seed)
            out = quantizer.train()(w)
            rounded = out == full
            assert torch.equal(out[~rounded], w[~rounded]), "what is not rounded is itself"
            assert float(rounded.float().mean()) == pytest.approx(share, abs=0.03)
            assert torch.equal(quantizer(w), out), "the same in every micro-batch of a step"
            drawn.add(hash(tuple(rounded.flatten().tolist())))
            assert torch.equal(quantizer.eval()(w), full)
        assert len(drawn) == (3 if share < 1 else 1)


def test_gradients_of_what_is_not_rounded_are_exact() -> None:
    model = quantized_net()
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [QuantizationNoise(share=0.5)], total_steps=9):
        (quantizer,) = [q for n, q in fake_quantizers(model) if "fc_weight" in n]
        w = torch.linspace(-9, 9, 24).view(3, 8).requires_grad_()
        quantizer.observe(False)
        outer = torch.randn(3, 8)
        (quantizer.train()(w) * outer).sum().backward()
        assert quantizer.noise is not None and w.grad is not None
        chosen = quantizer.noise.chosen(w)
        assert torch.equal(w.grad[~chosen], outer[~chosen]) and bool((w.grad[chosen] == 0).any()), "others may clip"
    assert all(q.noise is None for _, q in fake_quantizers(model))


def test_draws_are_a_function_of_seed_and_step() -> None:
    def run(seed: int, callback: list[Any]) -> nn.Module:
        model = quantized_net()
        torch.manual_seed(seed)  # of no importance: the callback takes nothing from the global generator
        train_plain(model, images(24), callback, steps=4)
        return model

    one, other = run(1, [QuantizationNoise(seed=5)]), run(2, [QuantizationNoise(seed=5)])
    assert same_state(one, other)
    assert not same_state(one, run(1, [QuantizationNoise(seed=6)])) and not same_state(one, run(1, [Callback()]))


def test_a_share_of_one_is_ordinary_training() -> None:
    one, other = quantized_net(), quantized_net()
    train_plain(one, images(24), [QuantizationNoise(share=1.0)], steps=4)
    train_plain(other, images(24), [Callback()], steps=4)
    assert same_state(one, other)


def test_what_does_not_fit_is_refused() -> None:
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(ConfigError, match="share must be"):
            QuantizationNoise(share=share)
    model = conv_net()
    with pytest.raises(CallbackError, match="no fake-quantized weights"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [QuantizationNoise()])


def pruned_net(learn: bool) -> CapturedModule:
    """A `ConvNet` in which half of the weights are zero, on 8-bit grids."""
    model = quantized_net(0.1)
    with torch.no_grad():
        for name in ("conv.weight", "fc.weight"):
            weight = model.get_parameter(name)
            weight.copy_(weight * (weight.abs() > weight.abs().median()))
    if learn:
        LearnSteps(method="lsq")(model)
    return model


def pqat() -> list[Callback]:
    return [
        KeepZeros(),
        QuantizationSchedule(observer_off=0.5, freeze_bn=0.7),
        QuantizationNoise(share=0.7),
        Distillation(conv_net(seed=7), alpha=0.5),
    ]


@pytest.mark.parametrize("learn", [False, True])
def test_pruned_quantized_and_taught_at_once_resumes_bit_for_bit_and_converts(learn: bool, tmp_path: Path) -> None:
    data = images(24)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "steps": 5}
    straight = pruned_net(learn)
    zeros = {n: straight.get_parameter(n) == 0 for n in ("conv.weight", "fc.weight")}
    start = {n: straight.get_parameter(n).detach().clone() for n in zeros}
    assert all(0.4 < float(z.float().mean()) <= 0.5 for z in zeros.values())
    make_trainer(straight, data, tmp_path / "run", pqat(), **saving).train()
    resumed = pruned_net(learn)
    trainer = make_trainer(resumed, data, tmp_path / "again", pqat(), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same_state(straight, resumed)
    for name, zero in zeros.items():
        weight = straight.get_parameter(name)
        assert torch.equal(weight == 0, zero) and not torch.equal(weight, start[name]), "zeros stay, the rest trains"
    report = ConvertQuantized()(straight, PassContext()).report
    assert report.proof.status == "proven"
    for name, zero in zeros.items():
        integers = straight.get_buffer(name)
        assert integers.dtype is torch.int8 and bool((integers[zero] == 0).all())


def test_pruning_comes_before_or_after_the_fake_quantizers() -> None:
    model = quantized_net()
    PruneWeights(sparsity=0.5)(model)
    train_plain(model, images(24), [KeepZeros(), QuantizationNoise()], steps=3)
    weight = model.get_parameter("fc.weight").detach()
    assert float((weight == 0).float().mean()) == 0.5
    (quantizer,) = [q for n, q in fake_quantizers(model.eval()) if "fc_weight" in n]
    assert bool((quantizer(weight)[weight == 0] == 0).all())
