"""Passes that bring a graph to int8: fake-quantize, calibrate, convert."""

from __future__ import annotations

from torchopt_passes.graph.quantization.calibrate import Calibrate, SetObserverState
from torchopt_passes.graph.quantization.cluster_weights import ClusterWeights
from torchopt_passes.graph.quantization.convert_quantized import ConvertQuantized, LowerQuantizer
from torchopt_passes.graph.quantization.insert_fake_quant import FakeQuantize, InsertFakeQuant
from torchopt_passes.graph.quantization.state import set_fake_quant, set_observers
from torchopt_passes.graph.quantization.store_codebook import StoreCodebook

__all__ = [
    "Calibrate",
    "ClusterWeights",
    "ConvertQuantized",
    "FakeQuantize",
    "InsertFakeQuant",
    "LowerQuantizer",
    "SetObserverState",
    "StoreCodebook",
    "set_fake_quant",
    "set_observers",
]
