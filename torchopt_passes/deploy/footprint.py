"""What opening an artefact costs: seconds to load, seconds of the first call, and memory, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from torchopt_passes.deploy.calls import cause_of
from torchopt_passes.errors import ExportError

__all__ = ["Footprint", "footprint"]

# Memory by /proc: the peak since the counter was reset; `getrusage` would begin with that of the parent process.
_CODE = """
import json, sys, time
from importlib import import_module
from pathlib import Path

import torch

from torchopt_passes.deploy import open_artifact
from torchopt_passes.deploy.base import find_target

path, batch, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
for package in find_target(path).packages:
    import_module(package)


def memory(what):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
    except OSError:
        return None


try:
    Path("/proc/self/clear_refs").write_text("5")
except OSError:
    pass
before = memory("VmRSS")
started = time.perf_counter()
artifact = open_artifact(path)
loaded = time.perf_counter()
inputs = artifact.metadata.made_up(batch)
called = time.perf_counter()
artifact.run(inputs)
ended = time.perf_counter()
peak = memory("VmHWM")
print(json.dumps({
    "load": loaded - started,
    "first_call": ended - called,
    "memory": None if before is None else max(peak - before, 0),
}))
"""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What opening an artefact costs.

    Args:
        load: seconds from the file to a model that is ready, its runtime imported already.
        first_call: seconds of the first call.
        memory: bytes at the peak of loading and the first call, above the process with the runtime imported; None where
            the system does not tell (it is read from Linux's ``/proc``).
    """

    load: float
    first_call: float
    memory: int | None


def footprint(path: str | Path, *, batch: int = 1, threads: int = 1, timeout: float = 600.0) -> Footprint:
    """Open an artefact in a fresh process, call it once, and return what that cost.

    Args:
        path: of a file that `export` wrote, of any target.
        batch: size of the batch, where it is open.
        threads: of torch, which artefacts follow.
        timeout: seconds to wait at most.

    Raises:
        ExportError: the file cannot be opened or called; the cause is named.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CODE, str(Path(path).resolve()), str(batch), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"{Path(path).name} could not be measured: {cause_of(error)}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ExportError(f"{Path(path).name} could not be measured: {why[0]}")
    return Footprint(**json.loads(lines[-1]))
