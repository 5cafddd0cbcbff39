"""Random networks with random removals, against an oracle that is no part of the package: none may be wrong.

    .venv/bin/python -m benchmarks.random_networks --examples 2000 --seed 0

The property of tests/graph/pruning/test_random_networks.py for many networks, without stopping at a failure. Written to
benchmarks/records/random_networks.json: networks, groups, units, what was locked and why, and each failure with the
description of its network. The exit status is 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import torchopt_passes as top
from tests.graph.pruning.oracle import TOLERANCE, Pruned, check_removal
from tests.graph.pruning.random_networks import Network, build, draw_keep, inputs_of, networks

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "random_networks.json"
FLUSH = 50


@dataclass
class Tally:
    """What was seen so far."""

    examples: int = 0
    networks: set[Network] = field(default_factory=set)
    with_removals: int = 0
    groups: int = 0
    units: int = 0
    removed: int = 0
    largest_error: float = 0.0
    unlocked: Counter[str] = field(default_factory=Counter)
    locked: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, pruned: Pruned) -> None:
        self.with_removals += pruned.removed > 0
        self.groups += len(pruned.groups)
        self.units += pruned.units
        self.removed += pruned.removed
        self.largest_error = max(self.largest_error, pruned.error)
        for group in pruned.groups:
            if group.locked is None:
                self.unlocked[group.kind] += 1
            else:
                self.locked[reason_of(group.locked)] += 1

    def record(self, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "examples": self.examples,
            "networks": len(self.networks),
            "networks_with_removals": self.with_removals,
            "groups": self.groups,
            "groups_unlocked_by_kind": dict(self.unlocked.most_common()),
            "groups_locked_by_reason": dict(self.locked.most_common()),
            "units": self.units,
            "units_removed": self.removed,
            "tolerance": TOLERANCE,
            "largest_error": self.largest_error,
            "failures": self.failures,
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": {
                "torchopt_passes": top.__version__,
                "torch": torch.__version__,
                "hypothesis": hypothesis.__version__,
            },
        }

    def write(self, path: Path, seed: int) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self.record(seed), indent=1) + "\n")


def reason_of(locked: str) -> str:
    """Return a reason without names of nodes and lines of code, so that equal ones are counted together."""
    op = re.search(r"aten\.\w+(\.\w+)?", locked)
    words = re.sub(r"[\w.]*[\d_./][\w./:]*", "...", locked.split(", at ")[0].replace(op[0] if op else "\0", "OP"))
    return words.replace("OP", op[0] if op else "")[:100]


def run(examples: int, seed: int, path: Path) -> Tally:
    tally = Tally()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), st.data())
    def one(network: Network, data: st.DataObject) -> None:
        keep: dict[str, tuple[int, ...]] = {}

        def choose(groups: Any) -> dict[str, tuple[int, ...]]:
            keep.update(draw_keep(data, groups))
            return keep

        try:
            model, _ = build(network)
            tally.add(check_removal(model, partial(inputs_of, network), network.batch, choose))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:1000]
            at = f"{Path(where.filename).name}:{where.lineno}"
            tally.failures.append({"network": repr(network), "keep": keep, "error": text, "at": at})
            print(f"{len(tally.failures)}. {text.splitlines()[0]}\n   {network}", flush=True)
        tally.examples += 1  # here: an example that hypothesis gives up while it draws is none
        tally.networks.add(network)
        if tally.examples % FLUSH == 0:
            tally.write(path, seed)
            print(f"{tally.examples} of {examples}, {len(tally.failures)} wrong", file=sys.stderr, flush=True)

    one()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tally = run(options.examples, options.seed, options.record)
    tally.write(options.record, options.seed)
    print(json.dumps({k: v for k, v in tally.record(options.seed).items() if k != "failures"}, indent=1))
    return int(bool(tally.failures))


if __name__ == "__main__":
    raise SystemExit(main())
