"""Every model of the capture matrix, for both int8 targets: prepared, calibrated, converted and run.

    .venv/bin/python -m benchmarks.quantize_matrix transformers      # all, or the named ones: ... transformers bert t5
    .venv-2.14.1/bin/python -m benchmarks.quantize_matrix torchvision

One row a model and target in benchmarks/records/quantize_matrix.csv, written as it is ready; one that is run again
replaces the old one. The checks are those of tests/graph/quantization/test_every_model.py. Weights are random and one
batch calibrates: `rounded` shows that rounding happens, not how good a trained model would be.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.capture_matrix import models_of
from tests.graph.quantization.every_model import broken_promises, quantize_model

RECORD = Path(__file__).resolve().parent / "records" / "quantize_matrix.csv"
PROVED = 200_000_000  # parameters; above, the proof's float64 copies do not fit beside the rest
FIELDS: tuple[str, ...] = (
    "family", "model", "target", "operations", "int8", "float", "rounded", "converted", "other sizes", "exact", "off",
    "proof", "intact", "broken", "seconds",
)  # fmt: skip


def row_of(family: str, name: str, target: str, spec: Any) -> dict[str, Any]:
    from importlib.metadata import version

    parameters = sum(p.numel() for p in spec.build().parameters())
    made = {"family": f"{family} {version(family)}, torch {torch.__version__.split('+')[0]}"}
    made |= {"model": name, "target": target}
    began = time.process_time()
    try:
        row = quantize_model(spec, target, prove=parameters <= PROVED)
    except Exception as error:
        return made | {"broken": f"{type(error).__name__}: {error}"[:300]}
    return made | {
        "operations": row.operations,
        "int8": row.int8,
        "float": "; ".join(f"{count} x {why.removeprefix('float: ')}" for why, count in row.float_because.items()),
        "rounded": f"{row.rounded:.2g}",
        "converted": f"{row.converted:.2g}",
        "other sizes": f"{row.other_sizes:.2g}",
        "exact": "" if row.exact is None else f"{row.exact:.2g}",
        "off": f"{row.off:.2g}",
        "proof": row.proof,
        "intact": row.intact,
        "broken": "; ".join(broken_promises(row)),
        "seconds": round(time.process_time() - began, 1),
    }


def write(row: dict[str, Any]) -> None:
    rows = {(r["family"].split()[0], r["model"], r["target"]): r for r in read()}
    rows[row["family"].split()[0], row["model"], row["target"]] = row
    partial = RECORD.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: r.get(name, "") for name in FIELDS} for r in rows.values())
    partial.replace(RECORD)


def read() -> list[dict[str, str]]:
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    family, *names = arguments
    models = {name: spec for name, spec in models_of(family).items() if not spec.refused}
    for name in names or models:
        for target in ("inductor", "onnx"):
            row = row_of(family, name, target, models[name])
            write(row)
            print(
                name, target, f"{row.get('int8')} of {row.get('operations')}", row["broken"] or "all hold", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])
