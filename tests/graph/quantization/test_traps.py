"""Traps that other tools fall into, found by running them: each is a test here."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

import torchopt_passes as top
from tests.graph.quantization.helpers import nodes, output, quantizers, relative
from torchopt_passes.graph.quantization import (
    Calibrate,
    ConvertQuantized,
    InsertFakeQuant,
    LearnSteps,
    set_fake_quant,
    set_observers,
)
from torchopt_passes.graph.quantization.targets import KINDS

aten = torch.ops.aten
EVERY = list(itertools.product([1e-5, 1e-3, 1e-2], [0.01, 0.4], [0.0, 0.3]))


class PaddedConv(nn.Conv2d):
    """A subclass that pads by itself: others skip it without a word."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


class Trap(nn.Module):
    """Residual convolutions with batch norms of tiny variance, one ReLU for all, attention with dropout inside."""

    def __init__(self, eps: float, momentum: float | None, p: float) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem = PaddedConv(3, 8, 3, bias=False)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 1, bias=False)
        self.bn0, self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8, eps=eps, momentum=momentum) for _ in range(4))
        self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(8, 5)
        self.drop, self.p = nn.Dropout(p), p
        for norm in (self.bn0, self.bn1, self.bn2, self.bn3):
            nn.init.constant_(norm.get_buffer("running_var"), 2e-4)
            nn.init.uniform_(norm.weight, 0.01, 0.02)  # so that the tiny variance does not blow activations up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.bn3(self.down(x))
        tokens = self.relu(out).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return self.fc(self.drop(mixed.transpose(1, 2).flatten(2)).mean(1))


def trap(eps: float = 1e-3, momentum: float | None = 0.1, p: float = 0.2) -> Trap:
    torch.manual_seed(0)
    return Trap(eps, momentum, p)


def prepared(source: nn.Module, target: str = "inductor") -> fx.GraphModule:
    graph_module = top.capture(source, (torch.randn(3, 3, 8, 8),))
    InsertFakeQuant(target=target, qat=False)(graph_module)
    Calibrate(method="minmax")(graph_module, top.PassContext(calibration=[(torch.randn(4, 3, 8, 8),)]))
    return graph_module


def off(graph_module: fx.GraphModule) -> fx.GraphModule:
    set_fake_quant(graph_module, False)
    set_observers(graph_module, False)
    return graph_module


