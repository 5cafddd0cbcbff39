"""AbsorbHighBias: the paper's rule by a loop, the same outputs where values are above c, and a smaller range."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import relative
from tests.models import HighBias, build
from torchopt_passes.graph.quantization import AbsorbHighBias, EqualizeLayers


def absorbed_by_hand(model: HighBias) -> HighBias:
    """Section 4.1.3, channel by channel; what a layer without a bias takes goes off its batch norm's mean."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for norm, layer, behind in ((twin.norm1, twin.depthwise, twin.norm2), (twin.norm2, twin.last, None)):
            for i in range(8):
                c = max(0.0, float(norm.bias[i]) - 3 * abs(float(norm.weight[i])))
                norm.bias[i] -= c
                for o in range(len(layer.weight)):
                    if layer.groups == 1 or o == i:
                        added = c * float(layer.weight[o, 0 if layer.groups > 1 else i].sum())
                        if behind is None:
                            layer.bias[o] += added  # pyright: ignore[reportOptionalSubscript]
                        else:
                            behind.running_mean[o] -= added
    return twin


def made() -> tuple[HighBias, torch.Tensor]:
    model, (x,) = build("high_bias")
    assert isinstance(model, HighBias)
    return model.eval(), x


def test_the_rule_of_the_paper_on_graph_and_source() -> None:
    model, x = made()
    graph_module = top.capture(model, (x,)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = AbsorbHighBias()(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
    expected = absorbed_by_hand(model).state_dict()
    for name, value in graph_module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    changed = {edit.target for edit in result.plan.edits}
    assert changed == {"norm1.bias", "norm2.bias", "norm2.running_mean", "last.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the source is as it was"
    )
    result.plan.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), graph_module(x))


def test_outputs_are_the_same_where_all_values_are_above_c() -> None:
    model, x = made()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight *= 0.1  # c is lower by three of ten deviations that the values need
    graph_module = top.capture(model, (x,)).eval()
    # with ten deviations no value of this input is below c
    assert AbsorbHighBias(deviations=10.0)(graph_module).modified
    with torch.no_grad():
        assert relative(graph_module(x), model(x)) < 1e-5


def test_the_range_of_activations_gets_smaller_and_rounding_finer() -> None:
    model, _ = made()
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.norm1.weight *= 0.3
        model.norm2.weight *= 0.3
    model.train()
    for _ in range(50):  # statistics of the data, as the rule supposes
        model(x)
    model.eval()
    context = top.PassContext(calibration=[(x,)])
    noise: dict[bool, float] = {}
    largest: dict[bool, float] = {}
    for absorb in (False, True):
        graph_module = top.capture(model, (x,)).eval()
        if absorb:
            assert AbsorbHighBias()(graph_module).modified
        with torch.no_grad():
            exact = graph_module(x)
            assert relative(exact, model(x)) < 0.01
        top.InsertFakeQuant(qat=False, activation_bits=5)(graph_module, context)
        plan = top.Calibrate(method="minmax")(graph_module, context).plan
        largest[absorb] = max(edit.numbers["max"] for edit in plan.edits if edit.target.startswith("relu"))
        with torch.no_grad():
            noise[absorb] = relative(graph_module(x), exact)
    assert largest[True] < 0.4 * largest[False] and noise[True] < noise[False]


def test_equalize_then_absorb() -> None:
    model, x = made()
    with torch.no_grad():
        model.norm1.weight *= torch.logspace(-2, 1, 8)
        model.norm1.bias *= torch.logspace(-2, 1, 8)
    graph_module = top.capture(model, (x,)).eval()
    for pass_ in (EqualizeLayers(), AbsorbHighBias()):
        assert pass_(graph_module).report.proof.status == "proven"
    assert not AbsorbHighBias()(graph_module).modified


class Refused(nn.Module):
    """High biases that cannot move: padding, a residual sum, a curved function, no bias behind, a shared bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.d = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))
        return self.d(torch.relu(self.norm_c(self.c(nn.functional.avg_pool2d(x, 2)))))


def test_what_cannot_move_says_why() -> None:
    torch.manual_seed(0)
    model = Refused().eval()
    for norm in (model.norm_a, model.norm_b, model.norm_c):
        nn.init.constant_(norm.bias, 9.0)
    result = AbsorbHighBias()(top.capture(model, (torch.randn(2, 3, 8, 8),)))
    told = {row.target: row.reason for row in result.report.skipped}
    assert not result.modified
    assert "pads its input with zeros" in told["norm_a.weight"]
    assert "avg_pool2d (avg_pool2d) is between the ReLU and what reads it" in told["norm_b.weight"]
    assert "has no bias, and no batch norm is behind it" in told["norm_c.weight"]
    prepared = top.InsertFakeQuant()(top.capture(model, (torch.randn(2, 3, 8, 8),))).graph_module
    with pytest.raises(top.ConfigError, match="before InsertFakeQuant"):
        AbsorbHighBias()(prepared)
