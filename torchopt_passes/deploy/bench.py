"""Any set of artefact files side by side: interleaved runs by batch size, and what opening each costs."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchopt_passes.deploy.artifact import Artifact, open_artifact
from torchopt_passes.deploy.benchmark import benchmark
from torchopt_passes.deploy.footprint import Footprint, footprint
from torchopt_passes.errors import ConfigError

__all__ = ["FileBenchmark", "FileTiming", "benchmark_files"]


@dataclass(frozen=True, kw_only=True)
class FileTiming:
    """How one file does at one batch size.

    Args:
        name: of the file; its path where two have one name.
        target: of the file.
        precision: of the file.
        batch: size of the batch.
        median: seconds a call.
        low: first quartile, seconds.
        high: third quartile, seconds.
        speedup: median of the first file / median of this one.
        speedup_low: first quartile of that ratio, turn by turn.
        speedup_high: third quartile.
        size: bytes on disk.
        load: seconds to open it in a fresh process.
        first_call: seconds of the first call there.
        memory: bytes at the peak there, above the imported runtime; None where the system does not tell.
    """

    name: str
    target: str
    precision: str
    batch: int
    median: float
    low: float
    high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    size: int
    load: float
    first_call: float
    memory: int | None


@dataclass(frozen=True, kw_only=True)
class FileBenchmark:
    """The figures of one run, by batch size and in the order the files were given.

    Args:
        timings: one for each file and batch size.
        threads: that torch and the runtimes used.
        cpus: the CPUs that the process was pinned to; empty where the system cannot.
        runs: timed calls of each.
        warmup: calls of each before that.
    """

    timings: tuple[FileTiming, ...]
    threads: int
    cpus: tuple[int, ...]
    runs: int
    warmup: int

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each file and batch size, for tables and JSON."""
        return [asdict(timing) for timing in self.timings]


def benchmark_files(
    paths: Sequence[str | Path],
    *,
    batches: Sequence[int] = (1, 8),
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> FileBenchmark:
    """Time artefacts of any targets on made-up inputs, in turn, on pinned threads.

    Args:
        paths: files that `export` wrote, of models with the same inputs; speed-ups are against the first.
        batches: sizes of the batch, where it is open.
        runs: timed calls of each.
        warmup: calls of each before that.
        threads: of torch and of the runtimes, which follow it; the process is pinned to as many CPUs meanwhile. None
            for torch's own number.

    Returns:
        Medians, quartiles and ratios by batch size; load time and peak memory, each of a process of its own.

    Raises:
        ConfigError: no files, options out of range, or files whose inputs differ; names them.
        ExportError: a file cannot be opened or called.
    """
    wanted = torch.get_num_threads() if threads is None else threads
    if not paths or not batches or wanted < 1 or min(batches) < 1:
        raise ConfigError("a benchmark needs files, batch sizes >= 1 and threads >= 1")
    places = [Path(path) for path in paths]
    names = [path.name if [p.name for p in places].count(path.name) == 1 else str(path) for path in places]
    if len(set(names)) != len(names):
        raise ConfigError(f"a file stands twice in {names}")
    with _pinned(wanted) as cpus:
        artifacts = {name: open_artifact(path) for name, path in zip(names, places, strict=True)}
        inputs = {batch: _inputs(artifacts, batch) for batch in batches}
        costs = {
            name: footprint(path, batch=batches[0], threads=wanted) for name, path in zip(names, places, strict=True)
        }
        timings = [
            timing
            for batch in batches
            for timing in _timings(artifacts, inputs[batch], costs, batch, runs=runs, warmup=warmup)
        ]
    return FileBenchmark(timings=tuple(timings), threads=wanted, cpus=cpus, runs=runs, warmup=warmup)


def _inputs(artifacts: dict[str, Artifact], batch: int) -> dict[str, list[torch.Tensor]]:
    """Return the inputs of each artefact, in its own order, the same values for the same name."""
    found = {name: artifact.metadata.made_up(batch) for name, artifact in artifacts.items()}
    shapes = {
        name: {spec.name: tuple(x.shape) for spec, x in zip(artifacts[name].metadata.inputs, values, strict=True)}
        for name, values in found.items()
    }
    first = next(iter(shapes))
    for name, mine in shapes.items():
        if mine != shapes[first]:
            raise ConfigError(f"{name} takes {mine}, {first} takes {shapes[first]}: they are not one model's files")
    return found


def _timings(
    artifacts: dict[str, Artifact],
    inputs: dict[str, list[torch.Tensor]],
    costs: dict[str, Footprint],
    batch: int,
    *,
    runs: int,
    warmup: int,
) -> list[FileTiming]:
    calls = {name: partial(artifact.run, inputs[name]) for name, artifact in artifacts.items()}
    result = benchmark(calls, (), runs=runs, warmup=warmup)
    return [
        FileTiming(
            name=timing.name,
            target=artifacts[timing.name].metadata.target,
            precision=artifacts[timing.name].metadata.precision,
            batch=batch,
            median=timing.median,
            low=timing.low,
            high=timing.high,
            speedup=timing.speedup,
            speedup_low=timing.speedup_low,
            speedup_high=timing.speedup_high,
            size=artifacts[timing.name].size,
            **asdict(costs[timing.name]),
        )
        for timing in result.timings
    ]


@contextmanager
def _pinned(threads: int) -> Generator[tuple[int, ...]]:
    """Give torch and the runtimes that follow it so many threads, and the process so many CPUs, for a while."""
    before = torch.get_num_threads()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if allowed and len(allowed) < threads:
        raise ConfigError(f"{threads} threads, and {len(allowed)} CPUs for them")
    torch.set_num_threads(threads)
    if allowed:
        os.sched_setaffinity(0, allowed[:threads])
    try:
        yield tuple(allowed[:threads])
    finally:
        torch.set_num_threads(before)
        if allowed:
            os.sched_setaffinity(0, allowed)
