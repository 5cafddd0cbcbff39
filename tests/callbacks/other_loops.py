"""The training of loops.py in Accelerate's loop and in Lightning's, on the same batches in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.loops import LEARNING_RATE, Example, collate
from torchopt_passes.callbacks import attach, lightning_callback, num_items_in_batch

LIGHTNING_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning:lightning", "ignore::UserWarning:lightning")


def micro_batches(data: Sequence[Example], step: int, batch: int, accumulate: int) -> list[Example]:
    """The micro-batches of one optimizer step."""
    order = [(step * batch + i) % len(data) for i in range(batch)]
    size = batch // accumulate
    return [collate([data[i] for i in order[k : k + size]]) for k in range(0, batch, size)]


def train_accelerate(
    model: nn.Module,
    data: Sequence[Example],
    callbacks: Iterable[Any],
    *,
    folder: Path,
    batch: int = 8,
    accumulate: int = 1,
    steps: int = 6,
    save: int | None = None,
    resume: bool = False,
    **options: Any,
) -> None:
    """Accelerate's loop: attached before `prepare`; saves its state after `save` steps, or goes on from there."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer that ran before in this process
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with attach(model, optimizer, callbacks, total_steps=steps) as session:
        prepared, wrapped = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(session)
        if resume:
            accelerator.load_state(str(folder))
        prepared.train()
        for step in range(session.step, steps):
            parts = micro_batches(data, step, batch, accumulate)
            items = num_items_in_batch(model, parts)
            for part in parts:
                with accelerator.accumulate(prepared):
                    loss = prepared(**part, num_items_in_batch=items).loss
                    accelerator.backward(loss * accumulate)  # it divides by the number of micro-batches
                    wrapped.step()
                    wrapped.zero_grad()
            if session.step == save:
                accelerator.save_state(str(folder))


class Student(lightning.LightningModule):
    """What a user of Lightning writes."""

    def __init__(self, model: nn.Module, accumulate: int) -> None:
        super().__init__()
        self.model, self.accumulate = model, accumulate

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        part, items = batch
        return self.model(**part, num_items_in_batch=items).loss * self.accumulate  # it divides by their number

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


class Save(lightning.Callback):
    """Writes a checkpoint after so many steps."""

    def __init__(self, step: int | None, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train_lightning(
    model: nn.Module,
    data: Sequence[Example],
    callbacks: Iterable[Any],
    *,
    folder: Path,
    batch: int = 8,
    accumulate: int = 1,
    steps: int = 6,
    save: int | None = None,
    resume: bool = False,
    **options: Any,
) -> None:
    """Lightning's loop; writes ``last.ckpt`` after `save` steps, or goes on from it."""
    model.train()
    batches: list[tuple[Example, torch.Tensor]] = []
    for step in range(len(data) // batch):  # of one epoch: Lightning resumes where one ends
        parts = micro_batches(data, step, batch, accumulate)
        batches += [(part, num_items_in_batch(model, parts)) for part in parts]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[lightning_callback(callbacks), Save(save, folder / "last.ckpt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(Student(model, accumulate), loader, ckpt_path=folder / "last.ckpt" if resume else None)
