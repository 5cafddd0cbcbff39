"""The Trainer counts the steps that its gradient scaler skips: they change nothing but the place in schedules."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests.callbacks.cases import CASES, Case
from tests.callbacks.loops import bare_net, collate, images, make_trainer, same_state, tiny_bert
from torchopt_passes.callbacks import (
    AveragedWeights,
    Callback,
    Distillation,
    GradualChannelPruning,
    GradualPruning,
    L0Pruning,
    attach,
)
from torchopt_passes.callbacks.lifecycle import Progress

UPDATES = [
    *("L1Penalty", "L2Penalty", "GroupLasso", "BatchNormSlimming", "Distillation-self", "KeepZeros"),
    *("L1Penalty-gradient", "L2Penalty-gradient", "GroupLasso-gradient", "GroupVariance", "Orthogonality"),
]
"""Cases in which only the number of updates counts: nothing in them is scheduled."""


class Overflow(TrainerCallback):
    """Makes the gradients of some steps, counted from 1, infinite."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            for parameter in kwargs["model"].parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)


class Last(TrainerCallback):
    """Keeps the state of the model after the last step, with all that callbacks have put into it."""

    state: dict[str, torch.Tensor]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = {name: value.clone() for name, value in kwargs["model"].state_dict().items()}


def scaled(trainer: Trainer) -> Trainer:
    """The Trainer with a gradient scaler, as ``fp16=True`` gives it on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    return trainer


def train(model: nn.Module, case: Case, folder: Path, skipped: Sequence[int], steps: int = 6, **options: Any) -> Any:
    """Train on the same batch in each step; returns the state after the last one, before anything is removed."""
    last = Last()
    callbacks = [case.make(), Overflow(skipped), last]
    scaled(make_trainer(model, case.data(8), folder, callbacks, steps=steps, **options)).train()
    return last.state


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    forwards = ("running_mean", "running_var", "num_batches_tracked")  # batch norms have seen those of skipped steps
    return [name for name in one if not name.endswith(forwards) and not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", UPDATES)
def test_skipped_steps_leave_the_weights_of_those_taken(name: str, tmp_path: Path) -> None:
    """Six steps of which the second, third and fifth overflow are three steps."""
    case = CASES[name]
    straight = train(case.model(0.0), case, tmp_path, [], steps=3)
    assert not differing(train(case.model(0.0), case, tmp_path, [2, 3, 5]), straight)


@pytest.mark.parametrize("name", ["L1Penalty", "L2Penalty", "GroupLasso", "BatchNormSlimming", "L0Pruning"])
def test_a_run_of_skipped_steps_alone_changes_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained = train(case.model(0.0), case, tmp_path, range(1, 7))
    with attach(untouched := case.model(0.0), torch.optim.SGD(untouched.parameters()), [case.make()], total_steps=6):
        state = {key: value.clone() for key, value in untouched.state_dict().items()}
    assert not differing(trained, state)


def test_multipliers_ascend_in_steps_that_were_taken(tmp_path: Path) -> None:
    case = Case(make=lambda: L0Pruning(sparsity=0.6, start=0, end=0, settle=1.0, lr=0.3))
    found = []
    for steps, skipped in ((3, []), (6, [4, 5, 6])):
        state = train(tiny_bert(), case, tmp_path, skipped, steps=steps)
        found += [value for name, value in state.items() if name.endswith("multipliers")]
    assert float(found[0].abs().sum()) > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("fused", [False, True])
def test_callbacks_are_told_of_skipped_steps(fused: bool, tmp_path: Path) -> None:
    """Fused optimizers are called for such a step, too, and skip it themselves."""
    told: list[tuple[int, bool]] = []

    class Record(Callback):
        def after_step(self, progress: Progress) -> None:
            told.append((progress.step, progress.stepped))

    case = Case(make=Record)
    train(tiny_bert(), case, tmp_path, [1, 4], optim="adamw_torch_fused" if fused else "adamw_torch")
    assert told == [(1, False), (2, True), (3, True), (4, False), (5, True), (6, True)]


def test_a_loop_of_ones_own_counts_no_skipped_step_of_a_fused_optimizer() -> None:
    model, case = tiny_bert().train(), CASES["L1Penalty"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, optimizer, [case.make()], total_steps=6) as session:
        for _ in range(3):
            scaler.scale(model(**collate(case.data(8))).loss * torch.inf).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert session.step == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("skipped", [[2, 3], [2, 4]], ids=["after a skipped step", "after a taken one"])
def test_an_average_goes_on_from_a_checkpoint(skipped: list[int], tmp_path: Path) -> None:
    """The average follows in the next forward, so a checkpoint says whether it has."""
    case = Case(make=lambda: Distillation(AveragedWeights(decay=0.5)), model=bare_net, data=images)
    straight, resumed = case.model(0.0), case.model(0.0)
    train(straight, case, tmp_path, skipped, save_strategy="steps", save_steps=3)
    scaled(make_trainer(resumed, case.data(8), tmp_path, [case.make(), Overflow(skipped)])).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert same_state(straight, resumed)


@pytest.mark.parametrize("criterion", ["movement", "taylor", "snip"])
def test_a_criterion_without_a_gradient_ranks_by_magnitude(
    criterion: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, case = tiny_bert(), Case(make=lambda: GradualPruning(sparsity=0.5, criterion=criterion, start=1, end=1))
    expected = model.classifier.weight.detach().abs().flatten().argsort()[:24]
    with caplog.at_level(logging.WARNING):
        state = train(model, case, tmp_path, [1], steps=1)
    assert f"{criterion} has seen no gradient since the last update: ranked by magnitude" in caplog.text
    removed = (~state["classifier.weight_mask"]).flatten().nonzero().flatten()
    assert set(removed.tolist()) == set(expected.tolist())


def test_channels_are_not_ranked_by_infinite_gradients(tmp_path: Path) -> None:
    options = {"ratio": 0.5, "start": 1, "end": 1, "example_inputs": collate(images(2))}
    by_taylor = GradualChannelPruning(importance="taylor", **options)
    masks = [
        train(bare_net(), Case(make=lambda made=made: made, data=images), tmp_path, [1], steps=1)["conv.weight_0_mask"]
        for made in (by_taylor, GradualChannelPruning(importance="l2", **options))
    ]
    assert torch.equal(*masks)
    assert int(masks[0].sum()) == 4
    assert any("its gradients overflowed; ranked by l2" in skip.reason for skip in by_taylor.skips)
