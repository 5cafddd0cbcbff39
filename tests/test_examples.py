"""Every example runs, as a user runs it, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

# example -> what its output must have, as patterns
PRINTS: dict[str, list[str]] = {
    "gradual_pruning.py": [
        r"dense .* 0\.0% zeros",
        r"magnitude, cubic .* 90\.0% zeros",
        r"movement, .* 90\.0% zeros",
        r"2:4, .* 4[6-9]\.\d% zeros",
        r"two large steps, .* 90\.0% zeros",
    ],
    "distillation.py": [
        r"teacher .* 9\d\.\d% right",
        r"labels alone .* right",
        *[
            rf"soft targets{more} .* [678]\d\.\d% right"
            for more in ("", ", hints", ", attention transfer, RKD", " of a cache")
        ],
        r"pruned from the teacher, hints .* [789]\d\.\d% right",
        r"reader, taught by the images of pairs .* [789]\d\.\d% right",
    ],
    "dynamic_sparsity.py": [r"dense ", *[rf"{name}.*sparsity 0\.900" for name in ("RigL", "SET", "lottery ticket")]],
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_the_example_runs(name: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in PRINTS[name]:
        assert re.search(pattern, done.stdout), f"{pattern!r} is not in:\n{done.stdout}"
