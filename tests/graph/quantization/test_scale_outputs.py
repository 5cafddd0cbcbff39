"""ScaleOutputs: the scale of the formula, the same outputs, and small channels that int8 kernels keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.graph.quantization import ScaleChannels
from torchopt_passes.graph.quantization.scale_value import ScaleValue
from torchopt_passes.graph.verify import evaluate, sqnr

WIDTH, OUTLIERS = 32, [3, 17]


class Encoder(nn.Module):
    """A feed-forward block with a residual: a few channels of what goes into the stream are large, as in BERT."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH, bias=bias)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))


def encoder(**options: Any) -> tuple[Encoder, list[tuple[torch.Tensor]]]:
    torch.manual_seed(0)
    model = Encoder(**options).eval()
    with torch.no_grad():
        model.down.weight[OUTLIERS] *= 100.0
        model.norm.weight.mul_(30.0)[OUTLIERS] = 0.1
    return model, [(torch.randn(n, 6, WIDTH),) for n in (3, 5)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_scale_and_the_gain_are_the_formula(bias: bool) -> None:
    model, batches = encoder(bias=bias)
    graph = top.capture(model, batches[0]).eval()
    plan = top.ScaleOutputs().plan(graph, top.PassContext(calibration=iter(batches)))
    with torch.no_grad():
        outputs = torch.cat([model.down(nn.functional.gelu(model.up(x))).flatten(0, 1) for (x,) in batches])
    reach = [float(outputs[:, c].abs().max()) for c in range(WIDTH)]
    middle = math.sqrt(max(reach) * min(reach))
    gain = 20 * math.log10(max(reach) / math.sqrt(sum(r * r for r in reach) / WIDTH))
    scaled = {edit.target: edit for edit in plan.edits if isinstance(edit, ScaleChannels)}
    assert set(scaled) == {"down.weight"} | ({"down.bias"} if bias else set())
    (multiplied,) = [edit for edit in plan.edits if isinstance(edit, ScaleValue)]
    for edit in (*scaled.values(), multiplied):
        assert edit.scale.tolist() == pytest.approx([r / middle for r in reach], rel=1e-5)
        assert edit.numbers["gain_db"] == pytest.approx(gain, rel=1e-5) and gain > 12
    assert all(edit.divide for edit in scaled.values()) and not multiplied.divide
    reasons = {skip.target: skip.reason for skip in plan.skips}
    assert reasons["up.weight"].startswith("nothing to do: scaled outputs gain ")
    assert reasons["head.weight"] == "linear_2 gives an output, or what runs in its kernel follows"


def test_channels_that_hardly_move_are_not_blown_up() -> None:
    model, batches = encoder(bias=False)
    with torch.no_grad():
        model.down.weight[5] = 0.0
    plan = top.ScaleOutputs().plan(top.capture(model, batches[0]), top.PassContext(calibration=batches))
    scale = next(edit.scale for edit in plan.edits if isinstance(edit, ScaleValue))
    assert float(scale.max() / scale.min()) == pytest.approx(1024.0)


@pytest.mark.parametrize("target", ["litert", "executorch"])
def test_int8_kernels_keep_the_small_channels(target: str) -> None:
    model, batches = encoder()
    noise: list[float] = []
    for passes in ((), (top.ScaleOutputs(),)):
        graph, context = top.capture(model, batches[0]).eval(), top.PassContext(calibration=batches)
        (expected,) = evaluate(graph, (batches[0], {}), dtype=None)
        for step in passes:
            result = step(graph, context)
            assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
            assert not step(graph, context).modified
        top.InsertFakeQuant(target=target, qat=False)(graph, context)
        top.Calibrate(method="minmax")(graph, context)
        noise.append(sqnr(evaluate(graph, (batches[0], {}), dtype=None)[0], expected))
    assert noise[1] > noise[0] + 10, noise


def test_what_cannot_be_scaled_is_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.two.bias = self.one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.three(self.one(x) + self.two(x))) * 2.0

    x = (torch.randn(4, WIDTH),)
    graph, context = top.capture(Tied(), x), top.PassContext(calibration=[x])
    report = top.ScaleOutputs(min_gain=1e-9)(graph, context).report
    assert {row.target: row.reason for row in report.skipped} == {
        "one.weight": "the bias of linear is no parameter of its own",
        "two.weight": "the bias of linear_1 is no parameter of its own",
        "three.weight": "linear_2 gives an output, or what runs in its kernel follows",
    }
