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

from tests.callbacks.cases import CLUSTERED, WITH_PROJECTORS
from tests.callbacks.kills import differences
from torchopt_passes.graph.quantization import ConvertQuantized

KILLS = 1  # benchmarks/resume.py kills each 20 times


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.kills", str(folder), str(KILLS), *WITH_PROJECTORS, *CLUSTERED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "kills.json").read_text())


@pytest.mark.parametrize("name", [*WITH_PROJECTORS, *CLUSTERED])
def test_a_killed_run_resumes_bit_for_bit(name: str, killed: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    rows = killed[1][name]
    assert [row["recipe"] for row in rows] == [True]
    for row in rows:
        assert not row["differences"], row


@pytest.mark.parametrize("name", CLUSTERED)
def test_a_killed_run_keeps_clusters_and_zeros(name: str, killed: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    """Four levels a weight, in float and, for each channel, in int8; pruned weights are 0 in both."""
    assert killed[1][name][0]["from"] > 0, "it went on from a checkpoint"
    begun = CLUSTERED[name].model(0.1).state_dict()
    state = torch.load(killed[0] / name / "0" / "end.pt", weights_only=True)
    end = CLUSTERED[name].model(0.1)
    end.load_state_dict(state)
    converted = ConvertQuantized()(end.eval()).graph_module  # pyright: ignore[reportArgumentType]
    for fqn, shape in (("conv", (8, 1, 3, 3)), ("fc", (3, 8))):
        first, last = (weight_of(values, fqn, shape) for values in (begun, state))
        zero = first == 0
        pruned = zero.numel() // 2 if name == "pruned CQAT" else 0
        assert int(zero.sum()) >= pruned and torch.equal(last == 0, zero)
        assert len(last.unique()) == len(first.unique()) == 4 and not torch.equal(last, first), "levels train"
        assert all(len(last[first == level].unique()) == 1 for level in first.unique())
        integers = converted.get_buffer(f"{fqn}.weight")
        assert integers.dtype is torch.int8 and bool((integers[zero] == 0).all())
        for row, levels in zip(integers.flatten(1), last.flatten(1), strict=True):
            assert len(row.unique()) <= len(levels.unique()) <= 4


def weight_of(state: dict[str, torch.Tensor], fqn: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight that 2-bit indices and a codebook stand for; three levels beside a zero that is none of them."""
    codebook = state[f"{fqn}.parametrizations.weight.original0"][0]
    levels = codebook if len(codebook) == 4 else torch.cat([torch.zeros(1), codebook])
    packed = state[f"{fqn}.parametrizations.weight.0.indices"]
    indices = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])  # bytes hold i, i + m, i + 2m, i + 3m
    return levels[indices.long()][: torch.Size(shape).numel()].view(shape)


def test_a_difference_would_be_seen(killed: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder = killed[0] / "GradualPruning"
    state = torch.load(folder / "0" / "end.pt", weights_only=True)
    state["classifier.weight"][0, 0] += 1e-7
    torch.save(state, folder / "0" / "end.pt")
    log = folder / "0" / "checkpoint-8" / "trainer_state.json"
    log.write_text(log.read_text().replace('"sparsity": 0.', '"sparsity": 1.', 1))
    assert differences(folder / "straight", folder / "0") == ["end: classifier.weight", "checkpoint-8: logs"]
