"""A run that SIGKILL ends at any moment resumes bit for bit: one case of each class, made anew by its recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.cases import WITH_PROJECTORS
from tests.callbacks.kills import differences

KILLS = 1  # benchmarks/resume.py kills each 20 times


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.kills", str(folder), str(KILLS), *WITH_PROJECTORS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "kills.json").read_text())


@pytest.mark.parametrize("name", WITH_PROJECTORS)
def test_a_killed_run_resumes_bit_for_bit(name: str, killed: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    rows = killed[1][name]
    assert [row["recipe"] for row in rows] == [True]
    for row in rows:
        assert not row["differences"], row


def test_a_difference_would_be_seen(killed: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder = killed[0] / "GradualPruning"
    state = torch.load(folder / "0" / "end.pt", weights_only=True)
    state["classifier.weight"][0, 0] += 1e-7
    torch.save(state, folder / "0" / "end.pt")
    log = folder / "0" / "checkpoint-8" / "trainer_state.json"
    log.write_text(log.read_text().replace('"sparsity": 0.', '"sparsity": 1.', 1))
    assert differences(folder / "straight", folder / "0") == ["end: classifier.weight", "checkpoint-8: logs"]
