"""Scores from activations, against hooks on the source model; where they are read in the graph."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.pruning.scored_models import (
    FIRST,
    OUT,
    SECOND,
    THIRD,
    UP,
    conv_net,
    group,
    images,
    labelled,
    mlp,
    seen,
)
from torchopt_passes.functional.dependence import gaussian_kernel, normalized_hsic
from torchopt_passes.graph.pruning.activations import followed, matrix_uses
from torchopt_passes.graph.pruning.scores import score_groups

BATCHES = [images(2), images(5)]  # batches of different sizes count by their samples


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(actual, expected.double(), rtol=1e-6, atol=1e-9), (actual, expected)


def test_apoz_is_read_behind_batch_norm_and_relu() -> None:
    model, graph_module = conv_net()
    scores = score_groups(
        graph_module, [FIRST, SECOND, THIRD], "apoz", top.PassContext(calibration=iter(BATCHES)), normalize="none"
    )
    zeros = (seen(model, "relu6", BATCHES, "outputs") == 0).double().mean((0, 2, 3))  # APoZ of each channel
    assert 0.05 < float(zeros.min()) < float(zeros.max()) < 0.95
    # the second producer of the group, a grouped convolution, is read by its input dimension only
    close(scores.values[FIRST.name], torch.stack([1 - (zeros[u] + zeros[u + 2]) / 2 for u in (0, 1)]))
    zeros = (seen(model, "relu", BATCHES, "outputs") == 0).double().mean((0, 2, 3))
    close(scores.values[SECOND.name], 1 - zeros)
    assert list(scores.fallbacks) == [THIRD.name]  # behind a GELU nothing is zero
    assert scores.fallbacks[THIRD.name].startswith("no activation that makes zeros")
    l2 = score_groups(graph_module, [THIRD], "l2", normalize="none")
    assert torch.equal(scores.values[THIRD.name], l2.values[THIRD.name])


def test_mean_activation_is_read_behind_any_pointwise_activation() -> None:
    model, graph_module = conv_net()
    context = top.PassContext(calibration=BATCHES)
    scores = score_groups(graph_module, [FIRST, SECOND, THIRD], "mean_activation", context, normalize="none")
    assert scores.fallbacks == {}
    mean = seen(model, "relu6", BATCHES, "outputs").mean((0, 2, 3))
    close(scores.values[FIRST.name], (mean[:2] + mean[2:]) / 2)
    mean = seen(model, "relu", BATCHES, "outputs").mean((0, 2, 3))
    close(scores.values[SECOND.name], mean)
    close(scores.values[THIRD.name], nn.functional.gelu(seen(model, "conv3", BATCHES, "outputs")).abs().mean((0, 2, 3)))


def test_mean_activation_of_each_use_of_a_weight() -> None:
    model, graph_module = mlp()
    batches = [labelled(4), labelled(3)]
    scores = score_groups(
        graph_module, [OUT], "mean_activation", top.PassContext(calibration=batches), normalize="none"
    )
    first, second = zip(*[seen(model, "twice", [batch], "outputs").chunk(2) for batch in batches], strict=True)
    expected = (torch.cat(first).relu().mean(0) + torch.cat(second).abs().mean(0)) / 2
    close(scores.values[OUT.name], expected)


def test_hsic_is_the_dependence_of_each_channel_on_the_outputs_of_the_same_samples() -> None:
    model, graph_module = conv_net()
    batches = [images(6), images(9)]
    context = top.PassContext(calibration=iter(batches))
    scores = score_groups(graph_module, [SECOND, THIRD], "hsic", context, normalize="none")
    assert scores.fallbacks == {}
    expected, count = torch.zeros(SECOND.size, dtype=torch.float64), 0
    model.eval()
    for batch in batches:
        with torch.no_grad():
            outputs = gaussian_kernel(model(batch).double().flatten(1))
        channels = seen(model, "relu", [batch], "outputs").double()
        n = len(batch)
        found = [normalized_hsic(gaussian_kernel(channels[:, c].flatten(1)), outputs) for c in range(SECOND.size)]
        expected, count = expected + n * torch.stack(found), count + n
    close(scores.values[SECOND.name], expected / count)


def test_hsic_removes_the_unit_that_tells_nothing() -> None:
    """Of two hidden units with weights of one size, the outputs follow the first alone."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[1.0, 1e-3]]))
    graph_module = top.capture(model, (torch.randn(4, 2),))
    context = top.PassContext(calibration=[torch.randn(64, 2)])
    result = top.PruneChannels(ratio=0.5, importance="hsic")(graph_module, context)
    assert torch.equal(result.graph_module.get_parameter("0.weight"), torch.tensor([[1.0, 0.0]]))
    assert result.report.proof.status == "proven"


