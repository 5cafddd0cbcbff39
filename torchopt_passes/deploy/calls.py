"""Calls of a source module: their forms, their names, their batch, and running one in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.inference import leaf_names, named_outputs
from torchopt_passes.graph.verify import Inputs, in_eval_mode

__all__ = [
    "batch_size",
    "cause_of",
    "eval_mode",
    "example_call",
    "named_inputs",
    "resize_batch",
    "run_source",
    "without_cache",
]


def example_call(module: nn.Module, inputs: Any) -> Inputs:
    """Return the example call of a module: `inputs`, or what a captured graph remembers.

    Raises:
        ConfigError: neither is there.
    """
    if inputs is None:
        inputs = cast("dict[str, Any]", getattr(module, "meta", {})).get("example_inputs")
    if inputs is None:
        raise ConfigError(f"{type(module).__name__}: example_inputs are needed to trace and verify it")
    return as_call(inputs)


def cause_of(error: BaseException) -> str:
    """Return the first line of the innermost cause of an error: compilers wrap theirs several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def named_inputs(module: nn.Module, call: Inputs) -> dict[str, Any]:
    """Return a call's values by the names of ``forward``'s parameters; nested ones joined by ``_``.

    Raises:
        ConfigError: the call does not fit the signature.

    Example:
        >>> named_inputs(nn.Linear(2, 2), ((1,), {}))
        {'input': 1}
    """
    try:
        bound = inspect.signature(module.forward).bind(*call[0], **call[1])
    except TypeError as error:
        raise ConfigError(f"the inputs do not fit {type(module).__name__}.forward: {error}") from error
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return dict(leaf_names(arguments))


def run_source(module: nn.Module, call: Inputs) -> dict[str, torch.Tensor]:
    """Run a module in eval mode, untouched otherwise, and return its tensors by output name."""
    with eval_mode(module), torch.no_grad(), without_cache(module):
        result = module(*call[0], **call[1])
    return {name: value for name, value in named_outputs(result) if isinstance(value, torch.Tensor)}


def resize_batch(call: Inputs, size: int) -> Inputs:
    """Return a call with another batch size, by repeating or dropping rows of every tensor with the batch's dim 0."""
    old = batch_size(call)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if old is None or tensor.ndim == 0 or tensor.shape[0] != old:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % old].contiguous()

    return cast("Inputs", pytree.tree_map_only(torch.Tensor, resize, call))


def batch_size(call: Inputs) -> int | None:
    """Return the size of dim 0 when the first tensor has one; inputs of another size are no batch."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    return int(tensors[0].shape[0]) if tensors else None


@contextmanager
def eval_mode(module: nn.Module) -> Generator[None]:
    """Eval mode, where the module can switch; graphs of ``torch.export`` cannot (`to_inference` has checked them)."""
    with ExitStack() as stack:
        with suppress(NotImplementedError):
            stack.enter_context(in_eval_mode(module))
        yield


@contextmanager
def without_cache(module: nn.Module) -> Generator[None]:
    """Switch off ``config.use_cache`` for a while: a key-value cache is no tensor, so no runtime could return it."""
    config = getattr(module, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        config.use_cache = True  # pyright: ignore[reportOptionalMemberAccess]
