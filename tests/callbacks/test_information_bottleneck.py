"""InformationBottleneck: noise for each sample or step, the bound, and units that carry noise leave exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.channel_models import GROUPS, batch, graph_of, make, optimizer_of, shapes, step, train
from tests.callbacks.loops import bare_net, collate, images
from torchopt_passes.callbacks import InformationBottleneck, Progress, attach
from torchopt_passes.callbacks.per_sample import SampleGatedWeight
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.draws import normal_rows, seed_of

UNITS = {"example_inputs": batch()}
NET = {"example_inputs": collate(images(2))}


@pytest.mark.parametrize("noise", ["sample", "step"])
def test_a_training_forward_and_its_gradients_are_those_of_gated_units(noise: Any) -> None:
    model, data = bare_net(), collate(images(8))
    weights = [model.conv.weight.detach().clone().requires_grad_(), model.fc.weight.detach().clone().requires_grad_()]
    mean, log_variance = torch.ones(8, requires_grad=True), torch.full((8,), -9.0, requires_grad=True)
    seed = seed_of(4, 0, "conv.weight:0")
    seed = seed_of(seed, 0) if noise == "sample" else seed
    epsilon = normal_rows(0, 8 if noise == "sample" else 1, 8, seed)
    z = mean + torch.exp(log_variance / 2) * epsilon
    hidden = nn.functional.conv2d(data["pixel_values"], weights[0], padding=1).relu().mean((2, 3))
    logits = nn.functional.linear(hidden * z, weights[1], model.fc.bias)
    loss = nn.functional.cross_entropy(logits, data["labels"])
    expected = torch.autograd.grad(loss, [*weights, mean, log_variance])
    bottleneck = InformationBottleneck(noise=noise, seed=4, settle=None, **NET)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [bottleneck]):
        output = model.train()(**data)
        output.loss.backward()
        assert torch.allclose(output.logits, logits, atol=1e-6)
        found = dict(model.named_parameters())
        gates = [f"torchopt_bottleneck.{kind}.conv-weight:0" for kind in ("mean", "log_variance")]
        names = ["conv.weight", "fc.weight", *gates]
        for name, gradient in zip(names, expected, strict=True):
            assert torch.allclose(found[name].grad, gradient, atol=1e-6), name  # type: ignore[arg-type]


def test_samples_have_noise_of_their_own_however_the_step_is_cut() -> None:
    model, data = make(), batch(6, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for part in (model.bn1, model.bn2, model.bn3):
        part.eval()

    def logits(sizes: tuple[int, ...]) -> torch.Tensor:
        bottleneck = InformationBottleneck(settle=None, **UNITS)
        with attach(model, optimizer, [bottleneck]), torch.no_grad():
            for parameter in model.torchopt_bottleneck.log_variance.values():
                parameter.fill_(-1.0)
            bottleneck.begin(Progress(0, 10))
            return torch.cat([model(part) for part in data.split(list(sizes))])

    whole = logits((6,))
    assert torch.allclose(logits((1, 2, 3)), whole)
    data = batch(1, seed=1).expand(6, -1, -1, -1)
    found = logits((6,))
    assert float((found - found[0]).abs().max()) > 1e-3  # equal images, another noise each


def test_the_penalty_is_the_bound() -> None:
    model = make()
    bottleneck = InformationBottleneck(strength=0.01, lr=1.0, settle=None, **UNITS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with attach(model, optimizer, [bottleneck]) as session:
        ratio = float(torch.exp(torch.tensor(9.0)))
        bound = 0.01 * 30 * float(torch.log1p(torch.tensor(ratio)))
        assert session.metrics() == {"bottleneck": pytest.approx(bound, rel=1e-5), "channel_ratio": 0.0}
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        optimizer.step()
        gates = model.torchopt_bottleneck
        down = 0.01 * 2 * ratio / (1 + ratio)  # d/dmu log(1 + mu^2 / s) = 2 (mu / s) / (1 + mu^2 / s)
        up = 0.01 * ratio / (1 + ratio)
        assert torch.allclose(gates.mean["conv1-weight:0"], torch.full((8,), 1.0 - down))
        assert torch.allclose(gates.log_variance["conv1-weight:0"], torch.full((8,), -9.0 + up))


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("noise", ["sample", "step"])
def test_units_that_carry_noise_leave_and_the_model_is_what_the_last_evaluation_computed(form: str, noise: Any) -> None:
    model = graph_of() if form == "graph" else make()
    bottleneck = InformationBottleneck(strength=0.02, threshold=-3.0, lr=0.1, noise=noise, **UNITS)
    outputs: list[torch.Tensor] = []

    def look(number: int) -> None:
        if number == 5:
            gates = model.torchopt_bottleneck
            with torch.no_grad():  # some units drown
                gates.log_variance["conv1-weight:0"][1::2] = 2.0
                gates.log_variance["fc1-weight:0"][:3] = 1.0
                gates.mean["conv2-weight:0"][5] = 0.0
            outputs.append(model.eval()(batch(5, seed=99)).detach())
            assert bottleneck.metrics()["channel_ratio"] == 8 / 30
            model.train()

    optimizer = train(model, [bottleneck], steps=5, seen=look)
    assert torch.allclose(model.eval()(batch(5, seed=99)), outputs[0], rtol=1e-9, atol=1e-12)
    assert {name: shapes(model)[name.removesuffix(":0")][0] for name in GROUPS} == {
        "conv1.weight:0": 4,
        "conv2.weight:0": 11,
        "fc1.weight:0": 7,
    }
    other = graph_of() if form == "graph" else make()
    bottleneck.plan.apply(other)
    assert shapes(other) == shapes(model)
    assert {e.reason.partition(" (")[0] for e in bottleneck.plan.edits if hasattr(e, "dim")} == {
        "carries noise after training with a bottleneck"
    }
    step(model.train(), optimizer, 6)


def test_units_that_the_task_does_not_need_close_and_the_others_stay() -> None:
    """The label is the first of eight hidden units; the other seven are noise."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Identity(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    model[0].weight.requires_grad_(True)
    bottleneck = InformationBottleneck(strength=5e-3, lr=0.03, example_inputs=(torch.ones(2, 8),))
    optimizer = torch.optim.Adam([{"params": [model[0].weight], "lr": 0.0}, {"params": model[2].parameters()}], lr=0.01)
    with attach(model, optimizer, [bottleneck], total_steps=500):
        for _ in range(500):
            x = torch.randn(64, 8, generator=generator)
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert model[0].weight.shape == (1, 8)
    assert model[0].weight[0].argmax() == 0
    x = torch.randn(2000, 8, generator=generator)
    assert float((model(x).argmax(1) == (x[:, 0] > 0).long()).float().mean()) > 0.97


