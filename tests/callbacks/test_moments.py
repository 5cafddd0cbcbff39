"""When callbacks act: epochs, and the moment before an optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import make_trainer, ragged_tokens, tiny_bert
from torchopt_passes.callbacks import Callback, Epochs, GradualPruning, Progress, attach
from torchopt_passes.errors import CallbackError, ConfigError


class Watch(Callback):
    """Notes what it sees before and after each step."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.begun: Progress | None = None
        self.before: list[tuple[int, float]] = []
        self.after: list[int] = []

    def begin(self, progress: Progress) -> None:
        self.begun = progress

    def before_step(self, progress: Progress) -> None:
        gradient = self.weight.grad
        assert gradient is not None
        self.before.append((progress.step, float(gradient.sum())))

    def after_step(self, progress: Progress) -> None:
        self.after.append(progress.step)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_knows_the_steps_of_an_epoch(accumulate: int, tmp_path: Path) -> None:
    model = tiny_bert()
    watch = Watch(model.classifier.weight)
    pruning = GradualPruning(sparsity=0.5, start=Epochs(0.5), end=Epochs(2), every=Epochs(0.25))
    data = ragged_tokens(28)  # 4 steps of 8, the last one of 4
    make_trainer(model, data, tmp_path, [watch, pruning], accumulate=accumulate, steps=9).train()
    assert watch.begun == Progress(0, 9, 4)
    assert [step for step, _ in watch.before] == list(range(9))
    assert watch.after == list(range(1, 10))


def test_epochs_are_the_steps_of_the_loop() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = GradualPruning(sparsity=0.5, start=Epochs(1), end=Epochs(2.5), every=Epochs(0.5), schedule="linear")
    counts: list[int] = []
    with attach(model, optimizer, [pruning], total_steps=20, steps_per_epoch=4):
        for _ in range(12):
            optimizer.step()
            counts.append(int((model.weight == 0).sum()))
    assert counts == [0, 0, 0, 0, 0, 11, 11, 21, 21, 32, 32, 32]


def test_epochs_of_unknown_length_say_what_to_do() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(CallbackError, match=r"Epochs\(count=1\) needs .*steps_per_epoch="):
        attach(model, optimizer, [GradualPruning(sparsity=0.5, start=Epochs(1))], total_steps=20)
    with pytest.raises(CallbackError, match="steps_per_epoch must be at least 1"):
        attach(model, optimizer, [], total_steps=20, steps_per_epoch=0)
    for wrong in (-1, float("nan"), True):
        with pytest.raises(ConfigError, match="Epochs needs a number"):
            Epochs(wrong)


@pytest.mark.parametrize("closure", [False, True])
def test_gradients_are_final_before_the_step(closure: bool) -> None:
    """With a closure, as Lightning steps, they exist only behind it."""
    model = nn.Linear(2, 1, bias=False)
    watch = Watch(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.weight * 3).sum()
        loss.backward()
        return loss

    with attach(model, optimizer, [watch]):
        for index in range(2):
            if closure and index:
                optimizer.step(closure=compute)
            elif closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()
    assert watch.before == [(0, 6.0), (1, 6.0)]
    assert watch.after == [1, 2]
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_that_runs_its_closure_again_is_refused() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(CallbackError, match="LBFGS runs its closure more than once"):  # noqa: SIM117
        with attach(model, optimizer, [Watch(model.weight)]):
            optimizer.step(compute)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    with attach(model, optimizer, [Callback()]):
        optimizer.step(compute)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_neither_seen_nor_followed_into_skipped_steps(fused: bool) -> None:
    """Fused optimizers unscale by themselves, behind the hook, and are called for a step that they skip."""
    model = nn.Linear(2, 1, bias=False)
    twin = nn.Linear(2, 1, bias=False)
    twin.load_state_dict(model.state_dict())
    results: list[Any] = []
    for net, watched in ((model, True), (twin, False)):
        watch = Watch(net.weight)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with attach(net, optimizer, [watch] if watched else [Callback()]):
            for factor in (3.0, float("inf"), 3.0):
                optimizer.zero_grad()
                scaler.scale((net.weight * factor).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append([total for _, total in watch.before])
    assert results[0] == [6.0, 6.0]
    assert torch.equal(model.weight, twin.weight)


def test_a_hidden_optimizer_is_refused_only_where_it_matters() -> None:
    from torchopt_passes.callbacks.student import Student

    model = nn.Linear(2, 1)
    hidden: Any = object()
    for callback, refused in ((Callback(), False), (Watch(model.weight), True)):
        student = Student.of(model)
        student.join(callback)
        try:
            if refused:
                with pytest.raises(CallbackError, match="Watch acts on the gradients before each step"):
                    student.follow(hidden, lambda: Progress(0, None))
            else:
                student.follow(hidden, lambda: Progress(0, None))
        finally:
            student.leave(callback)
