"""What a teacher is given: the student's inputs, or its own out of the same batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.callbacks.outputs import argument

__all__ = ["InputsOf", "extra_columns", "named_inputs", "to_model", "token_mask"]

InputsOf = Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A teacher's own inputs: its argument -> a column of the batch, or a function from the batch to its arguments."""


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call by the names of forward's parameters."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def extra_columns(model: nn.Module, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the keyword inputs that forward does not name: those of a batch that are for the teacher alone."""
    parameters = inspect.signature(model.forward).parameters
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [name for name in kwargs if name not in named and name != "num_items_in_batch"]


def to_model(inputs: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Return inputs with their tensors on a device, those of floating point in a dtype; None leaves them."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return pytree.tree_map(move, inputs)


def token_mask(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str) -> torch.Tensor | None:
    """Return which tokens of a call are not padding, bool (B, T), for a layer; None where the call does not say.

    Args:
        model: unwrapped.
        args: of the call.
        kwargs: of the call.
        path: of the layer: those of a decoder behind an encoder see the decoder's tokens.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder" in path.split("."):
        mask = argument(model, args, kwargs, "decoder_attention_mask")
        labels = argument(model, args, kwargs, "labels")
        if mask is None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
            mask = labels.ne(IGNORE_INDEX)
    else:
        mask = argument(model, args, kwargs, "attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return mask.ne(0)
