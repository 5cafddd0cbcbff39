"""Where a scale can be moved: every place that is found takes any scale without a change; every other says why."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import torchopt_passes as top
from tests.hf_models import MODELS
from tests.models import build
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.quantization.layer_inputs import AbsMax, ChannelMoments, SecondMoment, watch_values
from torchopt_passes.graph.quantization.rescale import move_scale, unscaled
from torchopt_passes.graph.quantization.scale_pairs import Site, find_sites
from torchopt_passes.graph.verify import evaluate, relative_error


class Branches(nn.Module):
    """Depthwise and grouped convolutions, concatenation, channel shuffle, padding, pooling, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm_dw = nn.Conv2d(8, 16, 3, groups=8, padding=1), nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3)
        self.up = nn.ConvTranspose2d(6, 5, 2)
        self.group_norm = nn.GroupNorm(2, 6)
        self.fc = nn.Linear(5 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = functional.leaky_relu(self.norm_dw(self.depthwise(x)))
        x = torch.cat(
            [functional.relu(self.left(x)), functional.relu(self.right(functional.max_pool2d(x, 3, 1, 1)))], 1
        )
        x = functional.channel_shuffle(x, 4)
        x = self.group_norm(self.grouped(functional.pad(x, (1, 1, 1, 1))))
        x = functional.adaptive_avg_pool2d(functional.relu(self.up(x)), 2)
        return self.fc(torch.flatten(functional.dropout(x, 0.1, self.training), 1))


class Blocked(nn.Module):
    """What no scale passes."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.other = nn.Linear(6, 6, bias=False)
        self.other.weight = self.tied.weight
        self.residual, self.curved, self.gate = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.last = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = self.other(torch.relu(self.tied(x)))
        x = x + torch.relu(self.residual(x))
        x = functional.gelu(self.curved(x))
        g = self.gate(x)
        return self.last(self.plain(g * torch.sigmoid(g)))


def moved_by_chance(graph_module: fx.GraphModule, sites: list[Site]) -> list[Edit]:
    generator = torch.Generator().manual_seed(0)
    edits: list[Edit] = []
    for site in sites:
        scale = torch.exp(torch.randn(site.size, generator=generator))
        edits += move_scale(site, scale, "by chance", {}, "test")
    return edits


def check_that_scales_change_nothing(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Site]:
    graph_module = top.capture(model, args, kwargs)
    sites = [site for site in find_sites(graph_module) if not site.why_not]
    edits = moved_by_chance(graph_module, sites)
    expected = evaluate(graph_module, (args, kwargs), state=unscaled(graph_module, edits))
    before = evaluate(graph_module, (args, kwargs))
    assert relative_error(expected, before) < 1e-5
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    top.Plan(tuple(edits)).apply(graph_module)
    assert relative_error(evaluate(graph_module, (args, kwargs)), expected) < 1e-9
    assert all(torch.equal(source[name], tensor) for name, tensor in model.state_dict().items())
    top.Plan(tuple(edits)).apply(model)
    values = graph_module.state_dict()
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    return sites


def test_convolutions_of_every_kind() -> None:
    torch.manual_seed(0)
    sites = check_that_scales_change_nothing(Branches(), (torch.randn(2, 3, 9, 9),), {})
    found = {
        site.name: [(reader.axis.fqn, reader.axis.dim, reader.axis.groups) for reader in site.readers] for site in sites
    }
    assert found == {
        "norm.weight": [("depthwise.weight", 1, 8)],
        "norm_dw.weight": [("left.weight", 1, 1), ("right.weight", 1, 1)],
        "left.weight": [("grouped.weight", 1, 3)],
        "right.weight": [("grouped.weight", 1, 3)],
        "group_norm.weight": [("up.weight", 0, 1)],
        "up.weight": [("fc.weight", 1, 1)],
    }
    shuffled = next(site for site in sites if site.name == "left.weight").readers[0].index
    expected = functional.channel_shuffle(torch.tensor([0, 1, 2, 3, *[-1] * 8]).view(1, 12, 1, 1), 4).flatten()
    assert shuffled.tolist() == expected.tolist()
    flattened = next(site for site in sites if site.name == "up.weight").readers[0].index
    assert flattened.tolist() == [channel for channel in range(5) for _ in range(4)]


class Stored(nn.Module):
    """Weights stored as [in, out] and transposed, a bias that is added apart, a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.w2, self.b2 = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4))
        self.gain, self.w3 = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(torch.addmm(self.b1, self.norm(x), self.w1))
        x = torch.sigmoid(x @ self.w2.t() + self.b2) * self.gain
        return x @ self.w3


