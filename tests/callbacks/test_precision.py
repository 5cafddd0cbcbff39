"""Autocast to bfloat16, steps that the gradient scaler skips, and activations that are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.callbacks.cases import ONE_OF_A_CLASS, Case
from tests.callbacks.loops import (
    collate,
    make_trainer,
    plain_gradient,
    ragged_tokens,
    relative_difference,
    same_state,
    tiny_bert,
    trainer_gradient,
)
from torchopt_passes.callbacks import Callback, Distillation, GradualPruning, attach
from torchopt_passes.callbacks.lifecycle import Progress

ON_BERT = {name: case for name, case in ONE_OF_A_CLASS.items() if isinstance(case.model(0.0), PreTrainedModel)}

SEES_FORWARDS = {
    "QuantizationSchedule": "ranges have seen the forwards of skipped steps",
    "QuantizationNoise": "ranges have seen the forwards of skipped steps",
    "GradualBits": "ranges have seen the forwards of skipped steps",
    "InformationBottleneck": "a step that is tried again goes on with the noise of the next samples",
}


def test_bfloat16_distills_as_float32_does(tmp_path: Path) -> None:
    """The term is computed in float32 from the logits of either: only the forward's rounding is left."""
    data = ragged_tokens(8)

    def gradient(**options: Any) -> list[torch.Tensor]:
        distillation = Distillation(tiny_bert(seed=7), alpha=0.5, temperature=3.0)
        return trainer_gradient(tiny_bert(), data, tmp_path, [distillation], **options)

    exact = gradient()
    assert relative_difference(gradient(bf16=True), exact) < 0.02
    for accumulate in (4, 8):
        assert relative_difference(gradient(bf16=True, accumulate=accumulate), gradient(bf16=True)) < 0.02


@pytest.mark.parametrize("name", ONE_OF_A_CLASS)
def test_bfloat16_trains_with_every_callback(name: str, tmp_path: Path) -> None:
    """Weights, masks and gates stay in float32 and bool; a resumed run is the straight one, bit for bit."""
    case = ONE_OF_A_CLASS[name]
    straight, resumed = case.model(0.0), case.model(0.0)
    saving = {"save_strategy": "steps", "save_steps": 3, "bf16": True}
    make_trainer(straight, case.data(24), tmp_path, [case.make()], **saving).train()
    trainer = make_trainer(resumed, case.data(24), tmp_path / "resumed", [case.make()], **saving)
    assert {p.dtype for p in resumed.parameters()} == {torch.float32}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(straight, resumed)
    assert all(torch.isfinite(parameter).all() for parameter in straight.parameters())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ON_BERT)
def test_checkpointed_activations_give_the_same_gradient(name: str, reentrant: bool) -> None:
    case = ON_BERT[name]

    def gradient(checkpointing: bool) -> list[torch.Tensor]:
        model: Any = case.model(0.0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        return plain_gradient(model, case.data(8), [(case.settled or case.make)()])

    assert relative_difference(gradient(True), gradient(False)) < 1e-6


def train_scaled(model: nn.Module, case: Case, overflow: set[int]) -> list[int]:
    """A loop with a gradient scaler, whose gradients overflow in some rounds; returns the steps that counted."""

    class Record(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def after_step(self, progress: Progress) -> None:
            self.steps.append(progress.step)

    record, data = Record(), case.data(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    batch = collate(data[:8])
    with attach(model.train(), optimizer, [case.make(), record], total_steps=6):
        for index in range(6 + len(overflow)):
            scale = torch.inf if index in overflow else 1.0
            scaler.scale(model(**batch).loss * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return record.steps


@pytest.mark.parametrize("name", ONE_OF_A_CLASS)
def test_skipped_steps_are_as_if_they_had_not_been(name: str) -> None:
    """Not counted, and without a trace in the weights, whatever chose them: the overflow was infinite."""
    case = ONE_OF_A_CLASS[name]
    if name in SEES_FORWARDS:
        pytest.skip(SEES_FORWARDS[name])
    straight, skipping = case.model(0.0), case.model(0.0)
    assert train_scaled(straight, case, set()) == [1, 2, 3, 4, 5, 6]
    assert train_scaled(skipping, case, {0, 3, 6}) == [1, 2, 3, 4, 5, 6]
    assert dict(straight.named_parameters()).keys() == dict(skipping.named_parameters()).keys()
    for parameter, other in zip(straight.parameters(), skipping.parameters(), strict=True):
        assert torch.equal(parameter, other)  # batch norms have seen the forwards of skipped steps


def test_autocast_leaves_masks_alone() -> None:
    model, batch = tiny_bert().train(), collate(ragged_tokens(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with attach(model, optimizer, [GradualPruning(sparsity=0.5, start=1, end=2)], total_steps=3):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weight, mask = model.classifier.weight, model.classifier.weight_mask
        assert (weight.dtype, mask.dtype) == (torch.float32, torch.bool)
        assert torch.equal(weight == 0, ~mask)
        assert int((~mask).sum()) == mask.numel() // 2