def test_hsic_says_what_it_needs() -> None:
    _, graph_module = conv_net()
    with pytest.raises(top.ConfigError, match="compares samples, but the batch has 1"):
        score_groups(graph_module, [SECOND], "hsic", top.PassContext(calibration=[images(1)]))


def slow_wanda(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||X_j||, summed over i; weight (out, in), inputs (samples, in)."""
    found = torch.zeros(weight.shape[1], dtype=torch.float64)
    for j in range(weight.shape[1]):
        norm = math.sqrt(float(inputs[:, j].square().sum()))
        for i in range(len(weight)):
            found[j] += abs(float(weight.detach()[i, j])) * norm
    return found


def test_wanda_of_linear_convolution_grouped_and_flattened() -> None:
    model, graph_module = conv_net()
    context = top.PassContext(calibration=BATCHES)
    scores = score_groups(graph_module, [FIRST, SECOND, THIRD], "wanda", context, normalize="none")
    assert scores.fallbacks == {}
    inputs = seen(model, "conv2", BATCHES, "inputs").movedim(1, -1).reshape(-1, 4)
    expected = torch.zeros(2, dtype=torch.float64)
    for g in (0, 1):
        for kernel in model.conv2.weight[3 * g : 3 * g + 3].flatten(2).unbind(2):
            expected += slow_wanda(kernel, inputs[:, 2 * g : 2 * g + 2])
    close(scores.values[FIRST.name], expected)
    inputs = seen(model, "conv3", BATCHES, "inputs").movedim(1, -1).reshape(-1, 6)
    close(scores.values[SECOND.name], slow_wanda(model.conv3.weight.flatten(1), inputs))
    columns = slow_wanda(model.fc.weight, seen(model, "fc", BATCHES, "inputs"))
    close(scores.values[THIRD.name], columns.view(2, 4).sum(1))


def test_wanda_of_a_weight_used_twice_and_of_a_bare_parameter() -> None:
    model, graph_module = mlp()
    batches = [labelled(4), labelled(3)]
    scores = score_groups(graph_module, [UP, OUT], "wanda", top.PassContext(calibration=batches), normalize="none")
    close(scores.values[UP.name], slow_wanda(model.twice.weight, seen(model, "twice", batches, "inputs")))
    last = torch.cat([seen(model, "twice", [batch], "outputs").chunk(2)[1] for batch in batches])
    close(scores.values[OUT.name], slow_wanda(model.down.T, last))


def test_only_readers_count_for_wanda() -> None:
    _, graph_module = conv_net()
    makers = group("makers", 6, ("conv2.weight", 0, range(6)))
    scores = score_groups(graph_module, [makers], "wanda", top.PassContext(calibration=BATCHES))
    assert scores.fallbacks == {"makers": "no convolution, linear or matrix product reads its channels"}


def test_a_transposed_convolution_in_groups_makes_its_channels_once_for_each() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.up(x))

    model = Up()
    batches = [torch.randn(3, 4, 5, 5)]
    graph_module = top.capture(model, (batches[0],))
    made = group("made", 3, ("up.weight", 1, range(3)))
    read = group("read", 4, ("up.weight", 0, range(4)))
    context = top.PassContext(calibration=batches)
    mean = seen(model, "relu", batches, "outputs").mean((0, 2, 3))  # 6 channels
    close(
        score_groups(graph_module, [made], "mean_activation", context, normalize="none").values["made"],
        (mean[:3] + mean[3:]) / 2,
    )
    norms = batches[0].double().square().sum((0, 2, 3)).sqrt()
    expected = model.up.weight.detach().abs().sum((1, 2, 3)).double() * norms
    close(score_groups(graph_module, [read], "wanda", context, normalize="none").values["read"], expected)


def test_sides_and_transposes_of_matrix_products() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, self.left = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
            self.turned, self.hidden = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.left @ (x @ self.right)
            return nn.functional.linear(x @ self.turned.t(), self.hidden.t())

    graph_module = top.capture(Products(), (torch.ones(2, 4, 4),))
    found = {
        u.fqn: (u.in_dim, u.out_dim, u.read_dim, u.made_dim) for u in matrix_uses(graph_module, graph_module.graph)
    }
    # what a linear sums over is hidden behind a transpose: it is left out
    assert found == {"right": (0, 1, -1, -1), "left": (1, 0, -2, -2), "turned": (1, 0, -1, -1)}


@pytest.mark.parametrize(
    ("activation", "zeros"),
    [
        (nn.ReLU(), True),
        (nn.ReLU6(), True),
        (nn.Hardtanh(), False),
        (nn.Hardswish(), True),
        (nn.Threshold(0.5, 0.0), True),
        (nn.Threshold(0.5, 0.5), False),
        (nn.SiLU(inplace=True), False),
        (nn.LeakyReLU(), False),
    ],
    ids=lambda value: repr(value),
)
def test_which_activations_make_zeros(activation: nn.Module, zeros: bool) -> None:
    graph_module = top.capture(nn.Sequential(nn.Linear(3, 64), activation), (torch.randn(2, 3),))
    (use,) = matrix_uses(graph_module, graph_module.graph)
    node, found = followed(use.node)
    assert node.next.op == "output" and found is zeros
    assert bool((activation(torch.linspace(-4, 4, 64)) == 0).any()) is zeros  # the claim itself


def test_a_value_that_others_use_too_is_read_where_it_is_made() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            return x.relu() + x

    graph_module = top.capture(Residual(), (torch.randn(2, 3),))
    (use,) = matrix_uses(graph_module, graph_module.graph)
    assert followed(use.node) == (use.node, False)


@pytest.mark.parametrize("name", ["mean_activation", "taylor"])
def test_batches_stream(name: str) -> None:
    _, graph_module = mlp()
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal most
        for n in range(6):
            batch = labelled(2 + n)
            alive.append(weakref.ref(batch["x"]))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch

    score_groups(graph_module, [UP], name, top.PassContext(calibration=batches()))
    assert len(alive) == 6 and most <= 2


def test_a_transformer_from_its_loss_and_its_activations() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 20, (3, 6)), "labels": torch.tensor([0, 1, 1])}
    graph_module = top.capture(model, kwargs=batch)
    inside = "bert.encoder.layer.0"
    one = group(
        "ffn",
        12,
        (f"{inside}.intermediate.dense.weight", 0, range(12)),
        (f"{inside}.output.dense.weight", 1, range(12)),
    )
    context = top.PassContext(calibration=[batch])
    weights = [model.get_parameter(axis.fqn) for axis in one.axes]
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    terms = [(w.detach() * g).sum(1 - dim).abs() for w, g, dim in zip(weights, gradients, (0, 1), strict=True)]
    scores = score_groups(graph_module, [one], "taylor", context, normalize="none")
    assert torch.allclose(scores.values["ffn"], (terms[0] + terms[1]).double() / 2, rtol=1e-3, atol=1e-7)
    inputs = seen(model, f"{inside}.output.dense", [batch], "inputs").flatten(0, 1)
    close(
        score_groups(graph_module, [one], "wanda", context, normalize="none").values["ffn"],
        slow_wanda(weights[1], inputs),
    )
