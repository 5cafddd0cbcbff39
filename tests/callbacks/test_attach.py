"""attach: true optimizer steps, Accelerate, DDP's and compile's wrappers, a callback of one's own, misuse."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from tests.callbacks.loops import collate, conv_net, ragged_tokens, same_state, tiny_bert
from torchopt_passes.callbacks import (
    Callback,
    Distillation,
    GradualPruning,
    LossTerm,
    Progress,
    StudentCall,
    attach,
    num_items_in_batch,
)
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError


class Record(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def install(self, student: Student) -> None:
        self.events.append("install")

    def begin(self, progress: Progress) -> None:
        self.events.append(f"begin {progress.step}/{progress.total_steps}")

    def after_step(self, progress: Progress) -> None:
        self.events.append(f"step {progress.step}")

    def remove(self) -> None:
        self.events.append("remove")


class Penalty(Callback):
    """weight * sum of squares of the parameters."""

    changes_loss = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss_term(self, call: StudentCall) -> LossTerm:
        return LossTerm(self.weight * torch.stack([p.square().sum() for p in call.model.parameters()]).sum())


def test_the_moments_come_in_their_order() -> None:
    model, record = nn.Linear(2, 2), Record()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, [record], total_steps=3) as session:
        optimizer.step()
        session.load_state_dict({"step": 2})
        optimizer.step()
    optimizer.step()
    session.close()
    assert record.events == ["install", "begin 0/3", "step 1", "begin 2/3", "step 3", "remove"]


def test_steps_that_the_gradient_scaler_skips_do_not_count() -> None:
    model, record = nn.Linear(2, 2), Record()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with attach(model, optimizer, [record], total_steps=3) as session:
        for value in (1.0, float("inf"), 1.0):
            scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert session.step == 2
    assert record.events[2:-1] == ["step 1", "step 2"]


def test_terms_of_several_callbacks_add_up_in_any_order() -> None:
    losses = []
    for flip in (False, True):
        student, batch = tiny_bert().train(), collate(ragged_tokens(4))
        callbacks: list[Callback] = [Penalty(0.01), Distillation(tiny_bert(seed=7), alpha=0.25), Penalty(0.02)]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        hard = student(**batch).loss.detach()
        with attach(student, optimizer, callbacks[::-1] if flip else callbacks) as session:
            losses.append(student(**batch).loss.detach())
        with attach(student, optimizer, [Distillation(tiny_bert(seed=7), alpha=0.25)]):
            distilled = student(**batch).loss.detach()
        assert session.step == 0
    squares = torch.stack([p.detach().square().sum() for p in student.parameters()]).sum()
    assert float(losses[0]) == pytest.approx(float(distilled + 0.03 * squares), rel=1e-6)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    assert float(hard) != pytest.approx(float(losses[0]), rel=1e-3)


def test_a_penalty_counts_once_however_the_batch_is_cut() -> None:
    data, found = ragged_tokens(8), []
    for accumulate in (1, 4):
        model = tiny_bert().train()
        size = 8 // accumulate
        parts = [collate(data[k : k + size]) for k in range(0, 8, size)]
        items = num_items_in_batch(model, parts)
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [Penalty(0.01)]):
            found.append(sum(float(model(**part, num_items_in_batch=items).loss.detach()) for part in parts))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_accelerate_accumulates_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = ragged_tokens(24)

    def train(stop: int, resume: bool) -> nn.Module:
        AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer that ran before in this process
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_bert(0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        model, optimizer = accelerator.prepare(model, optimizer)
        callbacks = [GradualPruning(sparsity=0.6, start=1, end=5, every=1), Distillation(tiny_bert(seed=7))]
        with attach(model, optimizer, callbacks, total_steps=6) as session:
            accelerator.register_for_checkpointing(session)
            if resume:
                accelerator.load_state(str(tmp_path / "checkpoint"))
            else:
                torch.manual_seed(3)
            model.train()
            for micro in range(2 * session.step, 2 * stop):
                with accelerator.accumulate(model):
                    batch = collate([data[(micro * 4 + i) % 24] for i in range(4)])
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            assert session.step == stop
            if stop < 6:
                accelerator.save_state(str(tmp_path / "checkpoint"))
        return accelerator.unwrap_model(model)

    straight = train(6, resume=False)
    train(3, resume=False)
    assert same_state(train(6, resume=True), straight)
    assert float((straight.classifier.weight == 0).float().mean()) == pytest.approx(0.6, abs=0.02)


def test_the_model_inside_torch_compile_is_meant() -> None:
    model = conv_net()
    wrapped = torch.compile(model, backend="eager")
    with attach(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), [GradualPruning(sparsity=0.5, start=0, end=0)]):
        assert "fc.weight_mask" in model.state_dict()
    assert Student.of(wrapped) is Student.of(model)


def test_data_parallel_is_refused() -> None:
    model = conv_net()
    with pytest.raises(CallbackError, match="DistributedDataParallel"):
        attach(nn.DataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1), [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: attach(m, o, [], total_steps=0), "total_steps must be at least 1"),
        (lambda m, o: attach(m, torch.optim.SGD(conv_net().parameters(), lr=1.0), []), "no parameter of this model"),
        (lambda m, o: attach(m, o, []).load_state_dict({"step": -1}), "not the state of a session"),
        (lambda m, o: attach(m, o, []).load_state_dict({"step": 1, "x": 2}), "not the state of a session"),
        (lambda m, o: attach(m, o, []).bind(o), "follows an optimizer already"),
    ],
)
def test_misuse_says_what_to_do(call: Any, message: str) -> None:
    model = conv_net()
    with pytest.raises(CallbackError, match=message):
        call(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_num_items_needs_tensors() -> None:
    with pytest.raises(CallbackError, match="labels in one tensor, not NoneType"):
        num_items_in_batch(nn.Linear(1, 1), [{"x": torch.zeros(1)}])


def test_a_model_that_is_dropped_is_freed() -> None:
    """A run that ended in an error keeps no model alive through the table of students."""
    model = conv_net()
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualPruning(sparsity=0.5, start=0, end=0)])
    alive = weakref.ref(model)
    del model, session
    gc.collect()
    assert alive() is None
