"""The battery: what each callback promises, in every loop."""

from __future__ import annotations

import copy
import inspect
import io
import random
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from transformers import PreTrainedModel, TrainerCallback

from tests.callbacks.cases import CASES, ONE_OF_A_CLASS, Case, exported
from tests.callbacks.loops import (
    collate,
    make_trainer,
    plain_gradient,
    relative_difference,
    same_state,
    train_plain,
    trainer_gradient,
    uncoupled,
)
from tests.callbacks.other_loops import LIGHTNING_WARNS, train_accelerate, train_lightning
from tests.slow import all_but_slow
from torchopt_passes.callbacks import Callback, L1Penalty, attach
from torchopt_passes.errors import CallbackError

QUICK = {*ONE_OF_A_CLASS, "Distillation-features", "GradualPruning-captured", "GradualChannelPruning-captured"}
EVERY = pytest.mark.parametrize("case", all_but_slow(CASES, QUICK), indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_exported_callback_has_a_case() -> None:
    assert exported() == {name.partition("-")[0] for name in CASES}


def test_every_event_of_the_trainer_is_there() -> None:
    events = {name for name, _ in inspect.getmembers(TrainerCallback) if name.startswith("on_")}
    assert len(events) >= 16
    assert events <= set(dir(Callback))


@EVERY
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_and_plain_loop_give_the_same_weights(case: Case, accumulate: int, tmp_path: Path) -> None:
    ours, theirs = case.model(0.0), case.model(0.0)
    data = case.data(16)
    make_trainer(theirs, data, tmp_path, [case.make()], accumulate=accumulate).train()
    train_plain(ours, data, [case.make()], accumulate=accumulate)
    assert same_state(ours, theirs)
    assert not same_state(ours, case.model(0.0))


@EVERY
@pytest.mark.parametrize("train", [train_accelerate, train_lightning], ids=["accelerate", "lightning"])
@LIGHTNING_WARNS
def test_other_loops_give_the_weights_of_the_plain_loop_and_resume(
    case: Case, train: Callable[..., None], tmp_path: Path
) -> None:
    data = case.data(24)
    expected, straight, resumed = case.model(0.0), case.model(0.0), case.model(0.0)
    train_plain(expected, data, [case.make()], accumulate=2)
    train(straight, data, [case.make()], accumulate=2, folder=tmp_path, save=3)
    assert same_state(straight, expected)
    train(resumed, data, [case.make()], accumulate=2, folder=tmp_path, resume=True)
    assert same_state(resumed, expected)
    assert hooks_of(resumed) == hooks_of(case.model(0.0))


@EVERY
def test_the_trained_model_loads_where_our_library_is_not(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(0.0), collate(case.data(4))
    train_plain(model, case.data(16), [case.make()])
    if case.stays_ours:
        pytest.skip(case.stays_ours)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(tmp_path)
        plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
    else:
        save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
        plain = case.plain()
        plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not type(plain).__module__.startswith("torchopt_passes")
    with torch.no_grad():
        expected, found = model.eval()(**batch), plain.eval()(**batch)
    assert torch.equal(found.logits, expected.logits)


@EVERY
def test_trainer_resumes_bit_for_bit(case: Case, tmp_path: Path) -> None:
    steps, data = 6, case.data(24)
    straight = case.model(0.1)
    saving = {"save_strategy": "steps", "save_steps": 1, "steps": steps}
    make_trainer(straight, data, tmp_path / "run", [case.make()], **saving).train()
    stops = random.Random(0).sample(range(1, steps), 3)
    for stop in stops:
        resumed = case.model(0.1)
        trainer = make_trainer(resumed, data, tmp_path / f"from-{stop}", [case.make()], **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert same_state(straight, resumed), f"resumed at step {stop}"


@EVERY
def test_plain_loop_resumes_bit_for_bit(case: Case) -> None:
    data = case.data(24)
    straight = case.model(0.1)
    torch.manual_seed(3)
    train_plain(straight, data, [case.make()])
    for stop in (1, 3, 5):
        torch.manual_seed(3)
        first = case.model(0.1)
        torch.manual_seed(3)
        buffer = io.BytesIO()
        torch.save(train_plain(first, data, [case.make()], stop=stop), buffer)
        buffer.seek(0)
        resumed = case.model(0.1)
        train_plain(resumed, data, [case.make()], resume=torch.load(buffer, weights_only=True))
        assert same_state(straight, resumed), f"resumed at step {stop}"


@EVERY
@pytest.mark.parametrize("loop", ["trainer", "plain"])
def test_gradient_accumulation_changes_nothing(case: Case, loop: str, tmp_path: Path) -> None:
    """Labels are ragged, and one micro-batch has none at all."""
    data = case.data(8)

    def gradient(accumulate: int) -> list[torch.Tensor]:
        callback = (case.settled or case.make)()
        if loop == "plain":
            return plain_gradient(uncoupled(case.model(0.0)), data, [callback], accumulate=accumulate)
        return trainer_gradient(uncoupled(case.model(0.0)), data, tmp_path, [callback], accumulate=accumulate)

    whole = gradient(1)
    for accumulate in (4, 8):
        assert relative_difference(gradient(accumulate), whole) < 1e-5


@EVERY
def test_nothing_is_left_behind(case: Case, tmp_path: Path) -> None:
    model = case.model(0.0)
    keys, hooks = set(model.state_dict()), hooks_of(model)
    callback = case.make()
    trainer = make_trainer(model, case.data(16), tmp_path, [callback])
    accepts = trainer.model_accepts_loss_kwargs
    extra = set(model.state_dict()) - keys
    assert all(name.endswith(case.extra_state) for name in extra)
    assert bool(extra) == bool(case.extra_state)
    trainer.train()
    assert set(model.state_dict()) == keys
    assert hooks_of(model) == hooks
    assert callback.student is None
    assert trainer.model_accepts_loss_kwargs == accepts
    trainer.evaluate(case.data(4))


@EVERY
def test_nothing_is_left_behind_after_an_error(case: Case) -> None:
    model = case.model(0.0)
    keys, hooks = set(model.state_dict()), hooks_of(model)
    callback = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), attach(model, optimizer, [callback], total_steps=9):
        raise ZeroDivisionError
    assert set(model.state_dict()) == keys
    assert hooks_of(model) == hooks
    assert not optimizer._optimizer_step_post_hooks
    assert callback.student is None


@EVERY
def test_training_again_after_an_error_in_the_trainer(case: Case, tmp_path: Path) -> None:
    class Stop(Callback):
        def after_step(self, progress: object) -> None:
            raise KeyboardInterrupt

    data = case.data(16)
    expected, model, callback = case.model(0.0), case.model(0.0), case.make()
    make_trainer(expected, data, tmp_path, [case.make()]).train()
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, data, tmp_path, [callback, stop]).train()
    stop.close()
    model.load_state_dict(case.model(0.0).state_dict(), strict=False)
    make_trainer(model, data, tmp_path, [callback]).train()
    assert same_state(model, expected)


@EVERY
def test_training_twice_with_one_object(case: Case, tmp_path: Path) -> None:
    data = case.data(16)
    once, twice, callback = case.model(0.0), case.model(0.0), case.make()
    make_trainer(once, data, tmp_path, [case.make()]).train()
    make_trainer(case.model(0.0), data, tmp_path, [callback]).train()
    make_trainer(twice, data, tmp_path, [callback]).train()
    assert same_state(once, twice)


@EVERY
def test_attaching_twice_is_refused(case: Case) -> None:
    model, callback = case.model(0.0), case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, [callback], total_steps=9):
        for again in ([callback], [case.make()]):
            with pytest.raises(CallbackError, match=f"{type(callback).__name__} at work already"):
                attach(model, optimizer, again, total_steps=9)
        assert callback.student is not None
    with pytest.raises(CallbackError, match="given twice"):
        attach(model, optimizer, [callback, callback], total_steps=9)
    with attach(model, optimizer, [callback], total_steps=9):
        pass


