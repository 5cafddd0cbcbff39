"""Scores of groups from weights and gradients, against slow references on the source model."""

from __future__ import annotations

import math
from typing import Any

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
    ConvNet,
    conv_net,
    group,
    images,
    labelled,
    mlp,
    slopes,
)
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance
from torchopt_passes.graph.pruning.scores import CRITERIA, parse_importance, score_groups

GROUPS = [FIRST, SECOND, THIRD]


def close(actual: torch.Tensor, expected: Any) -> None:
    assert actual.dtype is torch.float64 and actual.device.type == "cpu"
    assert torch.allclose(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12), (
        actual,
        expected,
    )


def norms(tensor: torch.Tensor, dim: int, unit_of: list[int], p: float = 2.0) -> list[float]:
    """The p-norm of everything that leaves with each unit."""
    return [
        sum(
            abs(float(w)) ** p
            for index, of in enumerate(unit_of)
            if of == unit
            for w in tensor.detach().select(dim, index).flatten()
        )
        ** (1 / p)
        for unit in range(max(unit_of) + 1)
    ]


def by_mean(scores: list[float]) -> list[float]:
    return [score / (sum(scores) / len(scores)) for score in scores]


@pytest.mark.parametrize(("name", "p"), [("l1", 1.0), ("l2", 2.0), ("lp:3", 3.0)])
def test_norms_count_weights_and_scales_not_biases_and_buffers(name: str, p: float) -> None:
    model, graph_module = conv_net()
    scores = score_groups(graph_module, GROUPS, name)
    assert scores.fallbacks == {} and list(scores.values) == [g.name for g in GROUPS]
    axes = [
        norms(model.conv1.weight, 0, [0, 1, 0, 1], p),
        norms(model.bn.weight, 0, [0, 1, 0, 1], p),
        norms(model.conv2.weight, 1, [0, 1], p),
    ]
    close(scores.values[FIRST.name], torch.tensor([by_mean(axis) for axis in axes]).mean(0))
    axes = [norms(model.conv3.weight, 0, [0, 1], p), norms(model.fc.weight, 1, [0] * 4 + [1] * 4, p)]
    close(scores.values[THIRD.name], torch.tensor([by_mean(axis) for axis in axes]).mean(0))
    with torch.no_grad():
        for tensor in (model.conv1.bias, model.bn.bias, model.bn.running_mean, model.conv2.bias):
            tensor.add_(100)
    again = score_groups(graph_module, GROUPS, name)
    assert all(torch.equal(again.values[g.name], scores.values[g.name]) for g in GROUPS)


@pytest.mark.parametrize("aggregation", ["mean", "max", "product"])
@pytest.mark.parametrize("normalize", ["none", "mean", "max"])
def test_axes_are_normalized_then_aggregated(aggregation, normalize) -> None:
    model, graph_module = conv_net()
    axes = [norms(model.conv2.weight, 0, list(range(6))), norms(model.conv3.weight, 1, list(range(6)))]
    divisors = {"none": [1.0, 1.0], "mean": [sum(a) / 6 for a in axes], "max": [max(a) for a in axes]}[normalize]
    pairs = [[score / divisor for score in axis] for axis, divisor in zip(axes, divisors, strict=True)]
    combine = {"mean": lambda a, b: (a + b) / 2, "max": max, "product": lambda a, b: math.sqrt(a * b)}[aggregation]
    found = score_groups(graph_module, [SECOND], "l2", aggregation=aggregation, normalize=normalize)
    close(found.values[SECOND.name], [combine(a, b) for a, b in zip(*pairs, strict=True)])


def test_a_unit_counts_on_the_axes_that_hold_it() -> None:
    model, graph_module = conv_net()
    half = group("half", 6, ("conv2.weight", 0, range(6)), ("conv3.weight", 1, [0, 1, 2, -1, -1, -1]))
    found = score_groups(graph_module, [half], "l2", normalize="none").values["half"]
    out, into = norms(model.conv2.weight, 0, list(range(6))), norms(model.conv3.weight, 1, list(range(6)))
    close(found, [(out[u] + into[u]) / 2 for u in range(3)] + out[3:])


