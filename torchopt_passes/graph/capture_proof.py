"""The proof of a capture: the graph gives the outputs of its source, in both modes, on the example inputs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.captured import CapturedModule
from torchopt_passes.graph.tracing import Call, no_cache
from torchopt_passes.graph.verify import relative_error

__all__ = ["prove_capture"]

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


def prove_capture(model: nn.Module, captured: CapturedModule, call: Call) -> None:
    """Run source and graph on the example inputs with the same random numbers, in both modes, and compare.

    Both are left as they were: buffers (they share them), modes and random states.

    Args:
        model: the source.
        captured: its graph.
        call: the example call that was traced.

    Raises:
        CaptureError: the outputs differ; the graph would be silently wrong.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return  # there is nothing to compute with
    tolerance = _TOLERANCE.get(captured.dtype, 1e-4)
    for training in (False, True):
        with no_cache(model):
            expected = _outputs(model, call, training)
            error = relative_error(_outputs(captured, call, training), expected)
            if error > tolerance and training:
                with _NoScalarDraws():  # export leaves out draws that nothing reads, such as layer drop's with p = 0
                    error = relative_error(_outputs(captured, call, training), _outputs(model, call, training))
        if error > tolerance:
            raise CaptureError(
                f"the graph of {type(model).__name__} does not compute what the model does in "
                f"{'train' if training else 'eval'} mode (relative error {error:.1e}, {tolerance:.0e} allowed): its "
                "Python keeps state between calls, or decides by something that is no input. Way out: capture the "
                "submodule that does the work"
            )


def _outputs(module: nn.Module, call: Call, training: bool) -> Any:
    with _as_it_was(module), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        module.train(training)
        return module(*call.args, **call.kwargs)


@contextmanager
def _as_it_was(module: nn.Module) -> Generator[None]:
    modes = {child: child.training for child in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    was_training = module.training
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        module.train(was_training)
        for child, mode in modes.items():
            child.training = mode


class _NoScalarDraws(TorchFunctionMode):
    """Let ``torch.rand([])`` draw nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand and args and args[0] in ([], ()):
            return torch.tensor(1.0)
        return func(*args, **(kwargs or {}))
