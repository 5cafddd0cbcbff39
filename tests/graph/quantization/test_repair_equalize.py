"""EqualizeLayers and SplitOutliers: the paper's ranges, the same outputs, and less noise on grids of one step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import torchopt_passes as top
from tests.graph.quantization.helpers import nodes, prepare
from tests.models import build
from torchopt_passes.functional.affine import fold_batch_norm
from torchopt_passes.graph.quantization import EqualizeLayers, SplitOutliers
from torchopt_passes.graph.verify import sqnr

aten = torch.ops.aten


class Inverted(nn.Module):
    """An inverted residual block: expand, depthwise, project, batch norms between, ReLU or ReLU6."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3)
        self.depthwise, self.bn2 = nn.Conv2d(16, 16, 3, groups=16, bias=False, padding=1), nn.BatchNorm2d(16)
        self.project, self.bn3 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.act1, self.act2 = activation(), activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.expand(x)))
        x = self.act2(self.bn2(self.depthwise(x)))
        return self.bn3(self.project(x))


def badly_scaled(model: nn.Module, spread: float = 2.0) -> nn.Module:
    """Return a model whose batch norms have weights that differ by orders of magnitude between channels."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.2, 0.2, generator=generator)
            module.get_buffer("running_var").uniform_(0.2, 2.0, generator=generator)
            exponents = torch.randn(module.num_features, generator=generator) * spread
            module.weight.data = torch.exp(exponents)
            module.bias.data = torch.exp(exponents) * 0.1
    return model.eval()


def inverted(activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return badly_scaled(Inverted(activation)), torch.randn(4, 3, 12, 12)


def folded(module: nn.Module, conv: str, norm: str) -> torch.Tensor:
    weight = module.get_parameter(f"{conv}.weight").detach().double()
    state = {name: getattr(module.get_submodule(norm), name).detach().double() for name in ("weight", "bias")}
    state |= {name: getattr(module.get_submodule(norm), name).double() for name in ("running_mean", "running_var")}
    eps = {"bn1": 1e-3}.get(norm, 1e-5)
    values = (state["weight"], state["bias"], state["running_mean"], state["running_var"])
    gamma, beta, mean, var = values
    return fold_batch_norm(weight, None, gamma=gamma, beta=beta, mean=mean, var=var, eps=eps)[0]


def noise(model: nn.Module, x: torch.Tensor, *passes: top.GraphPass, **options: object) -> float:
    """Return the SQNR in dB of the model in int8 with one step for each weight, after some passes."""
    graph_module = top.capture(model, (x,)).eval()
    with torch.no_grad():
        expected = graph_module(x)
    for pass_ in passes:
        result = pass_(graph_module)
        assert result.report.proof.status == "proven"
    top.Pipeline(
        top.FuseBatchNorm(),
        top.InsertFakeQuant(target="onnx", qat=False, per_channel=False, **options),  # pyright: ignore[reportArgumentType]
        top.Calibrate(method="minmax"),
    )(graph_module, top.PassContext(calibration=[(x,)]))
    with torch.no_grad():
        return sqnr(graph_module(x), expected)


def test_ranges_are_equal_on_both_sides_of_each_pair() -> None:
    model, x = inverted()
    graph_module = top.capture(model, (x,))
    result = EqualizeLayers()(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
    expand = folded(graph_module, "expand", "bn1").abs().flatten(1).amax(1)
    depthwise = folded(graph_module, "depthwise", "bn2").abs().flatten(1).amax(1)
    project = folded(graph_module, "project", "bn3").abs().amax((0, 2, 3))
    torch.testing.assert_close(expand, depthwise, rtol=1e-4, atol=0)
    torch.testing.assert_close(depthwise, project, rtol=1e-4, atol=0)
    # the fixed point of a triple: every side has the cube root of the product of the three ranges
    before = [
        folded(model, "expand", "bn1").abs().flatten(1).amax(1),
        folded(model, "depthwise", "bn2").abs().flatten(1).amax(1),
        folded(model, "project", "bn3").abs().amax((0, 2, 3)),
    ]
    for channel in range(16):
        product = math.prod(float(side[channel]) for side in before)
        assert float(depthwise[channel]) == pytest.approx(product ** (1 / 3), rel=1e-3)


def test_a_chain_of_linears_against_the_loop_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))
    weights = [model.get_parameter(f"{i}.weight").detach().double().clone() for i in (0, 2, 4)]
    for _ in range(500):
        for first, second in itertools.pairwise(weights):
            for i in range(len(first)):
                r1, r2 = float(first[i].abs().max()), float(second[:, i].abs().max())
                s = math.sqrt(r1 * r2) / r2
                first[i] /= s
                second[:, i] *= s
    graph_module = top.capture(model, (torch.randn(3, 5),))
    EqualizeLayers()(graph_module)
    for place, expected in zip((0, 2, 4), weights, strict=True):
        got = graph_module.get_parameter(f"{place}.weight").detach().double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_int8_with_one_step_for_each_weight_gains() -> None:
    model, x = inverted()
    before, after = noise(model, x), noise(model, x, EqualizeLayers())
    assert before < 20 and after > before + 10


def test_relu6_is_skipped_or_replaced() -> None:
    model, x = inverted(nn.ReLU6)
    result = EqualizeLayers()(top.capture(model, (x,)))
    assert not result.modified and "hardtanh" in str(result.report)
    graph_module = top.capture(model, (x,)).eval()
    result = EqualizeLayers(relu6="relu")(graph_module)
    assert result.report.proof.status == "proven" and not nodes(graph_module, aten.hardtanh.default)
    as_relu, _ = inverted(nn.ReLU)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), as_relu(x), rtol=1e-4, atol=1e-4)
        assert float((graph_module(x) - model(x)).abs().max()) > 0.01  # this input is above 6 somewhere
    with pytest.raises(top.PlanError, match="captured graph"):
        result.plan.apply(model)


def test_relu6_with_a_bound_for_each_channel_is_exact() -> None:
    model, x = inverted(nn.ReLU6)
    graph_module = top.capture(model, (x,)).eval()
    result = EqualizeLayers(relu6="channel")(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
    expand = folded(graph_module, "expand", "bn1").abs().flatten(1).amax(1)
    depthwise = folded(graph_module, "depthwise", "bn2").abs().flatten(1).amax(1)
    torch.testing.assert_close(expand, depthwise, rtol=1e-4, atol=0)
    # section 4.1.1: the breakpoint 6 is divided by the scale, channel by channel
    moved = folded(model, "expand", "bn1").abs().flatten(1).amax(1) / expand
    bounds = [buffer for name, buffer in graph_module.named_buffers() if name.endswith("_bound")]
    for channel in range(16):
        assert float(bounds[0][channel, 0, 0]) == pytest.approx(6.0 / float(moved[channel]), rel=1e-4)
    with torch.no_grad():
        clipped = model.get_submodule("bn1")(model.get_submodule("expand")(x)) > 6
        assert bool(clipped.any()), "the bound matters"
        torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)
    assert not EqualizeLayers(relu6="channel")(graph_module).modified
    # bounds are moved along with what they bound
    scaled = top.capture(model, (x,)).eval()
    EqualizeLayers(relu6="channel", max_sweeps=1)(scaled)
    again = EqualizeLayers(relu6="channel")(scaled)
    assert again.report.proof.status == "proven" and {e.target for e in again.plan.edits} & {"hardtanh_bound"}


def test_relu6_of_joined_layers_has_the_bounds_of_both() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.clamp(torch.cat([self.a(x), self.b(x)], -1), 0, 0.5))

    torch.manual_seed(0)
    model, x = Joined(), torch.randn(64, 4)
    graph_module = top.capture(model, (x,)).eval()
    result = EqualizeLayers(relu6="channel")(graph_module)
    assert result.report.proof.status == "proven"
    bound = graph_module.get_buffer("clamp_bound")
    for name, part in (("a", bound[:3]), ("b", bound[3:])):
        old, new = (m.get_parameter(f"{name}.weight").detach().abs().amax(1) for m in (model, graph_module))
        torch.testing.assert_close(part, 0.5 * new / old, rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), model(x))


@pytest.mark.parametrize("activation", [nn.Hardtanh, lambda: nn.Hardtanh(0.5, 2.0), lambda: nn.Threshold(0.1, 20)])
def test_what_is_no_relu6_is_left_alone(activation: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3))
    for relu6 in ("channel", "relu"):
        assert not EqualizeLayers(relu6=relu6)(top.capture(model, (torch.randn(2, 4),))).modified


def test_residual_streams_are_left_alone() -> None:
    model, inputs = build("conv_residual")
    report = EqualizeLayers()(top.capture(model, inputs)).report
    told = {row.target: row.reason for row in report.skipped}
    assert "a sum with others" in told["bn1.weight"] and "a sum with others" in told["bn2.weight"]
    assert {row.target for row in report.changed} == {"depthwise.weight", "depthwise.bias", "fc.weight"}


class Pair(nn.Module):
    """Two layers with a batch norm and a curved function between, the second with a few large input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40)
        self.second = nn.Conv2d(40, 6, 3)
        with torch.no_grad():
            self.second.weight[:, [3, 17]] *= torch.tensor([9.0, 6.0]).view(1, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.norm(self.first(x))))