def test_hand_written_norms_and_layer_scale_count() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
            self.scale, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.scale * self.up(x) + self.shift)

    model = Scaled()
    units = range(4)
    one = group("up", 4, ("up.weight", 0, units), ("scale", 0, units), ("shift", 0, units), ("down.weight", 1, units))
    found = score_groups(top.capture(model, (torch.ones(2, 3),)), [one], "l1", normalize="none").values["up"]
    axes = [model.up.weight.abs().sum(1), model.scale.abs(), model.down.weight.abs().sum(0)]
    close(found, torch.stack(axes).mean(0).detach())


def test_bn_scale_and_where_there_is_none() -> None:
    model, graph_module = conv_net()
    scores = score_groups(graph_module, GROUPS, "bn_scale", normalize="none")
    gamma = model.bn.weight.detach().abs()
    close(scores.values[FIRST.name], [gamma[0] + gamma[2], gamma[1] + gamma[3]])
    assert scores.fallbacks == dict.fromkeys([SECOND.name, THIRD.name], "no batch norm scales its channels")
    l2 = score_groups(graph_module, GROUPS, "l2", normalize="none")
    assert all(torch.equal(scores.values[g.name], l2.values[g.name]) for g in (SECOND, THIRD))


def test_fpgm_looks_at_filters_only() -> None:
    model, graph_module = conv_net()
    found = score_groups(graph_module, [FIRST, SECOND], "fpgm", normalize="none").values
    axes: list[list[float]] = []
    for weight in (model.conv2.weight, model.conv3.weight.transpose(0, 1)):
        rows = weight.detach().double().flatten(1).tolist()
        axes.append([sum(math.dist(row, other) for other in rows) for row in rows])
    close(found[SECOND.name], torch.tensor(axes).mean(0))
    rows = model.conv1.weight.detach().double().flatten(1).tolist()
    out = [sum(math.dist(row, other) for other in rows) for row in rows]
    between = math.dist(*model.conv2.weight.detach().double().transpose(0, 1).flatten(1).tolist())
    close(found[FIRST.name], [(out[u] + out[u + 2] + between) / 2 for u in (0, 1)])  # batch norm has no filters


def test_lamp_is_over_the_units_of_a_group() -> None:
    model, graph_module = conv_net()
    out, into = norms(model.conv2.weight, 0, list(range(6))), norms(model.conv3.weight, 1, list(range(6)))
    squares = [(a * a + b * b) / 2 for a, b in zip(out, into, strict=True)]
    expected = [square / sum(other for other in squares if other >= square) for square in squares]
    for normalize in ("none", "mean"):
        found = score_groups(graph_module, [SECOND], "lamp", normalize=normalize).values[SECOND.name]
        close(found, expected)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_gradients_of_the_loss_on_batches(name: str) -> None:
    model, graph_module = mlp()
    halves = [0, 0, 0, 1, 1, 1]  # a unit of several indices, where terms cancel before the absolute value
    one = group("halves", 2, ("up.weight", 0, halves), ("up.bias", 0, halves), ("twice.weight", 1, halves))
    batches = [labelled(3), labelled(5)]
    expected = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        gradient = slopes(model, batch)
        for fqn, dim in (("up.weight", 0), ("twice.weight", 1)):
            weight = model.get_parameter(fqn).detach().double()
            for unit in range(2):
                total = 0.0
                for index in (i for i, of in enumerate(halves) if of == unit):
                    pairs = zip(weight.select(dim, index), gradient[fqn].double().select(dim, index), strict=True)
                    total += sum(float(w * g) if name == "taylor" else float(w * g) ** 2 / 2 for w, g in pairs)
                expected[unit] += abs(total) / 2 / 2  # mean over two batches and two axes
    context = top.PassContext(calibration=iter(batches))
    close(score_groups(graph_module, [one], name, context, normalize="none").values["halves"], expected)


