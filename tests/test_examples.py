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
    "l0_gates.py": [
        r"dense .* 9\d\.\d% right .* 0\.0% zeros",
        r"weights, by a factor .* 9\d\.\d% right .* [1-9]\d\.\d% zeros",
        r"weights, 90% zeros .* [89]\d\.\d% right .* (8[89]|9\d)\.\d% zeros",
        r"channels, 60% of the MACs gone .* [89]\d\.\d% right .* [23]\d,\d{3} MACs",
    ],
    "information_bottleneck.py": [
        r"dense .* 9\d\.\d% right .* 13,802 parameters",
        r"bottleneck, strength 0\.0003 .* 9\d\.\d% right",
        r"bottleneck, strength 0\.001 .* 9\d\.\d% right .* [3-9],\d{3} parameters",
        r"40% of the units gone by hsic",
    ],
    "group_penalties.py": [
        r"dense .* 9\d\.\d% right .* 13,802 parameters",
        r"group lasso, strength 0\.15 .* 9\d\.\d% right .* 1[012],\d{3} parameters",
        r"slimming, 40% of the channels .* [89]\d\.\d% right",
        r"growing regularization, 40% .* 9\d\.\d% right .* 5,203 parameters",
    ],
    "early_exits.py": [
        r"exits at blocks\.1 \(34% of the work\), blocks\.3 \(67% of the work\)",
        r"threshold 1\.1 .* average depth 100\.0%",
        r"threshold 0\.8 .* 9\d\.\d% right .* average depth [345]\d\.\d%",
    ],
    "low_bit_optimizer.py": [
        r"AdamW  .* 20\d\.\d KB of moments .* 90\.0% zeros",
        r"AdamW8bit  .* 6\d\.\d KB of moments .* 90\.0% zeros",
        r"AdamW8bit, raised learning rate .* 6\d\.\d KB of moments .* 90\.0% zeros .* [6789]\d\.\d% right",
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
