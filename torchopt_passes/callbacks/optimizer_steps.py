"""The moments before an optimizer step, when the gradients are final, and after one that has changed the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from torchopt_passes.errors import CallbackError

__all__ = ["after_each_step", "before_each_step"]


def before_each_step(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Call `act` before each update of an optimizer, whoever calls its step.

    Where the loop gives the step a closure (Lightning always does), the gradients exist only behind it: `act` is
    called between the closure and the update. Fused optimizers under a GradScaler get gradients that are scaled and
    may have overflowed: they are unscaled first, and a step that will be skipped is none.

    Args:
        optimizer: any of ``torch.optim``, torchao and the like.
        act: sees final gradients.

    Returns:
        What ends it.

    Raises:
        CallbackError: in the step, where the optimizer runs the closure more than once (LBFGS).
    """

    def hook(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            if not _overflowed(optimizer):
                _unscale(optimizer)
                act()
            return None
        calls = 0

        def closure_and_act() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise CallbackError(
                    f"{type(optimizer).__name__} runs its closure more than once a step: callbacks that act on the "
                    "gradients before the step need an optimizer with one gradient a step"
                )
            loss = closure()
            act()
            return loss

        if len(args) > 1:
            return (args[0], closure_and_act, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_and_act}

    return optimizer.register_step_pre_hook(hook)


def after_each_step(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Call `act` after each update of an optimizer; a step that a GradScaler skips is none.

    Most optimizers are not called for such a step. Fused ones are, and skip it themselves.

    Args:
        optimizer: any of ``torch.optim``, torchao and the like.
        act: sees the new weights.

    Returns:
        What ends it.
    """

    def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _overflowed(optimizer):
            act()

    return optimizer.register_step_post_hook(hook)


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a GradScaler has told a fused optimizer to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found)


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Take the scale of a GradScaler, which a fused optimizer would divide by itself, out of the gradients."""
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, torch.Tensor):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue] (None is: unscaled already)
