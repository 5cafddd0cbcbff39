"""Runtimes' own converters and quantizers, and NVIDIA's ModelOpt, on the data of the quantization benchmark.

The converters are those of `deploy_cells`, in its environment, on batches of 8; ``pip install nvidia-modelopt==0.47.0``
for the last: it rounds inputs and weights of convolutions and linears, and what lies between them stays float.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.deploy_cells_arms import SUFFIX
from benchmarks.deploy_cells_models import Cell, Encoder
from benchmarks.deploy_cells_peers import MOST, PEERS
from benchmarks.quality_quant_data import Suite

__all__ = ["modelopt", "runtime"]

Run = Callable[[Any], torch.Tensor]


def runtime(target: str) -> Callable[[Suite, dict[str, Any]], Run]:
    """Make an arm: what a runtime's converter and quantizer write, run by that runtime."""

    def make(suite: Suite, found: dict[str, Any]) -> Run:
        tool, write, read = PEERS[target]
        found["tool"] = tool
        is_text = isinstance(suite.calibration[0], dict)
        model = Encoder(suite.model).eval() if is_text else suite.model
        cell = Cell(suite.name, model, together(suite.calibration), together(suite.evaluation), pretrained=True)
        path = Path(tempfile.mkdtemp()) / f"model.{SUFFIX[target]}"
        write(cell, path, "int8", MOST)
        run = read(path, "int8")

        def call(batch: Any) -> torch.Tensor:
            parts = zip(*(value.split(MOST) for value in tensors(batch)), strict=True)
            return torch.cat([run(*part) for part in parts])

        return call

    return make


def tensors(batch: Any) -> tuple[torch.Tensor, ...]:
    """Return the inputs of a batch by position, as `Encoder` takes them."""
    return batch if isinstance(batch, tuple) else (batch["input_ids"], batch["attention_mask"])


def together(batches: list[Any]) -> tuple[torch.Tensor, ...]:
    """Return all batches as one."""
    return tuple(torch.cat(values) for values in zip(*map(tensors, batches), strict=True))


def modelopt(suite: Suite, found: dict[str, Any]) -> Run:
    import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]

    def call(model: Any, batch: Any) -> torch.Tensor:
        return model(*batch) if isinstance(batch, tuple) else model(**batch)[0]

    def forward(model: Any) -> None:
        for batch in suite.calibration:
            call(model, batch)

    with torch.no_grad():
        model = mtq.quantize(copy.deepcopy(suite.model), mtq.INT8_DEFAULT_CFG, forward)
    found["rounded"] = sum(name.endswith("weight_quantizer") and m.is_enabled for name, m in model.named_modules())
    return lambda batch: call(model, batch)
