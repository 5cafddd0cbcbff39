"""The capture matrix: every promise of `capture` on every model, in numbers.

    .venv/bin/python -m benchmarks.capture_matrix transformers       # all, or the named ones: ... transformers bert t5
    .venv-2.14/bin/python -m benchmarks.capture_matrix torchvision
    .venv/bin/python -m benchmarks.capture_matrix docs               # docs/capture_matrix.md, of the record alone

Rows are written to benchmarks/records/capture_matrix.csv as they are ready; one that is run again replaces the old one.
"""

from __future__ import annotations

import csv
import fcntl
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from tests.graph import promises
from tests.hf_models import MODELS, HFModel
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.capture import CapturedModule, capture
from torchopt_passes.graph.saving import load_captured, save_captured

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "capture_matrix.csv"
PAGE = ROOT / "docs" / "capture_matrix.md"

TOLERANCE = 1e-6
FACTS = ("family", "model", "class", "parameters", "nodes", "open dims", "seconds", "captured")
CHECKS = {
    "eval": "outputs in eval mode",
    "train": "outputs in train mode, dropout drawing the same numbers",
    "gradients": "gradients in train mode, relative to the parameter's largest",
    "batch 1": "eval outputs at batch size 1",
    "other size": "eval outputs at batch size 3, and another length where it is open",
    "other size train": "train outputs and gradients at that size",
    "deterministic": "eval mode gives the same bits twice",
    "train again": "after eval mode, train mode drops again (or the model has no dropout)",
    "state": "the names of the state dict, and the same Parameter objects, as the source",
    "untouched": "capture left weights, modes and random state of the source as they were",
    "deepcopy": "a deepcopy equals the graph, shares nothing with it, and has its own mode",
    "two steps": "parameters and buffers after two optimizer steps",
    "release": "`release` gives the source back, computing what the graph does",
    "fresh process": "saved, and loaded in a process that has only the files: eval outputs",
}


