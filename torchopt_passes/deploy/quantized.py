"""A float model becomes an int8 graph for a target in one step: what ``export(quantization="int8")`` does."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.deploy.calls import example_call
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.deploy.layers import is_quantized
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.pipeline import Pipeline
from torchopt_passes.graph.quantization.calibrate import Calibrate
from torchopt_passes.graph.quantization.convert_quantized import ConvertQuantized
from torchopt_passes.graph.quantization.correct_bias import CorrectBias
from torchopt_passes.graph.quantization.insert_fake_quant import InsertFakeQuant
from torchopt_passes.graph.quantization.quantize_weights import QuantizeWeights
from torchopt_passes.graph.quantization.scale_outputs import ScaleOutputs
from torchopt_passes.graph.quantization.smooth_activations import SmoothActivations
from torchopt_passes.graph.quantization.targets import get_target

__all__ = ["quantized"]

_NORMS = {torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default}


def quantized(
    module: nn.Module, target: str, quantization: str, example_inputs: Any, calibration: Iterable[Any] | None
) -> fx.GraphModule:
    """Quantize a float model after training, on the grids that a target computes with on this machine.

    Biases are corrected, embeddings are stored in int8 with a scale for each row, and averages over all positions get
    twice the range that was seen. Where there are layer norms or RMS norms, a few channels behind them are far larger
    than the rest and matter: they are smoothed first, and ranges hold all that was seen (sentence embeddings of MiniLM
    keep a mean cosine of 0.998, see docs/deploy_cells.md). Where kernels of linears return int8, output channels that
    differ much get one range. On an x86 CPU without VNNI weights get 7 bits (`saturates`).

    Args:
        module: an ``nn.Module`` or a captured graph; left as it was.
        target: name of the deployment target.
        quantization: ``"int8"``.
        example_inputs: a call of the module; a captured graph remembers its own.
        calibration: batches for the ranges of activations.

    Returns:
        The converted graph.

    Raises:
        ConfigError: another quantization, no calibration data, or a graph that is quantized already.
    """
    if quantization != "int8":
        raise ConfigError(
            f'quantization must be "int8", not {quantization!r}; other precisions are options of a target'
        )
    if calibration is None:
        raise ConfigError('quantization="int8" needs calibration=: some batches of real data')
    if isinstance(module, fx.GraphModule):
        called = any(node.op == "call_module" for node in module.graph.nodes)
        if called or is_quantized(module):
            raise ConfigError(f"{type(module).__name__} is quantized already: ConvertQuantized, then export without it")
        graph: fx.GraphModule = copy.deepcopy(module)
    else:
        graph = capture(module, *example_call(module, example_inputs))
    context = PassContext(calibration=list(calibration))  # several passes read it
    return Pipeline(*_steps(graph, target))(graph.eval(), context).graph_module  # pyright: ignore


def _steps(graph: fx.GraphModule, target: str) -> list[GraphPass]:
    insert = InsertFakeQuant(target=target, qat=False, reduce_range=saturates(target))
    called = {node.target for node in graph.graph.nodes}
    normed = bool(called & _NORMS)
    return [
        *([SmoothActivations(alpha=0.8, insert=True)] if normed else []),
        *([ScaleOutputs()] if normed and "linear" in get_target(target).rounded_outputs else []),
        insert,
        Calibrate(method="minmax" if normed else "histogram", headroom=2.0),
        CorrectBias(max_batches=2),
        ConvertQuantized(),
        *([QuantizeWeights(linears=False, embeddings=True)] if torch.ops.aten.embedding.default in called else []),
    ]