def test_split_channels_halve_the_range_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model, x = badly_scaled(Pair(), spread=0.0), torch.randn(4, 3, 10, 10)
    graph_module = top.capture(model, (x,))
    result = SplitOutliers(ratio=0.1)(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
    (edit,) = result.plan.edits
    assert edit.channels[0] == 3 and len(edit.channels) == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert edit.numbers["range_after"] < edit.numbers["range_before"] / 2
    assert graph_module.get_parameter("second.weight").shape == (6, 44, 3, 3)
    assert graph_module.get_buffer("norm.running_var").shape == (44,)
    assert model.get_parameter("second.weight").shape == (6, 40, 3, 3)
    graph_module.train()(torch.randn(3, 3, 10, 10)).sum().backward()
    assert graph_module.get_parameter("first.weight").grad is not None
    with pytest.raises(top.PlanError, match="captured graph"):
        result.plan.apply(model)


def test_split_outliers_gain_with_few_bits() -> None:
    torch.manual_seed(0)
    model, x = badly_scaled(Pair(), spread=0.0), torch.randn(4, 3, 10, 10)
    before = noise(model, x, weight_bits=5)
    after = noise(model, x, SplitOutliers(ratio=0.1), weight_bits=5)
    assert after > before + 3


def test_what_is_not_split_says_why() -> None:
    model, x = inverted()
    told = {row.target: row.reason for row in SplitOutliers()(top.capture(model, (x,))).report.skipped}
    assert "reads its channels in groups" in told["expand.weight"]
    assert "makes its channels in groups" in told["depthwise.weight"]
    assert isinstance(prepare(model, [(x,)]), fx.GraphModule)
    with pytest.raises(top.ConfigError, match="before InsertFakeQuant"):
        SplitOutliers()(prepare(model, [(x,)]))


def test_a_graph_that_was_saved_and_loaded_is_not_split_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    graph_module = top.capture(model, (torch.randn(2, 4),))
    assert SplitOutliers(ratio=0.2)(graph_module).modified
    again = top.load_captured(top.save_captured(graph_module, tmp_path / "graph"))
    assert not SplitOutliers(ratio=0.2)(again).modified
