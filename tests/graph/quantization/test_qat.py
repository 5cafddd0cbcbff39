"""Fake-quant in training: off it is the float model, on it rounds the folded weight; state is saved exactly."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import quantizers
from tests.models import build, images
from torchopt_passes.functional.affine import affine_qparams, dequantize, min_max, quantize
from torchopt_passes.graph.quantization import ConvertQuantized, InsertFakeQuant, set_fake_quant, set_observers
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer


class ConvBN(nn.Module):
    def __init__(self, eps: float, momentum: float | None, p: float, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(6, eps=eps, momentum=momentum)
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(6, 4)
        nn.init.constant_(self.bn.running_var, 2e-4)  # tiny: a wrong eps shows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


@pytest.mark.parametrize(
    ("eps", "momentum", "p", "bias"),
    [*itertools.product([1e-5, 1e-3, 0.1], [0.01, 0.1], [0.0, 0.2], [True]), (1e-3, 0.3, 0.5, False)],
)
def test_fake_quant_off_is_the_float_model(eps: float, momentum: float, p: float, bias: bool) -> None:
    source = ConvBN(eps, momentum, p, bias)
    x = torch.randn(5, 3, 8, 8)
    graph_module = top.capture(copy.deepcopy(source), (x,))
    InsertFakeQuant()(graph_module)
    set_fake_quant(graph_module, False)
    set_observers(graph_module, False)
    for training in (True, False, True):  # there and back: momentum, eps and p stay what they are
        source.train(training)
        graph_module.train(training)
        results = []
        for module in (source, graph_module):
            torch.manual_seed(1)
            module.zero_grad()
            out = module(x)
            out.square().sum().backward()
            results.append((out.detach(), {n: q.grad for n, q in module.named_parameters()}))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
        for name, grad in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], grad, rtol=1e-5, atol=1e-6)
        for name, buffer in source.named_buffers():
            torch.testing.assert_close(graph_module.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)


def test_the_rounded_weight_is_that_of_the_folded_convolution() -> None:
    source = ConvBN(1e-3, 0.1, 0.0, False)
    nn.init.uniform_(source.bn.weight, -1, 1)
    with torch.no_grad():
        source.bn.weight[2] = 0  # a dead channel must not divide by zero
    graph_module = top.capture(source, (torch.randn(2, 3, 8, 8),))
    InsertFakeQuant()(graph_module)
    quantizer = quantizers(graph_module)["conv_weight"].train()
    got = quantizer(source.conv.weight, source.bn.weight, source.bn.running_var)
    scale = source.bn.weight / (source.bn.running_var + 1e-3).sqrt()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None, None, None]
    folded = (source.conv.weight * scale).detach()
    step, zero = affine_qparams(*min_max(folded, 0), -127, 127, symmetric=True)
    expected = dequantize(quantize(folded, step, zero, -127, 127, 0), step, zero, 0) / scale
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert torch.isfinite(source.conv.weight.grad).all() and torch.isfinite(source.bn.weight.grad).all()


def test_trained_graph_converts_and_eval_learns_nothing() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs).train()
    InsertFakeQuant(target="onnx")(graph_module)
    source, _ = build("conv_residual")
    losses: list[list[float]] = []
    for module in (graph_module, source.train()):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        losses.append([])
        for step in range(6):
            torch.manual_seed(step)  # the same dropout on both
            optimizer.zero_grad()
            loss = module(*images(4)).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    for rounded, exact in zip(*losses, strict=True):
        assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)
    graph_module.eval()
    before = {n: t.clone() for n, t in graph_module.state_dict().items()}
    graph_module(*images(7))
    assert all(torch.equal(before[n], t) for n, t in graph_module.state_dict().items())
    result = ConvertQuantized()(graph_module)
    assert result.report.proof.status == "proven"
    assert "nothing" not in str(result.report.proof)


def test_prepared_state_is_saved_and_restored_exactly(tmp_path) -> None:
    model, inputs = build("conv_residual")
    first = top.capture(model, inputs).train()
    InsertFakeQuant()(first)
    for n in (2, 3):
        first(*images(n))
    set_observers(first, False)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    other, _ = build("conv_residual")
    second = top.capture(other, inputs).train()
    InsertFakeQuant()(second)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    assert not any(q.observing for q in quantizers(second).values())
    assert torch.equal(first.eval()(*images(5)), second.eval()(*images(5)))
    assert torch.equal(copy.deepcopy(first)(*images(5)), first(*images(5)))


def test_moving_average_follows_its_formula() -> None:
    quantizer = FakeQuantizer(bits=8, signed=False, momentum=0.25).train()
    assert not quantizer.has_range
    low = high = None
    for seed in range(4):
        x = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        quantizer(x)
        new_low, new_high = float(x.min()), float(x.max())
        low = new_low if low is None else low + 0.25 * (new_low - low)
        high = new_high if high is None else high + 0.25 * (new_high - high)
    assert quantizer.has_range
    assert float(quantizer.min_val) == pytest.approx(low, rel=1e-5)
    assert float(quantizer.max_val) == pytest.approx(high, rel=1e-5)


def test_without_a_range_values_pass_through() -> None:
    x = torch.randn(4)
    assert torch.equal(FakeQuantizer(bits=8, signed=False).eval()(x), x)
