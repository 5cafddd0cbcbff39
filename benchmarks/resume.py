"""Twenty runs of every callback, each killed (SIGKILL) at a random moment and resumed from its last checkpoint.

    HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.resume [CASE ...]

A moment is an event of the Trainer in one of its optimizer steps: before it, between two micro-batches, before and
after the update, before and after a checkpoint is written. What is compared, bit for bit, with the run that was never
stopped: the model at the end; in every checkpoint the model (masks, gates and projectors are in it), the optimizer,
and all logged metrics. Every second run goes on with a callback made from its recipe. Seeded; written to
benchmarks/records/resume.json, case by case, so that it can be stopped and goes on (a case that is named is run
again).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.callbacks.cases import CASES
from tests.callbacks.kills import STEPS, try_kills

RECORD = Path(__file__).resolve().parent / "records" / "resume.json"
KILLS = 20


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the collections of the children would copy the memory that they share
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"kills": KILLS, "steps": STEPS, "cases": {}}
    for name in names or [name for name in CASES if name not in record["cases"]]:
        with tempfile.TemporaryDirectory() as folder:
            rows = try_kills(CASES[name], name, Path(folder) / name, KILLS)
        record["cases"][name] = {
            "resumed_exactly": sum(not row["differences"] for row in rows),
            "from_recipe": sum(row["recipe"] for row in rows),
            "moments": dict(sorted(Counter(row["moment"] for row in rows).items())),
            "killed_in_steps": sorted(row["step"] for row in rows),
            "differences": [difference for row in rows for difference in row["differences"]],
        }
        record["cases"] = {case: record["cases"][case] for case in CASES if case in record["cases"]}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {record['cases'][name]['resumed_exactly']} of {KILLS}")


if __name__ == "__main__":
    main(sys.argv[1:])