def test_gradients_are_of_eval_mode_and_count_frozen_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.mix = nn.Linear(4, 4).requires_grad_(False)
            self.dropout = nn.Dropout(0.5)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.dropout(self.mix(self.embed(ids))))
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    model = Tied()
    batch = {"ids": torch.tensor([1, 2, 6]), "labels": torch.tensor([0, 2, 3])}
    graph_module = top.capture(model, kwargs=batch)
    one = group("embed", 4, ("embed.weight", 1, range(4)), ("mix.weight", 1, range(4)))
    context = top.PassContext(calibration=[batch])
    found = score_groups(graph_module, [one], "taylor", context, normalize="none").values["embed"]
    assert not model.mix.weight.requires_grad
    model.mix.requires_grad_()
    gradient = slopes(model, batch)
    terms = [(model.get_parameter(f).detach() * gradient[f]).sum(0).abs() for f in ("embed.weight", "mix.weight")]
    close(found, (terms[0] + terms[1]) / 2)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_gradients_of_the_user_where_there_is_no_loss(name: str) -> None:
    model, graph_module = conv_net()
    model(images(3)).square().mean().backward()
    assert model.conv3.weight.grad is not None and model.fc.weight.grad is not None
    for calibration in (None, [images(2)]):  # a model that returns no loss
        context = top.PassContext(calibration=calibration)
        found = score_groups(graph_module, [THIRD], name, context, normalize="none").values[THIRD.name]
        expected = torch.zeros(2, dtype=torch.float64)
        for weight, dim in ((model.conv3.weight, 0), (model.fc.weight, 1)):
            terms = (weight.detach().double() * weight.grad).movedim(dim, 0).reshape(2, -1)
            expected += (terms.sum(1).abs() if name == "taylor" else terms.square().sum(1) / 2) / 2
        close(found, expected)


def test_without_loss_or_gradients_it_says_what_to_give() -> None:
    _, graph_module = conv_net()
    for calibration in (None, [images(2)]):
        with pytest.raises(ConfigError, match=r"capture the model with labels=.*backward\(\)"):
            score_groups(graph_module, GROUPS, "taylor", top.PassContext(calibration=calibration))
    for name in ("apoz", "mean_activation", "wanda", "hsic"):
        with pytest.raises(ConfigError, match="calibration="):
            score_groups(graph_module, GROUPS, name)
        with pytest.raises(ConfigError, match="empty"):
            score_groups(graph_module, GROUPS, name, top.PassContext(calibration=[]))
    _, graph_module = mlp()
    with pytest.raises(ConfigError, match="empty"):
        score_groups(graph_module, [UP], "taylor", top.PassContext(calibration=iter([])))


def test_a_group_without_gradients_is_reported() -> None:
    model, graph_module = conv_net()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    scores = score_groups(graph_module, [SECOND, THIRD], "taylor")
    assert scores.fallbacks == {SECOND.name: "none of its weights has a gradient"}
    close(scores.values[THIRD.name], by_mean(model.fc.weight.detach().view(3, 2, 4).sum((0, 2)).abs().tolist()))
    assert torch.equal(scores.values[SECOND.name], score_groups(graph_module, [SECOND], "l2").values[SECOND.name])