def main(arguments: list[str]) -> None:
    """Run a family (or the named models of it), or write the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    family, *names = arguments
    if family == "docs":
        write_page()
    elif family == "worker":
        answer_folders()
    else:
        models = models_of(family)
        with Worker() as worker:
            for name in names or models:
                write(row_of(family, name, models[name], worker))


def models_of(family: str) -> dict[str, HFModel]:
    if family == "transformers":
        return MODELS
    from tests.torchvision_models import torchvision_models

    return torchvision_models()


def row_of(family: str, name: str, spec: HFModel, worker: Worker) -> dict[str, Any]:
    torch.manual_seed(0)
    model = spec.build()
    row: dict[str, Any] = {"family": f"{family} {_version(family)}, torch {torch.__version__.split('+')[0]}"}
    row |= {"model": name, "class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    source = promises.reference(model)
    random_state, began = torch.get_rng_state(), time.perf_counter()
    try:
        graph = capture(model, *spec.case(2))
    except CaptureError as error:
        row["captured"] = f"refused: {spec.reason or error}"
        return row
    except Exception as error:
        row["captured"] = f"FAILED: {type(error).__name__}: {error}"[:200]
        return row
    row |= {"seconds": round(time.perf_counter() - began, 1), "captured": "yes", "nodes": len(graph.graph.nodes)}
    row["open dims"] = "; ".join(f"{n} {list(d)}" for n, d in graph.meta["dynamic_dims"].items())
    case, one, other = spec.case(2), spec.case(1), spec.case(3, other=True)
    torch.set_rng_state(random_state)

    def step(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=1e-3)

    checks: dict[str, Callable[[], Any]] = {
        "untouched": lambda: promises.distance(dict(model.state_dict()), dict(source.state_dict())) == 0,
        "state": lambda: promises.names_and_objects(graph, model),
        "eval": lambda: promises.in_eval(graph, source, case),
        "train,gradients": lambda: promises.in_train(graph, source, case),
        "batch 1": lambda: promises.in_eval(graph, source, one),
        "other size": lambda: promises.in_eval(graph, source, other),
        "other size train": lambda: max(promises.in_train(graph, source, other)),
        "deterministic": lambda: promises.deterministic(graph, case),
        "train again": lambda: promises.drops(graph, case) == spec.drops,
        "two steps": lambda: promises.two_steps(step, graph, source, case),
        "release": lambda: promises.released(graph, model, case),
        "fresh process": lambda: worker.distance(graph),
        "deepcopy": lambda: promises.copied(graph, case),
    }
    for names, check in checks.items():
        try:
            found = check()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:160]
        values = found if isinstance(found, tuple) else (found,) * len(names.split(","))
        row |= dict(zip(names.split(","), values, strict=True))
        gc.collect()
    return row


class Worker:
    """A second process that knows nothing but the files of `save_captured`: it loads, runs, and compares."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.capture_matrix", "worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def distance(self, graph: CapturedModule) -> Any:
        args, kwargs = graph.meta["example_inputs"]
        with tempfile.TemporaryDirectory() as folder:
            graph.eval()
            with torch.no_grad():
                save_file(_leaves(graph(*args, **kwargs)), f"{folder}/outputs")
            save_captured(graph, f"{folder}/graph")
            if not self.process.stdin or not self.process.stdout:
                raise RuntimeError("the second process has no pipes")
            print(folder, file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def answer_folders() -> None:
    """Answer each line of stdin (a folder) with the distance of the loaded graph's outputs."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        folder = line.strip()
        try:
            loaded = load_captured(f"{folder}/graph")
            args, kwargs = loaded.meta["example_inputs"]
            with torch.no_grad():
                ours = _leaves(loaded(*args, **kwargs))
            answer: Any = promises.distance(ours, load_file(f"{folder}/outputs"))
            del loaded
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:160]
        print(json.dumps(answer), file=answers, flush=True)
        gc.collect()


def _leaves(output: Any) -> dict[str, torch.Tensor]:
    return {str(i): t.contiguous() for i, t in enumerate(pytree.tree_leaves(output)) if t is not None}


def write(row: dict[str, Any]) -> None:
    """Put a row into the record; two families may be run at once."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with (RECORD.parent / ".capture_matrix.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _replace_row(row)
    bad = [name for name in CHECKS if row.get("captured") == "yes" and not _holds(_text(row[name]))]
    print(row["model"], row["captured"], row.get("seconds", ""), {n: row[n] for n in bad} or "all hold", flush=True)


def _replace_row(row: dict[str, Any]) -> None:
    rows = {(r["family"].split()[0], r["model"]): r for r in read()}
    rows[row["family"].split()[0], row["model"]] = {k: _text(row.get(k, "")) for k in (*FACTS, *CHECKS)}
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FACTS, *CHECKS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def read() -> list[dict[str, str]]:
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def write_page() -> None:
    """Write the page of the record: what is promised, the rows, and what is refused with its reason."""
    rows = read()
    captured = [r for r in rows if r["captured"] == "yes"]
    refused = [r for r in rows if r["captured"] != "yes"]
    broken = [(r, n) for r in captured for n in CHECKS if not _holds(r[n])]
    made = (
        "Made by `benchmarks/capture_matrix.py` from `benchmarks/records/capture_matrix.csv`. Every model has random "
        "weights; the Transformers models have tiny configurations (`tests/hf_models.py`), torchvision's are the real "
        "ones on small images (`tests/torchvision_models.py`). One thread, CPU, float32."
    )
    counts = (
        f"{len(captured)} models are captured, {len(refused)} are refused with a reason, {len(broken)} of "
        f"{len(captured) * len(CHECKS)} promises are broken."
    )
    key = (
        "Columns: `=` means equal to the last bit, a number is the largest absolute difference (a promise holds up to "
        f"{TOLERANCE:g}), `yes` that the promise holds."
    )
    lines = ["# What `capture` keeps, model by model", "", made, "", counts, "", key, ""]
    lines += [
        *[f"- **{name}**: {text}" for name, text in CHECKS.items()],
        "",
    ]
    for family in dict.fromkeys(r["family"] for r in rows):
        lines += [f"## {family}", "", *_table([r for r in captured if r["family"] == family]), ""]
    if refused:
        lines += ["## What cannot be captured", "", "| model | class | reason and way out |", "|---|---|---|"]
        lines += [f"| {r['model']} | {r['class']} | {r['captured'].removeprefix('refused: ')} |" for r in refused]
        lines += [""]
    if broken:
        lines += ["## Promises that do not hold", ""]
        lines += [f"- {r['model']}, {name}: {r[name]}" for r, name in broken]
        lines += [""]
    PAGE.write_text("\n".join(lines))


def _table(rows: list[dict[str, str]]) -> list[str]:
    facts = [f for f in FACTS if f not in ("family", "captured", "class")]
    head = ["model", *[f for f in facts if f != "model"], *CHECKS]
    body = [[r["model"], *[r[f] for f in facts if f != "model"], *[_short(r[c]) for c in CHECKS]] for r in rows]
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body]]


def _short(value: str) -> str:
    return {"0.0": "=", "True": "yes", "False": "NO"}.get(value, value if _holds(value) else f"**{value}**")


def _holds(value: str) -> bool:
    if value in ("True", "False"):
        return value == "True"
    try:
        return float(value) <= TOLERANCE
    except ValueError:
        return False


def _text(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) and value not in (0.0,) and value < 1 else str(value)


def _version(family: str) -> str:
    from importlib.metadata import version

    return version(family)


if __name__ == "__main__":
    main(sys.argv[1:])
