"""The Lightning adapter: what the battery does not see of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from tests.callbacks.loops import ragged_tokens, tiny_bert
from tests.callbacks.other_loops import LIGHTNING_WARNS, Student, train_lightning
from torchopt_passes.callbacks import Callback, Distillation, GradualPruning, lightning_callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.errors import CallbackError, MissingExtraError


def test_a_missing_lightning_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtraError, match=r"torchopt_passes\[lightning\]"):
        lightning_callback([])


@LIGHTNING_WARNS
def test_metrics_are_logged_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Student, "log_dict", lambda self, metrics: logged.append(dict(metrics)))
    callbacks = [GradualPruning(sparsity=0.5, start=1, end=2), Distillation(tiny_bert(seed=7))]
    train_lightning(
        tiny_bert(), ragged_tokens(24), callbacks, folder=tmp_path, accumulate=2, steps=3, log_every_n_steps=1
    )
    assert [entry.get("sparsity") for entry in logged] == [0.0, 0.5, 0.5]
    assert all(entry.keys() == {"sparsity", "kd_loss", "ce_loss"} for entry in logged)


@LIGHTNING_WARNS
def test_an_error_removes_the_callbacks(tmp_path: Path) -> None:
    class Stop(Callback):
        def after_step(self, progress: Progress) -> None:
            raise ZeroDivisionError

    model, pruning = tiny_bert(), GradualPruning(sparsity=0.5)
    with pytest.raises(ZeroDivisionError):
        train_lightning(model, ragged_tokens(24), [pruning, Stop()], folder=tmp_path)
    assert pruning.student is None
    assert set(model.state_dict()) == set(tiny_bert().state_dict())


@LIGHTNING_WARNS
def test_two_optimizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(self: Student) -> Any:
        return [torch.optim.SGD(self.model.parameters(), lr=0.1) for _ in range(2)]

    monkeypatch.setattr(Student, "configure_optimizers", two)
    monkeypatch.setattr(Student, "automatic_optimization", property(lambda self: False), raising=False)
    with pytest.raises(CallbackError, match="one optimizer must train the student; Lightning has 2"):
        train_lightning(tiny_bert(), ragged_tokens(24), [GradualPruning(sparsity=0.5)], folder=tmp_path)


def test_a_wrong_student_is_named() -> None:
    adapter = lightning_callback([GradualPruning(sparsity=0.5)], student="student")
    with pytest.raises(CallbackError, match="LightningModule has no submodule 'student'"):
        adapter.setup(None, lightning.LightningModule(), "fit")
