"""The Lightning adapter; runs where Lightning is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.callbacks.loops import LEARNING_RATE, collate, ragged_tokens, same_state, tiny_bert, train_plain
from torchopt_passes.callbacks import Distillation, GradualPruning, lightning_callback
from torchopt_passes.errors import CallbackError, MissingExtraError


def test_a_missing_lightning_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtraError, match=r"torchopt_passes\[lightning\]"):
        lightning_callback([])


def callbacks() -> list[Any]:
    return [GradualPruning(sparsity=0.6, start=1, end=5, every=1), Distillation(tiny_bert(seed=7), alpha=0.3)]


@pytest.mark.filterwarnings("ignore")
def test_lightning_gives_the_weights_of_the_plain_loop_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_bert()
            self.hooks: list[int] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model.train()(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def run(steps: int, checkpoint: Path | None = None, save: Path | None = None, total: int = 6) -> Module:
        module, adapter = Module(), lightning_callback(callbacks())

        class Stop(lightning.Callback):  # type: ignore[misc,name-defined]
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                if save is not None and trainer.global_step == steps:
                    trainer.save_checkpoint(save)
                    trainer.should_stop = True

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(
            max_steps=total,
            min_steps=1,
            callbacks=[adapter, Stop()],
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **quiet,
        )
        data = ragged_tokens(24)[:-1] + ragged_tokens(24)[:1]  # Lightning's mean of a batch without labels is NaN
        trainer.fit(
            module, DataLoader(data, batch_size=8, collate_fn=collate), ckpt_path=checkpoint, weights_only=False
        )
        return module

    straight = run(6)
    plain = tiny_bert()
    train_plain(plain, ragged_tokens(24)[:-1] + ragged_tokens(24)[:1], callbacks())
    assert same_state(straight.model, plain)
    run(3, save=tmp_path / "three.ckpt")
    assert same_state(run(6, checkpoint=tmp_path / "three.ckpt").model, plain)
    assert not straight.model._forward_hooks


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_student_is_named(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    adapter = lightning_callback([GradualPruning(sparsity=0.5)], student="student")
    with pytest.raises(CallbackError, match="LightningModule has no submodule 'student'"):
        adapter.setup(None, lightning.LightningModule(), "fit")
