"""Switches of a prepared graph: observers and rounding. They survive train(), eval() and checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import fx, nn

from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers

__all__ = ["fake_quant_off", "fake_quant_on", "set_fake_quant", "set_observers"]


def set_observers(graph_module: nn.Module, enabled: bool) -> int:
    """Switch the learning of ranges in training mode on or off; returns how many fake-quantizers there are."""
    count = 0
    for _, quantizer in fake_quantizers(graph_module):
        quantizer.observe(enabled)
        count += 1
    return count


def set_fake_quant(graph_module: nn.Module, enabled: bool) -> int:
    """Switch rounding on or off, in training and eval mode; returns how many fake-quantizers there are."""
    count = 0
    for _, quantizer in fake_quantizers(graph_module):
        quantizer.enable(enabled)
        count += 1
    return count


@contextmanager
def fake_quant_off(graph_module: fx.GraphModule) -> Generator[None]:
    """Run a block with rounding off; each fake-quantizer is as it was afterwards."""
    with _switched(graph_module, False):
        yield


@contextmanager
def fake_quant_on(graph_module: fx.GraphModule) -> Generator[None]:
    """Run a block with rounding on; each fake-quantizer is as it was afterwards."""
    with _switched(graph_module, True):
        yield


@contextmanager
def _switched(graph_module: fx.GraphModule, enabled: bool) -> Generator[None]:
    before = [(quantizer, quantizer.enabled) for _, quantizer in fake_quantizers(graph_module)]
    set_fake_quant(graph_module, enabled)
    try:
        yield
    finally:
        for quantizer, was in before:
            quantizer.enable(was)
