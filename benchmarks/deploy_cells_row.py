"""One cell in a process of its own: write the file, open it again, compare it with the model.

The process is forked from one that has the model and its data, which takes half a minute to make. That one computes
with a single thread, since the threads of OpenMP do not survive a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.deploy_cells_arms import Arm
from benchmarks.deploy_cells_models import Cell, answers, fidelity, make

__all__ = ["in_a_process", "prepare"]


def prepare(model: str, cache: Path) -> tuple[Cell, torch.Tensor]:
    """Make a model and its own answers, and store what the timed calls are given."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cell = make(model)
    (cache / model).mkdir(parents=True, exist_ok=True)
    save_file({str(place): x for place, x in enumerate(cell.example(8))}, cache / model / "inputs.safetensors")
    return cell, answers(cell, cell.model, 8)


def in_a_process(cell: Cell, wanted: torch.Tensor, arm: Arm, batch: int, cache: Path, limit: float) -> dict[str, Any]:
    """Fill a cell: what the file is, or why there is none."""
    log = cache / cell.name / f"{arm.name}-{batch}.log"
    place = log.with_suffix(".part")
    place.unlink(missing_ok=True)
    row: dict[str, Any] = {"model": cell.name, "arm": arm.name, "batch": batch, "open": False}
    started = time.perf_counter()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(cell, wanted, arm, batch, log, place))
    child.start()
    child.join(limit)
    late = child.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)  # compilers that it started too
    child.join()
    row["seconds"] = round(time.perf_counter() - started, 1)
    if place.exists():
        return row | json.loads(place.read_text())
    why = (
        f"not finished after {limit:.0f} seconds" if late else f"the process died with signal {-(child.exitcode or 0)}"
    )
    return row | {"failed": why}


def _run(cell: Cell, wanted: torch.Tensor, arm: Arm, batch: int, log: Path, place: Path) -> None:
    os.setpgrp()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(2)
    try:
        row = _row(cell, wanted, arm, batch, log.parent)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        row = {"failed": f"{type(error).__name__}: {text[:600]}"}
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    partial.replace(place)
    os._exit(0)  # runtimes crash at exit


def _row(cell: Cell, wanted: torch.Tensor, arm: Arm, batch: int, folder: Path) -> dict[str, Any]:
    path = arm.path(folder, batch)
    started = time.perf_counter()
    is_open = arm.write(cell, path, batch)
    seconds = time.perf_counter() - started
    files = [path] + [path.with_suffix(".bin")] * (path.suffix == ".xml")
    call = arm.read(lambda: cell, path)
    row: dict[str, Any] = {
        "open": is_open,
        "write_seconds": round(seconds, 1),
        "bytes": sum(file.stat().st_size for file in files),
        "fidelity": fidelity(cell, answers(cell, call, 8 if is_open else batch), wanted),
    }
    if arm.maker != "peer":
        import torchopt_passes as top

        report = top.open_artifact(path).report()
        row |= {"kernels": report.get("kernels", ""), "sizes": report.get("sizes", "")}
        row |= {name: report[f"verified {name}"] for name in ("error", "tolerance")}
    return row
