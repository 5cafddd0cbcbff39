"""FuseBatchNorm: equal in eval mode, on the graph and on the source; what cannot be folded says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.models import build
from torchopt_passes.graph.fusion import FuseBatchNorm


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fused_equals_before_and_the_source_is_untouched(eps: float, bias: bool, affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, eps=eps, affine=affine)).double().eval()
    nn.init.uniform_(model[1].running_mean, -1, 1)
    nn.init.uniform_(model[1].running_var, 1e-4, 1)
    if affine:
        nn.init.uniform_(model[1].weight, -1, 1)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x).detach()
    graph_module = top.capture(model, (x,))
    result = FuseBatchNorm()(graph_module)
    assert result.report.proof.status == "proven" and result.report.proof.error <= 1e-9
    torch.testing.assert_close(graph_module.eval()(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x), expected)
    assert set(graph_module.state_dict()) == {"0.weight", "0.bias"}
    graph_module.train()(x).sum().backward()
    result.plan.apply(model)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-9, atol=1e-9)


class Unfoldable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.bn_two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.free, self.bn_free = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.alone = nn.BatchNorm2d(3)
        self.tied = nn.Conv2d(3, 3, 1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        two = self.two(x)
        x = self.bn_two(two) + two
        x = self.bn_free(self.free(x))
        x = self.alone(torch.relu(x))
        return self.bn_a(self.tied(x)) + self.bn_b(self.tied(x))


def test_what_cannot_be_folded_says_why() -> None:
    model = Unfoldable()
    x = torch.randn(2, 3, 4, 4)
    result = FuseBatchNorm()(top.capture(model, (x,)))
    told = {row.target: row.reason for row in result.report.skipped}
    assert not result.modified
    assert "used by others" in told["bn_two"] and "no running statistics" in told["bn_free"]
    assert "no convolution or linear" in told["alone"]
    assert "shared" in told["bn_a"] and "shared" in told["bn_b"]


def test_dead_channel_is_its_beta() -> None:
    model, inputs = build("conv_residual")
    with torch.no_grad():
        model.bn1.weight[0] = 0.0
    graph_module = top.capture(model.eval(), inputs)
    assert FuseBatchNorm()(graph_module).report.proof.error <= 1e-9
    torch.testing.assert_close(graph_module(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
