"""Parameters that a callback brings: trained, saved, resumed and wrapped with the model, and gone at the end."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForTokenClassification, get_scheduler
from transformers.trainer_utils import get_last_checkpoint

from tests.callbacks.loops import (
    LEARNING_RATE,
    collate,
    conv_net,
    images,
    make_trainer,
    ragged_tokens,
    same_state,
    tiny_bert,
    train_plain,
)
from tests.callbacks.other_loops import LIGHTNING_WARNS, train_accelerate, train_lightning
from torchopt_passes.callbacks import Callback, GradualPruning, LossTerm, StudentCall, attach
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.functional.losses import masked_mean

DATA = ragged_tokens(24)


class Probe(Callback):
    """Adds the loss of a linear head on the logits, which it trains."""

    changes_loss = True

    def __init__(self, name: str = "probe", **options: Any) -> None:
        self.name, self.options, self.events = name, options, list[float]()
        self.head: nn.Linear | None = None

    def install(self, student: Student) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.head = nn.Linear(3, 2)
        if self.options:
            self.head.optimizer_options = self.options
        student.own(self.name, self.head, self)

    def loss_term(self, call: StudentCall) -> LossTerm:
        head = call.model.get_submodule(f"torchopt_{self.name}")
        values = head(call.output.logits.float()).square().mean(-1)
        return LossTerm(0.1 * masked_mean(values, call.labels.ne(-100)))

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.events.append(float(self.head.weight.detach().sum()))


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("options", [{}, {"lr": 0.5, "weight_decay": 0.0}], ids=["as the model", "own options"])
def test_the_trainer_trains_saves_resumes_and_forgets_them(options: dict[str, float], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "steps": 5, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    straight, probe = tiny_bert(0.1), Probe(**options)
    keys = set(straight.state_dict())
    trainer = make_trainer(straight, DATA, tmp_path, [probe], **saving)
    assert set(straight.state_dict()) - keys == {"torchopt_probe.weight", "torchopt_probe.bias"}
    head, before = probe.head, probe.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(head.weight, before)
    assert set(straight.state_dict()) == keys
    assert parameters_of(trainer.optimizer) == {id(p) for p in straight.parameters()}
    assert len(trainer.optimizer.state) == len(keys)
    assert "create_optimizer" not in vars(trainer)

    resumed, again = tiny_bert(0.1), Probe(**options)
    other = make_trainer(resumed, DATA, tmp_path / "resumed", [again], **saving)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(straight, resumed)
    assert probe.events == again.events

    resumed.save_pretrained(tmp_path / "final")
    loaded, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.values())
    assert same_state(loaded, straight)


def test_the_trainer_gives_them_options_of_their_own(tmp_path: Path) -> None:
    seen: list[tuple[float, float, int]] = []

    class Look(Callback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[:] = [(g["lr"], g["weight_decay"], len(g["params"])) for g in kwargs["optimizer"].param_groups]

    options = {"steps": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    probe = Probe(lr=0.5, weight_decay=0.0)
    make_trainer(tiny_bert(), DATA, tmp_path, [probe, Look()], **options).train()
    assert [entry[:2] for entry in seen] == [(LEARNING_RATE / 2, 0.1), (LEARNING_RATE / 2, 0.0), (0.25, 0.0)]
    assert seen[2][2] == 2
    assert sum(entry[2] for entry in seen) == len(list(tiny_bert().parameters())) + 2


def test_a_plain_loop_and_the_trainer_agree_and_both_resume(tmp_path: Path) -> None:
    ours, theirs = tiny_bert(), tiny_bert()
    make_trainer(theirs, DATA, tmp_path, [Probe(), GradualPruning(sparsity=0.5, start=1, end=3)]).train()
    train_plain(ours, DATA, [GradualPruning(sparsity=0.5, start=1, end=3), Probe()])
    assert same_state(ours, theirs)
    buffer = io.BytesIO()
    torch.save(train_plain(tiny_bert(), DATA, [Probe(lr=0.5)], stop=3), buffer)
    buffer.seek(0)
    resumed, straight = tiny_bert(), tiny_bert()
    train_plain(resumed, DATA, [Probe(lr=0.5)], resume=torch.load(buffer, weights_only=True))
    train_plain(straight, DATA, [Probe(lr=0.5)])
    assert same_state(resumed, straight)


def test_one_object_trains_twice(tmp_path: Path) -> None:
    probe, models = Probe(lr=0.5), []
    for _ in range(2):
        models.append(tiny_bert())
        make_trainer(models[-1], DATA, tmp_path, [probe]).train()
    assert same_state(*models)
    assert probe.events[0] == probe.events[1]


def test_attach_adds_a_group_and_takes_it_away() -> None:
    model = conv_net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.3, betas=(0.5, 0.9))
    names = list(optimizer.param_groups[0]["param_names"])
    with attach(model, optimizer, [Probe(weight_decay=0.0)]):
        group = optimizer.param_groups[1]
        assert group["param_names"] == ["torchopt_probe.weight", "torchopt_probe.bias"]
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.0, (0.5, 0.9))
        scheduler = get_scheduler("linear", optimizer, 0, 10)
        model.train()(**collate(images(4))).loss.backward()
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.09)
        assert len(optimizer.state) == len(names) + 2
    assert [group["param_names"] for group in optimizer.param_groups] == [names, []]  # the scheduler counts on two
    assert parameters_of(optimizer) == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(names)
    optimizer.step()
    scheduler.step()


def assert_two(groups: list[Any]) -> None:
    assert len(groups) == 2


def test_an_error_takes_them_away_too() -> None:
    model = conv_net()
    optimizer, keys = torch.optim.SGD(model.parameters(), lr=0.1), set(model.state_dict())
    with pytest.raises(ZeroDivisionError), attach(model, optimizer, [Probe()]):
        raise ZeroDivisionError(assert_two(optimizer.param_groups))
    assert set(model.state_dict()) == keys
    assert len(optimizer.param_groups) == 1


def test_copies_and_pickles_have_no_callback_but_compute_the_same() -> None:
    model, batch = tiny_bert(), collate(DATA[:4])
    expected = tiny_bert().train()(**batch).loss
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [Probe()]):
        assert not torch.equal(model.train()(**batch).loss, expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(**batch).loss, expected)


@pytest.mark.parametrize("train", [train_accelerate, train_lightning])
@LIGHTNING_WARNS
def test_other_loops_train_and_resume_them(train: Any, tmp_path: Path) -> None:
    plain, straight, resumed = tiny_bert(), tiny_bert(), tiny_bert()
    train_plain(plain, DATA, [Probe(lr=0.5)])
    train(straight, DATA, [Probe(lr=0.5)], folder=tmp_path, save=3)
    assert same_state(straight, plain)
    train(resumed, DATA, [Probe(lr=0.5)], folder=tmp_path, resume=True)
    assert same_state(resumed, plain)


@pytest.mark.parametrize("attach_first", [True, False])
def test_accelerate_before_and_after_prepare(attach_first: bool) -> None:
    accelerator, model = Accelerator(cpu=True), tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    if attach_first:
        session = attach(model, optimizer, [Probe()], total_steps=6)
        prepared, optimizer = accelerator.prepare(model, optimizer)
    else:
        prepared, optimizer = accelerator.prepare(model, optimizer)
        session = attach(prepared, optimizer, [Probe()], total_steps=6)
    prepared.train()
    for step in range(6):
        batch = collate([DATA[(step * 8 + i) % 24] for i in range(8)])
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    plain = tiny_bert()
    train_plain(plain, DATA, [Probe()])
    assert same_state(accelerator.unwrap_model(prepared), plain)


def test_a_wrapper_that_would_not_see_them_is_refused(tmp_path: Path) -> None:
    # no communication, and none of gloo's threads, which can deadlock when they end in this process
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = conv_net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(CallbackError, match=r"Probe brings parameters \(probe\), but the model is wrapped"):
            attach(wrapped, optimizer, [Probe()])
        assert "torchopt_probe.weight" not in model.state_dict()

        model = conv_net()
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [Probe()]):
            wrapped = nn.parallel.DistributedDataParallel(model)
            assert "module.torchopt_probe.weight" in dict(wrapped.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_misuse_says_what_to_do(tmp_path: Path) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CallbackError, match=r"optimizer_options has \['speed'\], but SGD has \['dampening'"):
        attach(model, optimizer, [Probe(speed=1)])
    with pytest.raises(CallbackError, match="'torchopt_probe': take another name"):
        attach(model, optimizer, [Probe(), Probe()])
    with pytest.raises(CallbackError, match="'torchopt_a b': take another name"):
        attach(model, optimizer, [Probe("a b")])
    get_scheduler("linear", optimizer, 0, 10)
    with pytest.raises(CallbackError, match="cannot take the parameters of torchopt_probe"):
        attach(model, optimizer, [Probe()])
    assert not any(name.startswith("torchopt") for name in model.state_dict())
    trainer = make_trainer(tiny_bert(), DATA, tmp_path, [])
    trainer.add_callback(Probe())
    with pytest.raises(CallbackError, match=r"pass callbacks=\[...\] when it is made"):
        trainer.train()
    assert get_last_checkpoint(str(tmp_path)) is None


def test_two_callbacks_bring_theirs_side_by_side(tmp_path: Path) -> None:
    model = tiny_bert()
    probes = [Probe("one", lr=0.5), Probe("two")]
    trainer = make_trainer(model, DATA, tmp_path, probes)
    trainer.train()
    alone = tiny_bert()
    train_plain(alone, DATA, [Probe("two"), Probe("one", lr=0.5)])
    assert same_state(model, alone)
    assert "create_optimizer" not in vars(trainer)


def test_after_an_error_the_object_trains_another_model(tmp_path: Path) -> None:
    class Stop(Callback):
        def after_step(self, progress: object) -> None:
            raise KeyboardInterrupt

    probe = Probe()
    trainer = make_trainer(tiny_bert(), DATA, tmp_path, [probe, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    del trainer
    gc.collect()
    models = [tiny_bert(), tiny_bert()]
    make_trainer(models[0], DATA, tmp_path, [probe]).train()
    make_trainer(models[1], DATA, tmp_path, [Probe()]).train()
    assert same_state(*models)


def test_training_again_with_the_same_trainer_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_bert(), DATA, tmp_path, [Probe()], steps=1)
    trainer.train()
    with pytest.raises(CallbackError, match="make a new Trainer to train again"):
        trainer.train()