@EVERY
def test_evaluation_is_untouched(case: Case) -> None:
    bare, model = case.bare(0.1).eval(), case.model(0.1)
    batch = collate(case.data(4))
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [case.make()], total_steps=9):
        model.eval()
        with torch.no_grad():
            expected, found = bare(**batch), model(**batch)
    assert torch.equal(expected.loss, found.loss)
    assert torch.equal(expected.logits, found.logits)


@EVERY
def test_copies_and_pickles_of_the_student_are_plain_models(case: Case) -> None:
    model, callback = case.model(0.0), case.make()
    batch = collate(case.data(4))
    expected = case.bare(0.0).train()(**batch).loss
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [callback], total_steps=9):
        model.train()
        assert torch.equal(copy.deepcopy(model)(**batch).loss, expected)
        if isinstance(model, fx.GraphModule):
            return  # pickled as code, without hooks
        bare, buffer = io.BytesIO(), io.BytesIO()
        torch.save(case.model(0.0), bare)
        torch.save(model, buffer)
        masks = sum(t.numel() for name, t in model.state_dict().items() if name.endswith("_mask"))
        assert buffer.tell() < bare.tell() + masks + 20_000  # no teacher in it
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(**batch).loss, expected)


def test_the_order_of_callbacks_does_not_matter(tmp_path: Path) -> None:
    base = CASES["GradualPruning"]
    # not the proximal form: what it makes zero ties with what is masked
    penalty = partial(L1Penalty, strength=0.3, form="gradient")
    makers = [CASES["GradualPruning"].make, CASES["Distillation"].make, penalty]
    results = []
    for order in permutations(makers):
        model = base.model(0.0)
        make_trainer(model, base.data(16), tmp_path, [make() for make in order]).train()
        results.append(model)
    assert all(same_state(results[0], other) for other in results[1:])
