"""The forms in which a user gives the inputs of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from torchopt_passes.graph.verify import Inputs

__all__ = ["as_call", "batch_size"]


def as_call(inputs: Any) -> Inputs:
    """Return inputs in any accepted form as ``(args, kwargs)``.

    Args:
        inputs: one value, a tuple or list of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``.

    Example:
        >>> as_call({"input": 1}), as_call((1, 2)), as_call(1), as_call(((1,), {"flag": True}))
        (((), {'input': 1}), ((1, 2), {}), ((1,), {}), ((1,), {'flag': True}))
    """
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in cast("Mapping[Any, Any]", inputs).items()}
    if isinstance(inputs, list | tuple):
        items = tuple(cast("tuple[Any, ...]", inputs))
        if len(items) == 2 and isinstance(items[0], tuple) and isinstance(items[1], dict):
            return cast("Inputs", items)
        return items, {}
    return (inputs,), {}


def batch_size(inputs: Inputs) -> int:
    """Return the number of samples in a call: the first dimension of its first tensor that has one, else 1.

    Example:
        >>> batch_size(((torch.ones(4, 3),), {}))
        4
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    return max(int(tensors[0].shape[0]), 1) if tensors else 1
