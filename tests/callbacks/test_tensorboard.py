"""What callbacks log is in the event files of TensorBoard, written by the Trainer or by a loop of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.loops import collate, make_trainer, ragged_tokens, tiny_bert
from torchopt_passes.callbacks import Distillation, GradualPruning, attach

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every scalar of the event files in a folder: tag -> (step, value) in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def callbacks() -> list[Any]:
    return [GradualPruning(sparsity=0.5, start=1, end=2), Distillation(tiny_bert(seed=7))]


def test_the_trainer_writes_metrics_beside_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    logging = {"logging_strategy": "steps", "logging_steps": 1, "report_to": ["tensorboard"], "steps": 3}
    trainer = make_trainer(tiny_bert(), ragged_tokens(8), tmp_path, callbacks(), **logging)
    trainer.train()
    found = scalars(tmp_path / "runs")
    assert found["train/sparsity"] == [(1, 0.0), (2, 0.5), (3, 0.5)]
    for name in ("loss", "kd_loss", "ce_loss"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert [step for step, _ in found[f"train/{name}"]] == [1, 2, 3]
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx(logged, rel=1e-6)


def test_a_loop_of_ones_own_writes_them_itself(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model, batch = tiny_bert().train(), collate(ragged_tokens(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with attach(model, optimizer, callbacks(), total_steps=3) as session, SummaryWriter(str(tmp_path)) as writer:
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, value in session.metrics().items():
                writer.add_scalar(name, value, session.step)
    found = scalars(tmp_path)
    assert found["sparsity"] == [(1, 0.0), (2, 0.5), (3, 0.5)]
    assert {"kd_loss", "ce_loss"} < found.keys()