class ByHand(nn.Module):
    """Its second layer is a plain matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x)) @ self.weight


def test_products_that_cannot_tell_samples_apart_are_left_to_step_noise() -> None:
    inputs = (torch.ones(3, 4),)
    model = ByHand()
    with pytest.raises(ConfigError, match=r'matmul.default reads its units, and mixes samples: noise="step" takes'):
        attach(model, optimizer_of(model), [InformationBottleneck(example_inputs=inputs)])
    model = ByHand()
    bottleneck = InformationBottleneck(noise="step", settle=None, example_inputs=inputs)
    with attach(model, optimizer_of(model), [bottleneck]):
        assert [group.name for group in bottleneck.groups] == ["weight:0"]
        model.train()(torch.ones(3, 4)).sum().backward()


def test_a_sample_gated_weight_refuses_what_would_go_past_its_gates() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    stand_in = SampleGatedWeight.of(weight, lambda samples: torch.full((samples, 4), 2.0))
    assert stand_in.shape == (3, 4)
    assert stand_in.dtype is torch.float32
    x = torch.randn(5, 4)
    assert torch.allclose(nn.functional.linear(x, stand_in), nn.functional.linear(2 * x, weight))
    assert torch.allclose(torch.ops.aten.linear.default(x, stand_in), nn.functional.linear(2 * x, weight))
    with pytest.raises(CallbackError, match='take noise="step"'):
        x @ stand_in.T


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength must be > 0"),
        ({"noise": "batch"}, 'noise must be "sample" or "step"'),
        ({"lr": -1.0}, "lr must be > 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InformationBottleneck(**options)
