"""Reading what a model was given and what it returned: ModelOutput, dict, tuple or a plain tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchopt_passes.errors import CallbackError

__all__ = ["accepts", "argument", "field", "loss_of", "with_loss"]


def accepts(module: nn.Module, name: str) -> bool:
    """Return whether the module's forward takes a keyword argument of that name, ``**kwargs`` included."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return the value that a call gave to the argument `name` of forward, by position or keyword, or None."""
    if name in kwargs:
        return kwargs[name]
    positional = list(inspect.signature(module.forward).parameters)[: len(args)]
    return args[positional.index(name)] if name in positional else None


def loss_of(output: Any) -> torch.Tensor | None:
    """Return the loss in a model's output: its field ``loss``, the scalar that leads a tuple, or a scalar itself.

    Example:
        >>> loss_of({"loss": torch.tensor(2.0), "logits": torch.zeros(3)})
        tensor(2.)
        >>> loss_of((torch.zeros(2, 3),)) is None
        True
    """
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "_fields"):
        loss = output[0] if output else None
    elif isinstance(output, torch.Tensor):
        loss = output
    else:
        loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    return loss


def with_loss(output: Any, loss: torch.Tensor) -> Any:
    """Return the output with another loss, of the same type; only objects with attributes are changed in place."""
    if isinstance(output, torch.Tensor):
        return loss
    if isinstance(output, tuple):
        if hasattr(output, "_replace"):
            return output._replace(loss=loss)  # pyright: ignore[reportAttributeAccessIssue]
        return (loss, *output[1:])
    if type(output) is dict:
        return {**output, "loss": loss}
    if hasattr(output, "loss"):  # ModelOutput keeps item and attribute equal
        output.loss = loss
        return output
    output["loss"] = loss
    return output


def field(output: Any, name: str, who: str) -> torch.Tensor:
    """Return a tensor of a model's output by name; a plain tensor is its own logits.

    Args:
        output: what the model returned.
        name: such as ``"logits"``.
        who: the model in the error, ``"teacher"`` or ``"student"``.

    Raises:
        CallbackError: there is no such tensor; the message lists what there is.
    """
    if isinstance(output, torch.Tensor):
        return output
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if value is None and isinstance(output, tuple) and name == "logits":
        tensors = [item for item in output if isinstance(item, torch.Tensor) and item.ndim > 0]
        value = tensors[0] if tensors else None
    if isinstance(value, torch.Tensor):
        return value
    names = list(output) if isinstance(output, Mapping) else list(vars(output)) if hasattr(output, "__dict__") else []
    raise CallbackError(
        f"the {who} returned {type(output).__name__} without a tensor {name!r}"
        + (f"; it has {names}" if names else "")
        + f": name the field with logits=, or let the {who} return one"
    )