def test_weights_however_they_are_stored() -> None:
    torch.manual_seed(0)
    sites = check_that_scales_change_nothing(Stored(), (torch.randn(3, 6),), {})
    found = {site.fqns[0]: (site.fqns[1:], site.readers[0].axis.dim) for site in sites}
    assert found == {"norm.weight": (("norm.bias", "w1"), 0), "w1": (("b1", "w2"), 1), "gain": (("w3",), 0)}


def test_a_transformers_model_with_grouped_query_attention() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"].build()
    args, kwargs = MODELS["llama"].case(2)
    kwargs = {key: value for key, value in kwargs.items() if key != "labels"}
    sites = {site.name: site for site in check_that_scales_change_nothing(model, args, kwargs)}
    assert len(sites) == 9
    (reader,) = sites["model.layers.0.self_attn.v_proj.weight"].readers
    assert reader.index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]  # two query heads read each
    assert [r.axis.fqn.split(".")[-2] for r in sites["model.layers.0.post_attention_layernorm.weight"].readers] == [
        "gate_proj",
        "up_proj",
    ]


def test_every_other_layer_says_why() -> None:
    graph_module = top.capture(Blocked(), (torch.randn(2, 6),))
    told: dict[str, str] = {}
    for site in find_sites(graph_module):
        told[site.name] = f"{told.get(site.name, '')}; {site.why_not}"
    assert "used more than once" in told["twice.weight"] and "used more than once" in told["tied.weight"]
    assert "a sum with others" in told["residual.weight"] and "gelu" in told["curved.weight"]
    assert "sigmoid" in told["gate.weight"] or "each other" in told["gate.weight"]
    assert "no weight of its own" in told["layer_norm"] and "an output" in told["last.weight"]
    assert len(told) == 7 and all(told.values())


def test_a_prepared_graph_is_refused() -> None:
    graph_module = top.capture(*build("conv_residual"))
    top.InsertFakeQuant()(graph_module)
    with pytest.raises(top.ConfigError, match="before InsertFakeQuant"):
        find_sites(graph_module)


def test_statistics_stream_and_leave_no_trace() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs).train()
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def batches():
        nonlocal most
        for n in (1, 4, 2, 3):
            batch = torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n))
            alive.append(weakref.ref(batch))
            yield (batch,)
            del batch
            most = max(most, sum(ref() is not None for ref in alive))

    largest, moments, second = AbsMax(1), ChannelMoments(1), SecondMoment(-1)
    watches = {"relu": largest, "conv2d_1": moments, "dropout": second}
    assert watch_values(graph_module, batches(), watches) == 4 and most <= 2
    assert graph_module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in graph_module.state_dict().items())
    seen: dict[str, list[torch.Tensor]] = {"relu": [], "conv2d_1": [], "dropout": []}
    for batch in batches():
        record: dict[str, Any] = {}
        evaluate(graph_module, (batch, {}), dtype=None, record=record)
        for name, values in seen.items():
            values.append(record[name])
    relu, conv, dropout = (torch.cat(values) for values in seen.values())
    torch.testing.assert_close(largest.largest, relu.abs().amax((0, 2, 3)), rtol=0, atol=0)
    torch.testing.assert_close(largest.mean, relu.abs().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.mean, conv.double().mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moments.var, conv.double().var((0, 2, 3)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second.matrix, (dropout.T @ dropout).double(), rtol=1e-5, atol=1e-6)


def test_there_must_be_data() -> None:
    graph_module = top.capture(*build("conv_residual"))
    with pytest.raises(top.ConfigError, match="empty"):
        watch_values(graph_module, [], {})
