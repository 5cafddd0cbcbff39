"""Timing of any set of callables side by side: interleaved, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchopt_passes.deploy.calls import eval_mode
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call

__all__ = ["Benchmark", "Timing", "benchmark"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long one callable takes.

    Args:
        name: of the callable.
        median: seconds a call.
        low: first quartile, seconds.
        high: third quartile, seconds.
        speedup: median of the first callable / median of this one.
        speedup_low: first quartile of the ratio in each turn: how sure the speed-up is.
        speedup_high: third quartile of it.
        runs: calls that were timed.
    """

    name: str
    median: float
    low: float
    high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The timings of one run, in the order the callables were given.

    Args:
        timings: one for each callable.
        threads: threads that torch used.
        warmup: calls of each that were not counted.
    """

    timings: tuple[Timing, ...]
    threads: int
    warmup: int

    def __getitem__(self, name: str) -> Timing:
        return {timing.name: timing for timing in self.timings}[name]

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each callable, for tables and JSON."""
        return [asdict(timing) | {"threads": self.threads} for timing in self.timings]

    def __str__(self) -> str:
        width = max(len(timing.name) for timing in self.timings)
        return "\n".join(
            f"{t.name:<{width}}  {t.median * 1e3:9.3f} ms [{t.low * 1e3:.3f}, {t.high * 1e3:.3f}]  {t.speedup:6.2f}x"
            for t in self.timings
        )


def benchmark(
    candidates: Mapping[str, Callable[..., Any]], inputs: Any, *, runs: int = 50, warmup: int = 5
) -> Benchmark:
    """Time callables on the same inputs, in turn: forward, backward, forward, ...

    Args:
        candidates: modules (run in eval mode), artefacts or functions, by name; speed-ups are against the first.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments, given to every candidate.
        runs: timed calls of each.
        warmup: calls of each before that.

    Returns:
        Medians and quartiles in seconds; torch's thread count is recorded, and artefacts follow it.

    Raises:
        ConfigError: no candidates, or fewer than one run.

    Example:
        >>> result = benchmark({"a": torch.sin, "b": torch.cos}, torch.ones(4), runs=3)
        >>> [t.name for t in result.timings], result["a"].speedup
        (['a', 'b'], 1.0)
    """
    if not candidates or runs < 1 or warmup < 0:
        raise ConfigError(f"benchmark needs candidates and runs >= 1 (got {len(candidates)} candidates, {runs} runs)")
    args, kwargs = as_call(inputs)
    cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves((args, kwargs)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    with ExitStack() as stack:
        for candidate in candidates.values():
            if isinstance(candidate, nn.Module):
                stack.enter_context(eval_mode(candidate))
        stack.enter_context(torch.inference_mode())
        for turn in range(warmup + runs):
            for name in names if turn % 2 == 0 else reversed(names):
                elapsed = _time(candidates[name], args, kwargs, cuda=cuda)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    first = seconds[names[0]]
    return Benchmark(
        timings=tuple(_timing(name, seconds[name], first) for name in names),
        threads=torch.get_num_threads(),
        warmup=warmup,
    )


def _time(candidate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    candidate(*args, **kwargs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _timing(name: str, seconds: list[float], first: list[float]) -> Timing:
    low, median, high = _quartiles(seconds)
    ratios = [theirs / max(ours, 1e-12) for theirs, ours in zip(first, seconds, strict=True)]
    return Timing(
        name=name,
        median=median,
        low=low,
        high=high,
        speedup=statistics.median(first) / max(median, 1e-12),
        speedup_low=_quartiles(ratios)[0],
        speedup_high=_quartiles(ratios)[2],
        runs=len(seconds),
    )


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
