"""llmcompressor's GPTQ and AWQ on the grid of the weight-only benchmark: int4, symmetric, groups of 64.

``pip install llmcompressor==0.14.0.1`` (in an environment of its own: it pins Transformers).
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["compress"]


def compress(model: Any, tokenizer: Any, calibrated: list[Any], method: str) -> int:
    """Quantize the linears of the blocks in place, on the given documents; returns how many there are.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer (llmcompressor asks for one).
        calibrated: token ids, shape [1, length] each.
        method: ``"rtn"``, ``"gptq"``, or ``"awq"``.
    """
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationArgs,
        QuantizationScheme,
    )
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]

    def unpinned(*_: Any, **__: Any) -> None:
        """Stand in for its `pin_memory`, which fails on machines without an accelerator."""

    IntermediatesCache.pin_memory = unpinned

    grid = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    groups = {"blocks": QuantizationScheme(targets=["Linear"], weights=grid)}
    options: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    recipes: dict[str, list[Any]] = {
        "rtn": [QuantizationModifier(**options)],
        "gptq": [GPTQModifier(**options)],
        "awq": [AWQModifier(), QuantizationModifier(**options)],
    }
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibrated]
    loader = DataLoader(rows, batch_size=None)  # pyright: ignore[reportArgumentType]
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # it reads the configuration of the file that a model comes from
        model.config._name_or_path = folder
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=loader,
            recipe=recipes[method],
            num_calibration_samples=len(rows),
        )
    return sum(hasattr(module, "quantization_scheme") for module in model.modules())
