"""Passes that bring a graph to int8: fake-quantize, calibrate, convert."""

from __future__ import annotations

from torchopt_passes.graph.quantization.absorb_high_bias import AbsorbHighBias
from torchopt_passes.graph.quantization.calibrate import Calibrate, SetObserverState
from torchopt_passes.graph.quantization.cluster_weights import ClusterWeights
from torchopt_passes.graph.quantization.convert_quantized import ConvertQuantized, LowerQuantizer
from torchopt_passes.graph.quantization.correct_bias import CorrectBias
from torchopt_passes.graph.quantization.equalize_layers import EqualizeLayers
from torchopt_passes.graph.quantization.insert_fake_quant import FakeQuantize, InsertFakeQuant
from torchopt_passes.graph.quantization.learn_steps import LearnStep, LearnSteps
from torchopt_passes.graph.quantization.optimize_rounding import OptimizeRounding
from torchopt_passes.graph.quantization.quantize_weights import QuantizeWeights
from torchopt_passes.graph.quantization.reconstruct_blocks import ReconstructBlocks
from torchopt_passes.graph.quantization.reestimate_batch_norm import ReestimateBatchNorm
from torchopt_passes.graph.quantization.relu6 import BoundReLU6, ReplaceReLU6
from torchopt_passes.graph.quantization.rescale import ScaleChannels, SetTensor
from torchopt_passes.graph.quantization.round_weights import RoundWeights
from torchopt_passes.graph.quantization.scale_outputs import ScaleOutputs
from torchopt_passes.graph.quantization.scale_weights import ScaleWeights
from torchopt_passes.graph.quantization.smooth_activations import SmoothActivations
from torchopt_passes.graph.quantization.split_outliers import SplitChannels, SplitOutliers
from torchopt_passes.graph.quantization.state import set_fake_quant, set_observers
from torchopt_passes.graph.quantization.store_codebook import StoreCodebook
from torchopt_passes.graph.quantization.store_integers import StoreIntegers

__all__ = [
    "AbsorbHighBias",
    "BoundReLU6",
    "Calibrate",
    "ClusterWeights",
    "ConvertQuantized",
    "CorrectBias",
    "EqualizeLayers",
    "FakeQuantize",
    "InsertFakeQuant",
    "LearnStep",
    "LearnSteps",
    "LowerQuantizer",
    "OptimizeRounding",
    "QuantizeWeights",
    "ReconstructBlocks",
    "ReestimateBatchNorm",
    "ReplaceReLU6",
    "RoundWeights",
    "ScaleChannels",
    "ScaleOutputs",
    "ScaleWeights",
    "SetObserverState",
    "SetTensor",
    "SmoothActivations",
    "SplitChannels",
    "SplitOutliers",
    "StoreCodebook",
    "StoreIntegers",
    "set_fake_quant",
    "set_observers",
]
