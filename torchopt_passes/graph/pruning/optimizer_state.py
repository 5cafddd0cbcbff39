"""Optimizer state that follows the parameters it belongs to: moments are cut as their parameter was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.slicing import Removal, cut_tensor

__all__ = ["exchange_parameters", "slice_optimizer"]


def exchange_parameters(optimizer: Any, successors: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put parameters in the place of others in an optimizer: its groups, and the state, which is not cut yet."""
    new = {id(old): new for old, new in successors.items() if old is not new}
    for group in optimizer.param_groups if new else ():
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]
    for old, successor in successors.items():
        if old is not successor and old in optimizer.state:
            optimizer.state[successor] = optimizer.state.pop(old)


def slice_optimizer(optimizer: Any, removals: Mapping[nn.Parameter, Removal]) -> None:
    """Cut the state that an optimizer keeps for parameters that were cut.

    Moments of the parameter's shape are cut alike, factored ones (a row and a column vector for each matrix) along
    the dimensions they have; counters and numbers stay.

    Args:
        optimizer: a ``torch.optim`` optimizer, or what wraps one.
        removals: parameter -> what left it.

    Raises:
        PlanError: the optimizer holds none of the parameters, or keeps something that cannot be cut.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if removals and not any(id(parameter) in held for parameter in removals):
        raise PlanError("the optimizer holds none of the parameters that the plan cuts: is it another model's?")
    for parameter, removal in removals.items():
        state = optimizer.state.get(parameter)
        if state:
            for key in list(state):
                state[key] = _cut(state[key], removal, f"{type(optimizer).__name__} keeps {key!r}", str(key))


def _cut(value: Any, removal: Removal, what: str, key: str) -> Any:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, list | tuple | dict) and _has_tensor(value):
            raise PlanError(f"{what} as a {type(value).__name__} of tensors, which cannot be cut: {_WAY_OUT}")
        return value
    shape = tuple(value.shape)
    if shape == removal.new_shape or value.numel() == 1:
        return value
    if type(value) is not torch.Tensor:
        raise PlanError(f"{what} as a {type(value).__name__}, which cannot be cut: {_WAY_OUT}")
    dims = _dims(shape, removal.shape, key)
    if dims is None and _dims(shape, removal.new_shape, key) is not None:
        return value  # cut already
    if dims is None:
        raise PlanError(f"{what} of shape {shape} for a parameter of {removal.shape}, which cannot be cut: {_WAY_OUT}")
    kept = {i: removal.indices[dim] for i, dim in enumerate(dims) if shape[i] != 1 and dim in removal.indices}
    return cut_tensor(value, Removal(shape, kept))


_WAY_OUT = "apply the plan without optimizer= and make a new optimizer"


def _dims(shape: tuple[int, ...], whole: tuple[int, ...], key: str) -> tuple[int, ...] | None:
    """Return the dimension of the parameter that each dimension of its state follows.

    A state has the parameter's shape, that shape with ones (torch's Adafactor), or lacks one of the last two
    dimensions (Transformers' Adafactor: its key tells which, where the shape does not).

    Example:
        >>> _dims((4, 1), (4, 3), ""), _dims((4,), (4, 3), ""), _dims((4,), (4, 4), "exp_avg_sq_col")
        ((0, 1), (0,), (1,))
    """
    ndim = len(whole)
    if len(shape) == ndim and all(mine in (1, size) for mine, size in zip(shape, whole, strict=True)):
        return tuple(range(ndim))
    if ndim < 2 or len(shape) != ndim - 1:
        return None
    row, column = tuple(range(ndim - 1)), (*range(ndim - 2), ndim - 1)
    fitting = [dims for dims in (row, column) if tuple(whole[dim] for dim in dims) == shape]
    if len(fitting) == 2 and "row" in key:
        return row
    if len(fitting) == 2 and "col" in key:
        return column
    return fitting[0] if len(fitting) == 1 else None


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)
