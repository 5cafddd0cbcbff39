"""ReestimateBatchNorm and CorrectBias: the statistics and means are those measured directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import prepare
from tests.models import build, images
from torchopt_passes.graph.quantization import CorrectBias, ReestimateBatchNorm, set_fake_quant
from torchopt_passes.graph.verify import evaluate

BATCHES = [images(n) for n in (4, 7, 3)]


def values(graph_module: Any, node: str, batches: list[Any]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for batch in batches:
        record: dict[str, Any] = {}
        evaluate(graph_module, (batch, {}), dtype=None, record=record)
        found.append(record[node])
    return torch.cat(found).double()


def input_of(graph_module: Any, norm: str) -> str:
    (node,) = [
        n for n in graph_module.graph.nodes if n.op == "call_function" and f"{norm}_running_mean" in map(str, n.args)
    ]
    return str(node.args[0])


def test_statistics_are_those_of_the_input_of_each_batch_norm() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = ReestimateBatchNorm()(graph_module, top.PassContext(calibration=BATCHES))
    assert result.report.proof.status == "proven"
    for norm in ("bn1", "bn2"):  # the second with the first one's new statistics
        x = values(graph_module, input_of(graph_module, norm), BATCHES)
        torch.testing.assert_close(
            graph_module.get_buffer(f"{norm}.running_mean").double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            graph_module.get_buffer(f"{norm}.running_var").double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6
        )
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    result.plan.apply(model)
    assert torch.equal(model.get_buffer("bn2.running_var"), graph_module.get_buffer("bn2.running_var"))


def test_how_the_data_is_cut_does_not_matter_layer_by_layer() -> None:
    together = [(torch.cat([batch[0] for batch in BATCHES]),)]
    found = []
    for batches in (BATCHES, together):
        graph_module = top.capture(*build("conv_residual"))
        ReestimateBatchNorm()(graph_module, top.PassContext(calibration=batches))
        found.append(graph_module.get_buffer("bn2.running_var"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_batch_statistics_are_those_of_one_epoch_in_training() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    ReestimateBatchNorm(order="batch_statistics")(graph_module, top.PassContext(calibration=iter(BATCHES)))
    model.train()
    seen: list[torch.Tensor] = []
    model.get_submodule("bn2").register_forward_hook(lambda module, args, out: seen.append(args[0].detach().double()))
    for batch in BATCHES:
        model(*batch)
    x = torch.cat(seen)
    torch.testing.assert_close(
        graph_module.get_buffer("bn2.running_mean").double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        graph_module.get_buffer("bn2.running_var").double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6
    )


class Deep(nn.Module):
    """Batch norms after each other, one module called twice, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.free = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.bn(self.first(torch.relu(self.bn(self.first(x))))))


def test_a_batch_norm_that_is_called_twice_pools_both_calls() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 6),) for n in (5, 8)]
    graph_module = top.capture(Deep(), batches[0])
    report = ReestimateBatchNorm()(graph_module, top.PassContext(calibration=batches)).report
    assert any("no running statistics" in row.reason for row in report.skipped)
    names = [str(n.args[0]) for n in graph_module.graph.nodes if n.target is torch.ops.aten.batch_norm.default][:2]
    start = top.capture(Deep(), batches[0])
    start.load_state_dict(graph_module.state_dict())
    for name in ("running_mean", "running_var"):  # both uses are measured with the statistics before
        start.get_buffer(f"bn.{name}").fill_(0.0 if name == "running_mean" else 1.0)
    x = torch.cat([values(start, name, batches) for name in names])
    torch.testing.assert_close(graph_module.get_buffer("bn.running_mean").double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graph_module.get_buffer("bn.running_var").double(), x.var(0), rtol=1e-5, atol=1e-6)