@pytest.mark.parametrize(
    "name", ["l2", "random", "bn_scale", "taylor", "fisher", "fpgm", "lamp", "apoz", "mean_activation", "wanda", "hsic"]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(name: str, training: bool) -> None:
    model, graph_module = mlp() if name in ("taylor", "fisher") else conv_net()
    groups, batch = ([UP, OUT], labelled(3)) if name in ("taylor", "fisher") else (GROUPS, images(3))
    graph_module.train(training)
    first, *_, last = model.parameters()
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    before = {fqn: tensor.clone() for fqn, tensor in graph_module.state_dict().items()}
    gradients = {fqn: parameter.grad for fqn, parameter in graph_module.named_parameters()}
    copies = {fqn: None if g is None else g.clone() for fqn, g in gradients.items()}
    needed = {fqn: parameter.requires_grad for fqn, parameter in graph_module.named_parameters()}
    code, state = graph_module.code, torch.get_rng_state()
    scores = score_groups(graph_module, groups, name, top.PassContext(calibration=[batch]))
    assert all(scores.values[g.name].shape == (g.size,) for g in groups)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[fqn]) for fqn, tensor in graph_module.state_dict().items())
    for fqn, parameter in graph_module.named_parameters():
        assert parameter.grad is gradients[fqn] and parameter.requires_grad == needed[fqn]
        assert parameter.grad is None or torch.equal(parameter.grad, copies[fqn])
    assert graph_module.training is training and graph_module.code == code
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["taylor", "wanda"])
def test_buffers_that_the_model_writes_are_as_they_were(name: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls.add_(1)
            return {"loss": (self.fc(x) * self.calls).sum()}

    graph_module = top.capture(Counting(), (torch.ones(2, 3),))
    before = graph_module.get_buffer("calls").clone()
    units = group("fc", 3, ("fc.weight", 1, range(3)))
    score_groups(graph_module, [units], name, top.PassContext(calibration=[torch.ones(2, 3), torch.ones(2, 3)]))
    assert torch.equal(graph_module.get_buffer("calls"), before)


def test_norms_in_blocks_are_norms_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph_module = conv_net()
    at_once = score_groups(graph_module, GROUPS, "l2").values
    monkeypatch.setattr("torchopt_passes.graph.pruning.weight_scores._BLOCK", 30)  # an index or two at a time
    in_blocks = score_groups(graph_module, GROUPS, "l2").values
    assert all(torch.allclose(in_blocks[g.name], at_once[g.name], rtol=1e-12, atol=0) for g in GROUPS)


def test_an_error_in_a_batch_leaves_the_mode() -> None:
    _, graph_module = mlp()
    graph_module.train()
    with pytest.raises(TypeError):
        score_groups(graph_module, [UP], "taylor", top.PassContext(calibration=[labelled(2), {"x": torch.ones(2, 5)}]))
    assert graph_module.training and torch.is_grad_enabled()


def test_random_follows_the_seed() -> None:
    _, graph_module = conv_net()
    found = [score_groups(graph_module, GROUPS, "random", top.PassContext(seed=seed)).values for seed in (1, 1, 2)]
    assert all(torch.equal(found[0][g.name], found[1][g.name]) for g in GROUPS)
    assert not torch.equal(found[0][SECOND.name], found[2][SECOND.name])
    expected = importance.random_scores(10, torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(list(found[0].values())), expected)


def test_a_users_function() -> None:
    _, graph_module = conv_net()
    scores = score_groups(graph_module, GROUPS, lambda g, module: module.fc.bias[0] * torch.arange(g.size))
    factor = graph_module.get_parameter("fc.bias").tolist()[0]
    close(scores.values[SECOND.name], [factor * unit for unit in range(6)])
    with pytest.raises(ConfigError, match=r"conv1.weight:0 must be a tensor of shape \(2,\), not \(3,\)"):
        score_groups(graph_module, GROUPS, lambda *_: torch.ones(3))
    with pytest.raises(ConfigError, match="not list"):
        score_groups(graph_module, GROUPS, lambda *_: [1.0, 2.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="not finite"):
        score_groups(graph_module, GROUPS, lambda g, _: torch.full((g.size,), math.nan))


def test_groups_with_biases_alone_and_with_nothing() -> None:
    model, graph_module = conv_net()
    biases = group("biases", 3, ("fc.bias", 0, range(3)))
    nothing = group("nothing", 4, ("bn.running_mean", 0, range(4)))
    scores = score_groups(graph_module, [biases, nothing], "l1")
    close(scores.values["biases"], by_mean(model.fc.bias.detach().abs().tolist()))
    assert scores.values["nothing"].tolist() == [1.0] * 4
    assert scores.fallbacks["biases"] == "it has no weights"
    assert scores.fallbacks["nothing"] == "it has no weights; it has no parameters at all: its units are equal"


@pytest.mark.parametrize("name", ["l3", "lp", "lp:0", "lp:x", "lp:nan", "l2:2", "taylor:1", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no importance .*it is one of l1, l2, lp:P \(P > 0\), random"):
        parse_importance(name)


def test_every_criterion_has_a_name() -> None:
    for name in CRITERIA:
        assert parse_importance("lp:2" if name == "lp" else name)[0] in CRITERIA


def test_options_are_refused_before_any_work() -> None:
    _, graph_module = conv_net()
    with pytest.raises(ConfigError, match="aggregation"):
        score_groups(graph_module, GROUPS, "apoz", aggregation="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="normalize"):
        score_groups(graph_module, GROUPS, "apoz", normalize="sum")  # pyright: ignore[reportArgumentType]


def test_weights_that_are_not_finite_or_have_no_values_are_refused() -> None:
    model, graph_module = conv_net()
    with torch.no_grad():
        model.conv3.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"conv3\.weight is not finite"):
        score_groups(graph_module, GROUPS, "l2")
    with torch.device("meta"):
        graph_module = top.capture(ConvNet(), (torch.ones(2, 3, 6, 6),))
    with pytest.raises(ConfigError, match=r"conv1\.weight is on the meta device.*random"):
        score_groups(graph_module, GROUPS, "l2")
    assert score_groups(graph_module, GROUPS, "random").values[SECOND.name].shape == (6,)
