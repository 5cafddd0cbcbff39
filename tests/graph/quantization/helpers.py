"""What the tests of quantization share: prepare, calibrate and look into graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import torchopt_passes as top
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.targets import TARGETS

ATEN = torch.ops.aten
UINT8_TARGETS = [name for name, target in TARGETS.items() if "uint8 activations" not in target.no_grid]
"""The targets whose activations are uint8 unless asked otherwise."""


def prepare(model: nn.Module, batches: list[Any], **options: Any) -> fx.GraphModule:
    """Capture in eval mode, insert fake-quantizers and calibrate by min-max."""
    first = batches[0]
    graph_module = top.capture(model, (), first) if isinstance(first, dict) else top.capture(model, first)
    graph_module.eval()
    InsertFakeQuant(**({"qat": False} | options))(graph_module)
    Calibrate(method="minmax")(graph_module, top.PassContext(calibration=batches))
    return graph_module


def convert(model: nn.Module, batches: list[Any], **options: Any) -> fx.GraphModule:
    graph_module = prepare(model, batches, **options)
    result = ConvertQuantized()(graph_module)
    assert result.report.proof.status == "proven"
    return graph_module


def quantizers(graph_module: nn.Module) -> dict[str, FakeQuantizer]:
    return {name.removeprefix("fake_quant."): q for name, q in fake_quantizers(graph_module)}


def nodes(graph_module: fx.GraphModule, target: object) -> list[fx.Node]:
    return graph_module.graph.find_nodes(op="call_function", target=target)


@torch.no_grad()
def output(graph_module: nn.Module, batch: Any) -> torch.Tensor:
    result = graph_module(**batch) if isinstance(batch, dict) else graph_module(*batch)
    return result if isinstance(result, torch.Tensor) else result.logits


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())
