"""Training on a grid about zero: values that all lie on one side get no zero point, by the fused operation either."""

from __future__ import annotations

import pytest
import torch

from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (-2.0, -0.5), (-1.0, 2.0)])
def test_a_signed_grid_stays_about_zero_in_training(low: float, high: float) -> None:
    quantizer = FakeQuantizer(bits=8, signed=True).train()
    x = torch.linspace(low, high, 31)
    rounded = quantizer(x)
    scale = torch.tensor(2.0 / 127)
    assert int(quantizer.zero_point) == 0
    torch.testing.assert_close(quantizer.scale, scale.reshape(1))
    torch.testing.assert_close(rounded, (x / scale).round() * scale)
    assert (float(quantizer.min_val), float(quantizer.max_val)) == (low, high)
