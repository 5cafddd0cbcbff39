"""Observers for calibration: torchao's, by method."""

from __future__ import annotations

from typing import Any

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer

__all__ = ["METHODS", "RangeObserver"]

METHODS = ("histogram", "minmax", "moving_average")


class RangeObserver:
    """Watch the values of one edge, batch by batch, in bounded memory, and choose its range.

    Args:
        method: ``"minmax"``: smallest and largest value seen; ``"moving_average"``: their moving average with weight
            0.01; ``"histogram"``: the range inside the extremes that minimizes the squared rounding error of a
            2048-bin histogram.
        quantizer: the fake-quantizer it watches for: width and sign of the grid.

    Source:
        torchao's `MinMaxObserver`, `MovingAverageMinMaxObserver` and `HistogramObserver`.
    """

    def __init__(self, method: str, quantizer: FakeQuantizer) -> None:
        # torchao takes more than a second to import: only who calibrates pays
        from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

        types: dict[str, Any] = {
            "histogram": HistogramObserver,
            "minmax": MinMaxObserver,
            "moving_average": MovingAverageMinMaxObserver,
        }
        if method not in types:
            raise ConfigError(f"no calibration method is named {method!r}; known: {list(METHODS)}")
        self._quantizer = quantizer
        self._histogram = method == "histogram"
        self._observer = types[method](
            dtype=quantizer.dtype,
            qscheme=torch.per_tensor_symmetric if quantizer.signed else torch.per_tensor_affine,
            quant_min=quantizer.quant_min,
            quant_max=quantizer.quant_max,
        ).to(quantizer.scale.device)
        # torchao searches for the best 8-bit range whatever the grid is: tell it how many levels there are
        self._observer.dst_nbins = 2**quantizer.bits

    def watch(self, x: torch.Tensor) -> None:
        """Take one batch into account."""
        self._observer(x.detach().float())

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen smallest and largest value, each of shape [1]."""
        observer, quantizer = self._observer, self._quantizer
        if not self._histogram:
            return observer.min_val.reshape(1), observer.max_val.reshape(1)
        scale, zero_point = observer.calculate_qparams()
        low = (quantizer.quant_min - zero_point) * scale
        high = (quantizer.quant_max - zero_point) * scale
        return low.reshape(1), high.reshape(1)