def same_as_float(graph_module: fx.GraphModule, source: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and batch statistics, in both modes, there and back."""
    source = copy.deepcopy(source)
    for training in (True, False, True, False):
        results: list[torch.Tensor] = []
        for module in (source, graph_module):
            assert module.train(training) is module, "train() and eval() return the module"
            module.zero_grad()
            torch.manual_seed(5)
            out = module(x)
            out.square().sum().backward()
            results.append(out.detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
        for name, parameter in source.named_parameters():
            got = graph_module.get_parameter(name).grad
            assert parameter.grad is not None and got is not None
            torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max()))
        for name, buffer in source.named_buffers():
            torch.testing.assert_close(graph_module.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("eps", "momentum", "p"), EVERY)
def test_fake_quant_off_is_float_for_every_eps_momentum_and_dropout(
    eps: float, momentum: float | None, p: float
) -> None:
    source, x = trap(eps, momentum, p), torch.randn(4, 3, 8, 8)
    graph_module = off(prepared(copy.deepcopy(source)))
    same_as_float(graph_module, source, x)


@pytest.mark.parametrize("learn", [False, True])
def test_it_still_is_after_a_copy_was_converted(learn: bool) -> None:
    source, x = trap(1e-2, 0.3, 0.25), torch.randn(4, 3, 8, 8)
    graph_module = prepared(copy.deepcopy(source))
    if learn:
        LearnSteps(method="lsq+")(graph_module)
    expected = output(graph_module.eval(), (x,))
    state, code = copy.deepcopy(graph_module.state_dict()), graph_module.code
    converted = top.on_copy(ConvertQuantized())(graph_module).graph_module
    assert graph_module.code == code and torch.equal(output(graph_module, (x,)), expected), "the input is intact"
    assert all(torch.equal(state[n], t) for n, t in graph_module.state_dict().items())
    torch.testing.assert_close(output(converted, (x,)), expected, rtol=1e-4, atol=1e-5)
    assert relative(expected, output(source.eval(), (x,))) > 1e-5, "rounding is seen"
    for batch in (1, 4, 9):  # the batch size is nobody's constant
        assert output(converted, (torch.randn(batch, 3, 8, 8),)).shape == (batch, 5)
    # dropout is switched in the converted graph too, that of attention as well
    torch.manual_seed(1)
    first, second = converted.train()(x), converted(x)
    assert not torch.equal(first, second)
    assert torch.equal(converted.eval()(x), converted(x))
    same_as_float(off(graph_module), source, x)


def test_a_batch_norm_without_momentum_is_refused_with_a_way_out() -> None:
    """A cumulative average weighs batches by a count that Python reads; measured afterwards, its means are the same."""
    source, batches = trap(momentum=None), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    message = r"'bn0' has momentum=None.*momentum of bn0, bn1, bn2, bn3 to a number; ReestimateBatchNorm"
    with pytest.raises(top.CaptureError, match=message):
        top.capture(source, (batches[0],))
    wanted = copy.deepcopy(source).train()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    graph_module = off(prepared(source))
    for norm in (wanted.bn0, wanted.bn1, wanted.bn2, wanted.bn3):
        norm.reset_running_stats()
    for x in batches:
        wanted(x)
    context = top.PassContext(calibration=[(x,) for x in batches])
    top.ReestimateBatchNorm(order="batch_statistics")(graph_module, context)
    for name in ("bn0", "bn1", "bn2", "bn3"):
        mean = wanted.get_submodule(name).running_mean
        torch.testing.assert_close(graph_module.get_buffer(f"{name}.running_mean"), mean, rtol=1e-4, atol=1e-5)


def test_a_wrong_eps_would_be_seen() -> None:
    """The guard of the guard: with eps 1e-5 in the place of 1e-3 this model is far off."""
    source, x = trap(1e-3), torch.randn(4, 3, 8, 8)
    wrong = copy.deepcopy(source)
    for module in wrong.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    assert relative(output(wrong.eval(), (x,)), output(source.eval(), (x,))) > 0.05


@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_every_matrix_operation_is_reported(target: str) -> None:
    graph_module = top.capture(trap(), (torch.randn(3, 3, 8, 8),))
    report = InsertFakeQuant(target=target)(graph_module).report
    matrix = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in KINDS]
    weights = {row.target for row in report.changed if row.target.endswith("weight")}
    assert weights == {"stem.weight", "conv1.weight", "conv2.weight", "down.weight", "qkv.weight", "fc.weight"}
    assert len(matrix) == len(weights) + len(report.skipped) == 7
    assert "scaled_dot_product_attention" in report.skipped[0].reason


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        self.downsample = nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
        )
        if stride == 1:
            self.downsample = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def resnet18(width: int = 8) -> nn.Sequential:
    """ResNet-18 with narrow layers: its 20 convolutions and the classifier."""
    stem = [nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inside = width
    for stage in range(4):
        outside = width * 2**stage
        layers += [Block(inside, outside, 1 if stage == 0 else 2), Block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 5))


@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_resnet18_trains_and_converts(target: str) -> None:
    torch.manual_seed(0)
    graph_module = top.capture(resnet18(), (torch.randn(2, 3, 32, 32),)).train()
    InsertFakeQuant(target=target)(graph_module)
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        graph_module(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert sum(not n.startswith("act_") for n in quantizers(graph_module)) == 21
    assert ConvertQuantized()(graph_module.eval()).report.proof.status == "proven"
    assert not nodes(graph_module, aten.batch_norm.default)
    assert sum(t.dtype is torch.int8 for t in graph_module.state_dict().values()) == 21


def test_bert_is_prepared_calibrated_and_converted() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    expected = output(model, batch)
    graph_module = top.capture(model, (), batch).eval()
    report = InsertFakeQuant(qat=False)(graph_module).report
    linears = {n + ".weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= {row.target for row in report.changed} and len(linears) == 8
    Calibrate()(graph_module, top.PassContext(calibration=[batch]))
    ConvertQuantized()(graph_module)
    assert relative(output(graph_module, batch), expected) < 0.1
    longer = {name: value.repeat(3, 2) for name, value in batch.items()}
    assert output(graph_module, longer).shape == (6, 2)


@pytest.mark.parametrize("learn", [False, True])
def test_prepared_state_is_saved_and_restored_exactly(learn: bool) -> None:
    x = torch.randn(4, 3, 8, 8)

    def make() -> fx.GraphModule:
        graph_module = prepared(trap())
        if learn:
            LearnSteps()(graph_module)
        return graph_module

    first = make()
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-3)
    for _ in range(2):
        first.train()(x).square().sum().backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make()
    assert not torch.equal(output(second.eval(), (x,)), output(first.eval(), (x,)))
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(output(second, (x,)), output(first, (x,)))
    assert torch.equal(output(copy.deepcopy(first), (x,)), output(first, (x,)))
    torch.manual_seed(3)
    trained = first.train()(x)
    torch.manual_seed(3)
    assert torch.equal(second.train()(x), trained), "in training too"


def test_nothing_global_is_touched_by_import_or_use() -> None:
    code = (
        "import torch, torch._inductor.config as c;"
        "mine = lambda graph: None;"
        "c.pre_grad_custom_pass = mine;"
        "names = ('post_grad_custom_pre_pass', 'post_grad_custom_post_pass', 'freezing');"
        "before = [getattr(c, n) for n in names];"
        "import torchopt_passes as top;"
        "from torchopt_passes.graph.quantization import *;"
        "from torchopt_passes.callbacks import *;"
        "g = top.capture(torch.nn.Linear(4, 4), (torch.randn(2, 4),));"
        "InsertFakeQuant(qat=False)(g);"
        "Calibrate()(g, top.PassContext(calibration=[(torch.randn(2, 4),)]));"
        "LearnSteps()(g); ConvertQuantized()(g);"
        "assert c.pre_grad_custom_pass is mine, c.pre_grad_custom_pass;"
        "assert before == [getattr(c, n) for n in names]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
