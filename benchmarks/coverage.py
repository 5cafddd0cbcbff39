"""What can be pruned: every model of torchvision, timm's families and Transformers, by this library and its peer.

    python benchmarks/coverage.py --suite torchvision                       # both tools, every model
    python benchmarks/coverage.py --suite timm --only '*vit*' --tool ours
    python benchmarks/coverage.py --suite all --resume                      # only rows that have no outcome yet
    python benchmarks/coverage.py --docs                                    # docs/coverage.md, of the record alone

Half of every group is removed (ratio 0.5) with nothing said of any model but the size of its inputs. Each row is a
process of its own; rows are written to benchmarks/records/coverage.csv as they are ready, and one that is run again
replaces the old one.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import fnmatch
import gc
import json
import os
import platform
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

from benchmarks.coverage_models import SUITES, Case, cases  # noqa: E402
from benchmarks.coverage_row import COLUMNS, Row, peak  # noqa: E402

RECORDS = ROOT / "benchmarks" / "records"
RECORD = RECORDS / "coverage.csv"
ENVIRONMENT = RECORDS / "coverage.json"
TOOLS = {"ours": "torchopt_passes", "torch-pruning": "torch-pruning"}
CPU_LIMIT, WALL_LIMIT = 600, 1800
"""Seconds after which a row's process is ended, check and training step included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--only", default="*", help="glob on the models' names")
    parser.add_argument("--tool", choices=[*TOOLS, "both"], default="both")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that have an outcome")
    parser.add_argument("--again", metavar="OUTCOME", help="only the rows of the record that have this outcome")
    parser.add_argument("--docs", action="store_true", help="write docs/coverage.md of the record and stop")
    options = parser.parse_args()
    if options.docs:
        from benchmarks.coverage_page import write_page

        write_page(read(), json.loads(ENVIRONMENT.read_text()))
        return
    suites = list(SUITES) if options.suite == "all" else [options.suite]
    tools = list(TOOLS) if options.tool == "both" else [options.tool]
    done = {(r["suite"], r["model"], r["tool"]) for r in read() if r["outcome"]} if options.resume else set()
    again = {(r["suite"], r["model"], r["tool"]) for r in read() if r["outcome"] == options.again}
    write_environment()
    for suite in suites:
        wanted = [case for case in cases(suite) if fnmatch.fnmatch(case.name, options.only)]
        rows = [(case, tool) for case in wanted for tool in tools]
        rows = [(case, tool) for case, tool in rows if (case.suite, case.name, TOOLS[tool]) not in done]
        if options.again:
            rows = [(case, tool) for case, tool in rows if (case.suite, case.name, TOOLS[tool]) in again]
        # the peer sees a model once: what is refused or freed here is another configuration of a model in the list
        run_all([(c, tool) for c, tool in rows if tool == "ours" or not (c.refused or c.free_outputs)], options.jobs)


def run_all(rows: list[tuple[Case, str]], jobs: int) -> None:
    """Run the rows, so many processes at once, and write each as it ends."""
    preload()
    running: dict[int, tuple[int, Case, str, float]] = {}
    waiting = list(rows)
    while waiting or running:
        while waiting and len(running) < jobs:
            case, tool = waiting.pop(0)
            pid, pipe = start(case, tool)
            running[pipe] = (pid, case, tool, time.monotonic() + WALL_LIMIT)
        soonest = min(deadline for *_, deadline in running.values())
        ready, _, _ = select.select(list(running), [], [], max(0.0, soonest - time.monotonic()))
        for pipe, (pid, case, tool, deadline) in list(running.items()):
            if pipe in ready or time.monotonic() >= deadline:
                del running[pipe]
                write(finish(pid, pipe, case, tool, in_time=pipe in ready))


def preload() -> None:
    """Import what every row needs once: a row's process is a copy of this one, which runs no model itself."""
    import torch
    import torch_pruning
    import torchvision  # noqa: F401

    import torchopt_passes as top

    del torch_pruning
    torch.set_num_threads(1)
    top.capture, top.measure  # noqa: B018 (the names are lazy)
    gc.freeze()


def start(case: Case, tool: str) -> tuple[int, int]:
    """Start the row's process; return its id and the pipe that it writes the row to."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(row_of(case, tool)))
        status = 0
    finally:
        os._exit(status)


def row_of(case: Case, tool: str) -> Row:
    import logging
    import warnings

    from benchmarks.coverage_row import words

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    row: Row = {"suite": case.suite, "model": case.name, "tool": TOOLS[tool], "size": case.size, "outcome": ""}
    try:
        runner(tool)(case, row)
    except MemoryError as error:
        row |= {"outcome": "out of memory", "note": words(error, "row")}
    except Exception as error:
        row["note"] = words(error, "the benchmark itself")  # no outcome: this says nothing of the tool
    row["peak MB of the row"] = peak()
    if row.get("parameters after"):
        row["share removed"] = round(1 - row["parameters after"] / row["parameters before"], 4)
    return row


def runner(tool: str) -> Callable[[Case, Row], None]:
    if tool == "ours":
        from benchmarks.coverage_ours import run
    else:
        from benchmarks.coverage_peer import run
    return run


def finish(pid: int, pipe: int, case: Case, tool: str, *, in_time: bool) -> Row:
    """Return the row that the process wrote, or one that says how it ended."""
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(pipe) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if text and os.WIFEXITED(status):
        return json.loads(text)
    row = {"suite": case.suite, "model": case.name, "tool": TOOLS[tool], "size": case.size}
    if not in_time:
        return row | {"outcome": "timeout", "note": f"the whole row: over {WALL_LIMIT} seconds"}
    if not os.WIFSIGNALED(status):
        return row | {"outcome": "crash", "note": f"its process ended with status {os.WEXITSTATUS(status)}"}
    ended = signal.Signals(os.WTERMSIG(status))
    if ended is signal.SIGXCPU:
        return row | {"outcome": "timeout", "note": f"the whole row: over {CPU_LIMIT} CPU seconds"}
    outcome = "out of memory" if ended is signal.SIGKILL else "crash"
    return row | {"outcome": outcome, "note": f"its process was ended by {ended.name}"}


def write(row: Row) -> None:
    """Put a row into the record, in the order of suite, model and tool; two runs may write at once."""
    with _locked():
        rows = {(r["suite"], r["model"], r["tool"]): {n: _text(r[n]) for n in COLUMNS} for r in read()}
        rows[row["suite"], row["model"], row["tool"]] = {name: _text(row.get(name, "")) for name in COLUMNS}
        partial = RECORD.with_suffix(".csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))
        partial.replace(RECORD)
    shown = ("model", "tool", "outcome", "share removed", "check error", "trains", "seconds prune", "note")
    print(*[f"{_text(row[name])[:150]} |" for name in shown if row.get(name) not in (None, "")], flush=True)


def read() -> list[dict[str, str]]:
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def write_environment() -> None:
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    found: dict[str, Any] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    found |= {"cpu": cpu[0] if cpu else platform.processor(), "cores": os.cpu_count(), "threads of a row": 1}
    found |= {"memory GiB": memory[0] if memory else None, "ratio": 0.5, "batch": 2}
    ENVIRONMENT.write_text(json.dumps(found, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@contextmanager
def _locked() -> Any:
    folder = os.open(RECORDS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _text(value: Any) -> str:
    """Return a cell: numbers below 0.01 in two digits, files by their path inside a package or this repository."""
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return f"{value:.2g}"
    return "" if value is None else re.sub(r"/\S*/site-packages/", "", str(value)).replace(f"{ROOT}/", "")


if __name__ == "__main__":
    main()
