"""One opened artefact that times calls when it is asked: lines of ``<batch> <calls>`` in, lists of seconds out."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from functools import cache as memo
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # those that wait leave the cores to the one whose turn it is

import torch
from safetensors.torch import load_file

from benchmarks.deploy_cells_arms import ARMS
from benchmarks.deploy_cells_models import make
from benchmarks.deploy_cells_peers import Call


def main() -> None:
    model, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]) / sys.argv[1]
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    arm = next(arm for arm in ARMS if arm.name == name)
    values = load_file(folder / "inputs.safetensors")

    @memo
    def opened(path: Path) -> Call:
        return arm.read(lambda: make(model), path)

    for line in sys.stdin:
        batch, calls = map(int, line.split())
        inputs = tuple(values[str(place)][:batch].contiguous() for place in range(len(values)))
        paths = [arm.path(folder, size) for size in (batch, 1)] if arm.is_file else [folder]
        call = opened(next(path for path in paths if path.exists()))
        call(*inputs)  # caches are another artefact's
        found: list[float] = []
        for _ in range(calls):
            started = time.perf_counter()
            call(*inputs)
            found.append(time.perf_counter() - started)
        print("seconds", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
