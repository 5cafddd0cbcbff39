"""Calibration takes exact ranges and touches nothing; conversion stores integers and equals fake-quant."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import UINT8_TARGETS, convert, nodes, output, prepare, quantizers, relative
from tests.models import ZOO, build, images
from torchopt_passes.functional.affine import affine_qparams, fold_batch_norm, min_max, quantize
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant

aten = torch.ops.aten


def test_min_max_is_the_extremes_of_all_batches() -> None:
    model = nn.Linear(4, 3)
    batches = [torch.randn(n, 4) * n for n in (2, 3, 5)]
    graph_module = top.capture(model, (batches[0],)).eval()
    InsertFakeQuant(qat=False)(graph_module)
    Calibrate(method="minmax")(graph_module, top.PassContext(calibration=iter(batches)))
    (activation,) = [q for n, q in quantizers(graph_module).items() if n.startswith("act_")]
    everything = torch.cat(batches)
    assert float(activation.min_val) == float(everything.min()) and float(activation.max_val) == float(everything.max())
    weight = quantizers(graph_module)["weight"]
    assert torch.equal(weight.max_val, model.weight.detach().amax(1))


def test_histogram_clips_a_lone_outlier() -> None:
    x = torch.cat([torch.randn(20000), torch.tensor([60.0])])[:, None]
    graph_module = top.capture(nn.Linear(1, 1), (x,)).eval()
    InsertFakeQuant(qat=False, activation_bits=4)(graph_module)
    Calibrate(method="histogram")(graph_module, top.PassContext(calibration=[x]))
    (activation,) = [q for n, q in quantizers(graph_module).items() if n.startswith("act_")]
    assert float(activation.max_val) < 30.0


def test_calibration_needs_data() -> None:
    graph_module = top.capture(nn.Linear(4, 3), (torch.randn(2, 4),)).eval()
    InsertFakeQuant(qat=False)(graph_module)
    with pytest.raises(top.ConfigError, match="calibration"):
        Calibrate()(graph_module)
    with pytest.raises(top.ConfigError, match="no batch"):
        Calibrate()(graph_module, top.PassContext(calibration=iter(())))
    with pytest.raises(top.PassError, match=r"seen no data.*Calibrate"):
        ConvertQuantized()(graph_module)


@pytest.mark.parametrize("target", UINT8_TARGETS)
def test_integers_are_those_of_the_folded_weight_and_the_rest_is_gone(target: str) -> None:
    model, inputs = build("conv_residual")
    converted = convert(model, [inputs], target=target)
    state = converted.state_dict()
    folded, shift = fold_batch_norm(
        model.stem.weight.double(),
        None,
        gamma=model.bn1.weight.double(),
        beta=model.bn1.bias.double(),
        mean=model.bn1.running_mean.double(),
        var=model.bn1.running_var.double(),
        eps=1e-3,
    )
    folded = folded.float().detach()
    scale = state["stem.weight_scale"]
    expected_scale, zero = affine_qparams(*min_max(folded, 0), -127, 127, symmetric=True)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    assert state["stem.weight"].dtype is torch.int8
    difference = state["stem.weight"].int() - quantize(folded, scale, zero, -127, 127, 0)
    assert int(difference.abs().max()) == 0
    torch.testing.assert_close(state["stem.bias"], shift.float().detach(), rtol=1e-6, atol=1e-7)
    assert not [n for n in state if "num_batches" in n or n.startswith(("bn1", "bn2", "fake_quant"))]
    assert not nodes(converted, aten.batch_norm.default) and not nodes(converted, aten.add_.Tensor)
    for n in (1, 8):
        assert output(converted, images(n)).shape == (n, 5)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_on_copy_leaves_the_prepared_graph_and_the_source_intact(name: str, fold: bool) -> None:
    model, inputs = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    prepared = prepare(model, [inputs, ZOO[name][1](3)])
    expected, code = output(prepared, inputs), prepared.code
    result = top.on_copy(ConvertQuantized(fold_weights=fold))(prepared)
    assert prepared.code == code and torch.equal(output(prepared, inputs), expected)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert result.report.proof.error <= 1e-6
    torch.testing.assert_close(output(result.graph_module, inputs), expected, rtol=0.02, atol=0.02)


def test_eps_and_tiny_variance_survive_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU()).eval()
    nn.init.constant_(model[1].running_var, 2e-4)
    x = torch.randn(4, 3, 9, 9)
    assert relative(output(convert(model, [(x,)]), (x,)), model(x)) < 0.02


def test_conv1d_of_gpt2_becomes_a_linear_with_int8_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 99, (2, 7))}
    expected = output(model, batch)
    for target in UINT8_TARGETS:
        converted = convert(model, [batch], target=target)
        assert not nodes(converted, aten.addmm.default)
        assert sum(t.dtype is torch.int8 for t in converted.state_dict().values()) == 5
        assert relative(output(converted, batch), expected) < 0.03


def test_no_global_side_effects_at_import() -> None:
    code = (
        "import torch, torch._inductor.config as c;"
        "names = ('pre_grad_custom_pass', 'post_grad_custom_pre_pass', 'post_grad_custom_post_pass', 'freezing');"
        "before = [getattr(c, n) for n in names];"
        "import torchopt_passes.graph.quantization, torchao.quantization.pt2e;"
        "assert before == [getattr(c, n) for n in names]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_digits_keep_their_accuracy() -> None:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2):
        for batch in train.split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()

    def accuracy(module: nn.Module) -> float:
        return float((output(module, (x[test],)).argmax(1) == y[test]).float().mean())

    converted = convert(model, [(x[batch],) for batch in train[:256].split(64)])
    assert accuracy(model) > 0.9
    assert accuracy(model) - accuracy(converted) <= 0.01


def test_torchvision_resnet18() -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    model = models.resnet18(num_classes=10)
    for _ in range(2):
        model(torch.randn(8, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    converted = convert(model, [(x,)], target="onnx")
    assert sum(t.dtype is torch.int8 for t in converted.state_dict().values()) == 21
    assert relative(output(converted, (x,)), expected) < 0.1
