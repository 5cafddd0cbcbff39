"""Passes that bring a graph to int8: fake-quantize, calibrate, convert."""

from __future__ import annotations

from torchopt_passes.graph.quantization.calibrate import Calibrate, SetObserverState
from torchopt_passes.graph.quantization.convert_quantized import ConvertQuantized, LowerQuantizer
from torchopt_passes.graph.quantization.insert_fake_quant import FakeQuantize, InsertFakeQuant
from torchopt_passes.graph.quantization.state import set_fake_quant, set_observers

__all__ = [
    "Calibrate",
    "ConvertQuantized",
    "FakeQuantize",
    "InsertFakeQuant",
    "LowerQuantizer",
    "SetObserverState",
    "set_fake_quant",
    "set_observers",
]