def test_after_pruning_the_accuracy_comes_back() -> None:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, channels in ((1, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(2):
        for batch in train.split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    graph_module = top.capture(model, (x[test],)).eval()

    def accuracy() -> float:
        with torch.no_grad():
            return float((graph_module(x[test]).argmax(1) == y[test]).float().mean())

    whole = accuracy()
    top.PruneWeights(sparsity=0.6)(graph_module)
    pruned = accuracy()
    context = top.PassContext(calibration=[(x[batch],) for batch in train[:512].split(64)])
    ReestimateBatchNorm()(graph_module, context)
    assert whole > 0.9 and accuracy() > pruned + 0.3


def test_data_that_can_be_read_once_is_refused() -> None:
    graph_module = top.capture(*build("conv_residual"))
    with pytest.raises(top.ConfigError, match="several times"):
        ReestimateBatchNorm()(graph_module, top.PassContext(calibration=iter(BATCHES)))
    with pytest.raises(top.ConfigError, match="calibration"):
        ReestimateBatchNorm(order="batch_statistics")(graph_module)


@pytest.mark.parametrize("name", ["conv_residual", "attention"])
def test_the_mean_error_of_every_layer_is_gone(name: str) -> None:
    model, _ = build(name)
    batches = BATCHES if name == "conv_residual" else [(torch.randn(n, 6, 16),) for n in (4, 9)]
    graph_module = prepare(model, batches, target="onnx", weight_bits=4, activation_bits=5)
    source = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    places = {
        "conv_residual": {"batch_norm": -3, "conv2d_1": -3, "conv2d_2": -3, "linear": -1},
        "attention": {"linear": -1, "linear_1": -1, "linear_2": -1, "linear_3": -1},
    }[name]

    def means() -> dict[str, torch.Tensor]:
        return {
            node: values(graph_module, node, batches).movedim(dim, -1).flatten(0, -2).mean(0)
            for node, dim in places.items()
        }

    set_fake_quant(graph_module, False)
    wanted = means()
    set_fake_quant(graph_module, True)
    before = means()
    result = CorrectBias()(graph_module, top.PassContext(calibration=batches))
    assert result.report.proof.status == "proven"
    after = means()
    for node in places:
        error, left = (wanted[node] - before[node]).abs().max(), (wanted[node] - after[node]).abs().max()
        assert error > 1e-3 and left < 1e-5
    assert all(edit.numbers["mean_error_left"] < 1e-6 < edit.numbers["mean_error"] for edit in result.plan.edits)
    assert all(torch.equal(source[key], tensor) for key, tensor in model.state_dict().items())
    beta = {edit.target for edit in result.plan.edits}
    assert name != "conv_residual" or beta == {"bn1.bias", "conv.bias", "depthwise.bias", "fc.bias"}


def test_bias_correction_brings_the_output_closer() -> None:
    model, _ = build("conv_residual")
    graph_module = prepare(model, BATCHES, target="onnx", weight_bits=3, per_channel=False)
    set_fake_quant(graph_module, False)
    expected = values(graph_module, "linear", BATCHES)
    set_fake_quant(graph_module, True)
    before = values(graph_module, "linear", BATCHES)
    CorrectBias()(graph_module, top.PassContext(calibration=BATCHES))
    after = values(graph_module, "linear", BATCHES)
    assert (after - expected).norm() < 0.7 * (before - expected).norm()
    top.ConvertQuantized()(graph_module)


class Biasless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shared = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.shared(torch.relu(self.plain(x)))))


def test_what_is_not_corrected_says_why() -> None:
    batches = [(torch.randn(5, 4),)]
    graph_module = prepare(Biasless(), batches)
    told = {
        row.target: row.reason
        for row in CorrectBias()(graph_module, top.PassContext(calibration=batches)).report.skipped
    }
    assert "no bias" in told["plain.weight"] and "more than once" in told["shared.weight"]
    model, inputs = build("conv_residual")
    plain = top.capture(model, inputs)
    assert "nothing of it is rounded" in str(CorrectBias()(plain, top.PassContext(calibration=[inputs])).report)
    top.InsertFakeQuant(qat=False)(plain)
    with pytest.raises(top.ConfigError, match="Calibrate"):
        CorrectBias()(plain, top.PassContext(calibration=[inputs]))
