"""What both tools are measured with: cost, the independent check, one training step, time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coverage_check import Removed, alive, distance, main_outputs, masked_outputs, plain_outputs
from benchmarks.coverage_models import BATCH, Case

__all__ = ["COLUMNS", "Row", "check", "cost", "peak", "timed", "train_step", "words"]

Row = dict[str, Any]
COLUMNS = (
    "suite", "model", "tool", "version", "size", "captured", "outcome", "groups", "units", "locked groups",
    "lock reasons", "parameters before", "parameters after", "share removed", "macs before", "macs after",
    "proof error", "check", "check error", "effect of removal", "trains", "seconds capture", "seconds prune",
    "peak MB", "peak MB of the row", "note", "locked",
)  # fmt: skip
RATIO = 0.5
TOLERANCE = 1e-6


def cost(module: nn.Module, args: Any, kwargs: Any) -> tuple[int, int]:
    """Return parameters (tied ones once) and multiply-accumulates of one sample in eval mode."""
    counter = FlopCounterMode(display=False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)  # the counter follows modules by their gradients, and trips over some
    try:
        with torch.no_grad(), _plain_attention(), counter:
            module(*args, **kwargs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2 // BATCH


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products, which the counter knows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def check(row: Row, case: Case, pruned: nn.Module, removed: Removed) -> None:
    """Compare the pruned model with the original masked; write outcome and numbers into the row.

    The original is built anew from the seed, so nothing that the tool did to a model is trusted. Where the plain check
    fails, the wide one of `KeptStatistics` may pass.
    """
    args, kwargs = case.inputs(BATCH)
    try:
        actual = plain_outputs(pruned, args, kwargs)
    except Exception as error:
        row |= {"outcome": "crash", "check": "the pruned model does not run", "note": words(error, "running it")}
        return
    finally:
        pruned.float()
    original = plain_outputs(case.build(), args, kwargs)
    try:
        expected = masked_outputs(case.build(), removed, args, kwargs)
        found, how = distance(actual, expected), "masked"
        if found is not None and found > TOLERANCE:
            again = masked_outputs(case.build(), removed, args, kwargs, wide=True)
            second = distance(actual, again)
            if second is not None and second <= TOLERANCE:
                found, expected, how = second, again, "masked, statistics wide"
    except Exception as error:
        row |= {"check": "not done", "note": words(error, "masking the original")}
        return
    row["check"] = how
    if found is None:
        row["outcome"] = "shape changed"
        row["note"] = f"outputs {[tuple(a.shape) for a in actual]}, before {[tuple(a.shape) for a in original]}"[:200]
        return
    row |= {"check error": found, "effect of removal": distance(original, expected)}
    row["outcome"] = "right" if found <= TOLERANCE else "silently wrong"
    if found <= TOLERANCE and not alive(expected):  # nothing detected, or a dead network: equal whatever was removed
        row |= {"outcome": "", "check": f"{how}; says nothing: every sample gives the same outputs, or none"}


def train_step(case: Case, pruned: nn.Module) -> str:
    """Return ``yes`` when one step in train mode has a finite loss and a gradient of its shape for every parameter.

    A parameter without a gradient counts only when it has one in the original; the same holds for an error.
    """
    try:
        loss, without = _step(pruned, case)
    except Exception as error:
        try:
            _step(case.build(), case)
        except Exception as usual:
            return words(usual, "not tried: nor does the original")
        return words(error, "no")
    if without:
        usual = _step(case.build(), case)[1]
        without = [name for name in without if name not in usual]
    if not torch.isfinite(loss):
        return f"no: loss {float(loss)}"
    return f"no: no gradient for {', '.join(without)}"[:200] if without else "yes"


def _step(module: nn.Module, case: Case) -> tuple[Tensor, list[str]]:
    args, kwargs = case.inputs(BATCH)
    torch.manual_seed(0)
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    optimizer.zero_grad()
    output = module(*args, **kwargs)
    loss = output.loss if getattr(output, "loss", None) is not None else None
    if loss is None:
        loss = torch.stack([leaf.square().mean() for leaf in main_outputs(output) if leaf.requires_grad]).sum()
    loss.backward()
    optimizer.step()
    bad = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or p.grad.shape != p.shape)]
    return loss.detach(), bad


@contextmanager
def timed(row: Row, column: str) -> Iterator[None]:
    """Add the CPU seconds of a block (one thread; other work on the machine does not count) to a column."""
    began = time.process_time()
    try:
        yield
    finally:
        row[column] = round(row.get(column, 0.0) + time.process_time() - began, 3)


def peak() -> int:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def words(error: BaseException, stage: str) -> str:
    """Return an error in one line: stage, type, message, and the last line of code outside of the benchmark."""
    frames = error.__traceback__
    where = ""
    while frames is not None:
        code = frames.tb_frame.f_code
        if "/benchmarks/" not in code.co_filename:
            where = f" ({'/'.join(code.co_filename.split('/')[-2:])}:{frames.tb_lineno})"
        frames = frames.tb_next
    text = " ".join(str(error).split())
    return f"{stage}: {type(error).__name__}: {text[:200]}{where}"
