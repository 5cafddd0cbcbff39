"""CompressionAwareLR: the rate that each step uses, over schedulers of torch and of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.callbacks.loops import bare_net, images, make_trainer, same_state
from torchopt_passes.callbacks import Callback, CompressionAwareLR, GradualPruning, attach
from torchopt_passes.errors import CallbackError, ConfigError


class Changes(Callback):
    """Changes the structure after given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def after_step(self, progress: Any) -> None:
        if progress.step in self.steps and self.student is not None:
            self.student.tell_changed(progress)


def schedulers() -> list[Any]:
    return [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.StepLR(o, 4, 0.5),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 17)], [3]
        ),
    ]


def used_rates(make: Any, callbacks: list[Callback], *, tensor: bool = False, steps: int = 20) -> tuple[Any, Any]:
    """The rates that the optimizer used, and those that the scheduler had set."""
    model = nn.Linear(2, 2)
    rate: Any = torch.tensor(0.8, dtype=torch.float64) if tensor else 0.8
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False, capturable=False)
    scheduler = make(optimizer)
    used: list[float] = []
    optimizer.register_step_post_hook(lambda o, a, k: used.append(float(o.param_groups[0]["lr"])))
    scheduled: list[float] = []
    with attach(model, optimizer, callbacks, total_steps=steps):
        for _ in range(steps):
            scheduled.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            assert float(optimizer.param_groups[0]["lr"]) == scheduled[-1]
            scheduler.step()
    return used, scheduled


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("tensor", [False, True])
def test_the_rate_is_the_formula_over_any_scheduler(index: int, tensor: bool) -> None:
    """Changes after steps 6 and 12; up in 2 steps, 1 at the peak, back in 4."""
    make = schedulers()[index]
    aware = CompressionAwareLR(peak=0.75, warmup=2, plateau=1, decay=4)
    used, scheduled = used_rates(make, [aware, Changes(6, 12)], tensor=tensor)
    bare, _ = used_rates(make, [Callback()], tensor=tensor)
    assert scheduled == bare, "the scheduler must not notice"
    shares = {7: 0.5, 8: 1, 9: 1, 10: 0.75, 11: 0.5, 12: 0.25, 13: 0.75, 14: 1, 15: 1, 16: 0.75, 17: 0.5, 18: 0.25}
    for step, (rate, base) in enumerate(zip(used, scheduled, strict=True), start=1):
        expected = max(base, base + shares.get(step, 0) * (0.75 * 0.8 - base))
        assert rate == pytest.approx(expected, abs=1e-12), f"step {step}"
    assert sum(used) > sum(scheduled)


def test_changes_close_together_make_one_plateau() -> None:
    aware = CompressionAwareLR(peak=1.0, warmup=2, plateau=1, decay=4)
    used, _ = used_rates(lambda o: lr_scheduler.ConstantLR(o, 0.25, 100), [Changes(*range(4, 12)), aware])
    assert used[:4] == [0.2] * 4
    assert used[4] == pytest.approx(0.5)
    assert used[5:14] == [0.8] * 9
    assert used[14:19] == pytest.approx([0.65, 0.5, 0.35, 0.2, 0.2])


def run(folder: Path, make: Any, resume: Path | None = None) -> tuple[nn.Module, list[float]]:
    model = make()
    used: list[float] = []
    pruning = GradualPruning(sparsity=0.6, start=2, end=5, every=3)
    aware = CompressionAwareLR(peak=0.8, warmup=1, plateau=1, decay=2)
    trainer = make_trainer(
        model, images(24), folder, [pruning, aware], steps=9, lr_scheduler_type="linear", save_strategy="steps",
        save_steps=1, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    used = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    return model, used


def test_in_the_trainer_it_works_over_its_scheduler_is_logged_and_resumes(tmp_path: Path) -> None:
    straight, used = run(tmp_path / "run", bare_net)
    scheduled = [0.02 * (9 - step) / 9 for step in range(9)]
    # GradualPruning masks nothing at its first update and everything at its last, after step 5
    shares = {6: 1.0, 7: 1.0, 8: 0.5, 9: 0.0}
    for step, (rate, base) in enumerate(zip(used, scheduled, strict=True), start=1):
        assert rate == pytest.approx(max(base, base + shares.get(step, 0.0) * (0.016 - base))), f"step {step}"
    for stop in (5, 7):
        resumed, _ = run(tmp_path / f"from-{stop}", bare_net, tmp_path / "run" / f"checkpoint-{stop}")
        assert same_state(straight, resumed), f"resumed at step {stop}"


def test_a_run_without_changes_says_so(caplog: pytest.LogCaptureFixture) -> None:
    used, scheduled = used_rates(schedulers()[0], [CompressionAwareLR(warmup=1, plateau=1, decay=1)])
    assert used == scheduled
    assert "no callback has changed the model" in caplog.text


def test_the_rate_is_given_back_after_an_error_in_the_step() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.1)

    class Fails(Callback):
        def before_step(self, progress: Any) -> None:
            if progress.step == 2:
                raise ZeroDivisionError

    aware = CompressionAwareLR(peak=1.0, warmup=1, plateau=9, decay=1)

    def loop() -> None:
        with attach(model, optimizer, [Changes(1), aware, Fails()], total_steps=9):
            for _ in range(3):
                optimizer.step()
                scheduler.step()

    with pytest.raises(ZeroDivisionError):
        loop()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert "compression_aware_lr" not in model.state_dict()


def test_misuse() -> None:
    for options, message in (({"peak": 0.0}, "peak must be > 0"), ({"warmup": 2.0}, "warmup must be a share")):
        wrong: dict[str, Any] = options
        with pytest.raises(ConfigError, match=message):
            CompressionAwareLR(**wrong)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(CallbackError, match="the learning rate is managed by two callbacks"):
        attach(model, optimizer, [CompressionAwareLR(), CompressionAwareLR()], total_steps=99)
    taken: Any = model
    taken.compression_aware_lr = 3
    with pytest.raises(CallbackError, match="has a compression_aware_lr already"):
        attach(model, optimizer, [CompressionAwareLR()], total_steps=99)
