"""Observers for calibration: watch one edge of the graph, batch by batch, and choose its range by a method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import ranges
from torchopt_passes.functional.aciq import gaussian_range, laplace_range
from torchopt_passes.functional.histogram import StreamingHistogram
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer
from torchopt_passes.ranks import max_over_ranks, ranges_over_ranks, sum_over_ranks

__all__ = ["METHODS", "ChosenRange", "RangeObserver"]

METHODS = (
    "histogram",
    "minmax",
    "moving_average",
    "percentile",
    "mse",
    "entropy",
    "gaussian",
    "laplace",
    "auto",
)


@dataclass(frozen=True)
class ChosenRange:
    """What an observer has chosen.

    Args:
        method: which method; for ``"auto"`` the one that was best.
        low: smallest value, shape [1].
        high: largest value, shape [1].
        sqnr: signal-to-quantization-noise ratio of the values seen, in dB, by method that was tried; empty when the
            method keeps no histogram, and without those that have no error.
    """

    method: str
    low: torch.Tensor
    high: torch.Tensor
    sqnr: dict[str, float] = field(default_factory=dict[str, float])


class RangeObserver:
    """Watch the values of one edge, batch by batch, in bounded memory, and choose its range.

    Args:
        method: ``"minmax"``: smallest and largest value seen; ``"moving_average"``: their moving average with weight
            0.01; ``"histogram"``: torchao's search, from both ends of its own histogram, for less rounding error.
            The others read one `StreamingHistogram` (the order of batches does not matter): ``"percentile"``,
            ``"mse"`` (least squared error), ``"entropy"`` (least KL divergence), ``"gaussian"`` and ``"laplace"``
            (analytic clip of ACIQ); see `torchopt_passes.functional.ranges` and `.aciq`. ``"auto"``: the best of
            min-max and these by SQNR on that histogram, the first named where two are equal.
        quantizer: the fake-quantizer it watches for: width and sign of the grid.
        percentile: of ``"percentile"``.

    Source:
        torchao's `MinMaxObserver`, `MovingAverageMinMaxObserver` and `HistogramObserver`; the rest as each function.
    """

    def __init__(self, method: str, quantizer: FakeQuantizer, *, percentile: float = 99.99) -> None:
        if method not in METHODS:
            raise ConfigError(f"no calibration method is named {method!r}; known: {list(METHODS)}")
        self._method, self._quantizer, self._percentile = method, quantizer, percentile
        torchaos = method in {"histogram", "minmax", "moving_average"}
        self._observer: Any = _torchao_observer(method, quantizer) if torchaos else None
        self._histogram = None if torchaos else StreamingHistogram()

    def watch(self, x: torch.Tensor) -> None:
        """Take one batch into account."""
        if self._histogram is None:
            self._observer(x.detach().float())
        else:
            self._histogram.add(x)

    def gather(self, ranks: Any) -> None:
        """Take into account what all ranks of a process group have seen, each the same edge on its own batches.

        Raises:
            ConfigError: the method depends on the order of the batches.
        """
        seen = self._histogram
        if seen is not None:
            lowest = torch.iinfo(torch.int64).min
            exponent = max_over_ranks(torch.tensor(lowest if seen.exponent is None else seen.exponent), ranks)
            if int(exponent) != lowest:
                seen.widen(int(exponent))
            counts = sum_over_ranks(torch.cat([seen.counts, torch.tensor([seen.zeros])]), ranks)
            seen.counts, seen.zeros = counts[:-1], int(counts[-1])
            low, high = (torch.tensor(value, dtype=torch.float64) for value in (seen.low, seen.high))
            seen.low, seen.high = (float(value) for value in ranges_over_ranks(low, high, ranks))
        elif self._method == "minmax":
            low, high = ranges_over_ranks(self._observer.min_val, self._observer.max_val, ranks)
            self._observer.min_val.copy_(low)
            self._observer.max_val.copy_(high)
        else:
            raise ConfigError(f'{self._method!r} depends on the order of the batches: take "minmax", "mse" or "auto"')

    def choose(self) -> ChosenRange:
        """Choose the range for what was seen."""
        if self._histogram is not None:
            return self._from_histogram(self._histogram)
        observer, quantizer = self._observer, self._quantizer
        low, high = observer.min_val, observer.max_val
        if self._method == "histogram":
            scale, zero_point = observer.calculate_qparams()
            low = (quantizer.quant_min - zero_point) * scale
            high = (quantizer.quant_max - zero_point) * scale
        return ChosenRange(self._method, low.reshape(1), high.reshape(1))

    def _from_histogram(self, seen: StreamingHistogram) -> ChosenRange:
        if not seen.total:
            raise ConfigError("there were no values to calibrate on")
        quantizer = self._quantizer
        grid = ranges.Grid(quantizer.quant_min, quantizer.quant_max, symmetric=quantizer.signed)
        counts, edges = seen.bins()
        rules: dict[str, Callable[..., ranges.Range]] = {
            "minmax": ranges.minmax_range,
            "percentile": partial(ranges.percentile_range, percentile=self._percentile, zeros=seen.zeros),
            "mse": ranges.mse_range,
            "entropy": ranges.entropy_range,
            "gaussian": gaussian_range,
            "laplace": laplace_range,
        }
        names = list(rules) if self._method == "auto" else [self._method]
        found = torch.tensor([rules[name](counts, edges, grid) for name in names], dtype=torch.float64)
        # the outer bins reach beyond what was seen
        bound = max(-seen.low, seen.high)
        smallest, largest = (-bound, bound) if grid.symmetric else (min(seen.low, 0.0), max(seen.high, 0.0))
        low, high = found[:, 0].clamp(min=smallest).float(), found[:, 1].clamp(max=largest).float()
        errors = ranges.rounding_error(counts, edges, low, high, grid)
        signal = ranges.signal_energy(counts, edges)
        sqnr = {name: ranges.sqnr_db(signal, float(error)) for name, error in zip(names, errors, strict=True)}
        best = int(errors.argmin())
        known = {name: value for name, value in sqnr.items() if math.isfinite(value)}
        return ChosenRange(names[best], low[best].reshape(1), high[best].reshape(1), known)


def _torchao_observer(method: str, quantizer: FakeQuantizer) -> Any:
    # torchao takes more than a second to import: only who calibrates with it pays
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

    types: dict[str, Any] = {
        "histogram": HistogramObserver,
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageMinMaxObserver,
    }
    observer = types[method](
        dtype=quantizer.dtype,
        qscheme=torch.per_tensor_symmetric if quantizer.signed else torch.per_tensor_affine,
        quant_min=quantizer.quant_min,
        quant_max=quantizer.quant_max,
    ).to(quantizer.scale.device)
    # torchao searches for the best 8-bit range whatever the grid is: tell it how many levels there are
    observer.dst_nbins = 2**quantizer.bits
    return observer
