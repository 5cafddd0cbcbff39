"""The examples for several ranks run under their launchers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/ranks/torchrun_loop.py"],
    "torchrun, FSDP2": [
        *["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        *["examples/ranks/torchrun_loop.py", "--fsdp"],
    ],
    "accelerate": [
        *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        "examples/ranks/accelerate_trainer.py",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example_runs_on_two_ranks(launcher: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = re.search(r"2 ranks: sparsity ([\d.]+), accuracy ([\d.]+)", done.stdout)
    assert line is not None, done.stdout
    assert float(line[1]) == pytest.approx(0.8, abs=0.001)
    assert float(line[2]) > 0.85
