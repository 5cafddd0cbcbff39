"""Training that is killed, in a process of its own, and goes on from its last checkpoint in another.

`test_kills.py` and ``benchmarks/resume.py`` start it: ``python -m tests.callbacks.kills FOLDER KILLS [CASE ...]``
does so for every case of the battery and writes ``kills.json``. It forks after everything is imported, because a
start of Python with Transformers takes longer than the training.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.callbacks.cases import CASES, CLUSTERED, Case
from tests.callbacks.loops import make_trainer
from torchopt_passes.callbacks import Callback
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.record import snake_case
from torchopt_passes.recipe import Recipe, load_recipe

STEPS, EVERY = 8, 2
MOMENTS = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "save")
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@dataclass(frozen=True)
class Kill:
    """When: at which event of the Trainer in which step, counted from 1."""

    step: int
    moment: str


class Killer(TrainerCallback):
    """Sends SIGKILL to its own process."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill

    def __getattribute__(self, name: str) -> Any:
        kill: Kill = object.__getattribute__(self, "kill")
        if name != f"on_{kill.moment}":
            return object.__getattribute__(self, name)

        def event(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = state.global_step if kill.moment in ("step_end", "save") else state.global_step + 1
            if done == kill.step:
                os.kill(os.getpid(), signal.SIGKILL)

        return event


def rebuilt(case: Case, path: Path) -> Callback:
    """The callback of a case, made from its recipe; what a file cannot hold is given to it."""
    example = case.make()
    name = snake_case(type(example).__name__)
    options, live = {}, {}
    for field in fields(example):
        if not field.init:
            continue
        value = getattr(example, field.name)
        try:
            Recipe(callbacks=((name, {field.name: value}),)).to_dict()
            options[field.name] = value
        except ConfigError:
            live[field.name] = value
    Recipe(callbacks=((name, options),)).save(path)
    return load_recipe(path).make_callbacks(**live)[0]


def train(case: Case, folder: Path, *, kill: Kill | None, recipe: bool) -> None:
    """Train, from the last checkpoint in the folder if there is one; dropout is on, labels are ragged."""
    model = case.model(0.1)
    callback = rebuilt(case, folder / "recipe.yaml") if recipe else case.make()
    saving = {"save_strategy": "steps", "save_steps": EVERY, "logging_strategy": "steps", "logging_steps": 1}
    callbacks = [callback, Killer(kill)] if kill else [callback]
    trainer = make_trainer(model, case.data(24), folder, callbacks, accumulate=2, steps=STEPS, **saving)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    torch.save(model.state_dict(), folder / "end.pt")


def in_child(run: Callable[[], None], log: Path) -> int:
    """Run in a forked process; returns how it ended, as `os.waitstatus_to_exitcode` has it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        file.flush()
    os._exit(code)


def differences(straight: Path, resumed: Path) -> list[str]:
    """What is not the same, bit for bit: in the model at the end, in every checkpoint and in the logs."""
    found: list[str] = []
    states = [torch.load(folder / "end.pt", weights_only=True) for folder in (straight, resumed)]
    found += _unequal("end", *states)
    names = sorted(path.name for path in straight.glob("checkpoint-*"))
    if names != sorted(path.name for path in resumed.glob("checkpoint-*")):
        return [*found, "other checkpoints"]
    for name in names:
        found += _unequal(name, *(load_file(folder / name / "model.safetensors") for folder in (straight, resumed)))
        moments = [torch.load(folder / name / "optimizer.pt", weights_only=True) for folder in (straight, resumed)]
        found += _unequal(f"{name} optimizer", *map(_flat, moments))
        logs = [json.loads((folder / name / "trainer_state.json").read_text()) for folder in (straight, resumed)]
        if logs[0]["global_step"] != logs[1]["global_step"] or _history(logs[0]) != _history(logs[1]):
            found.append(f"{name}: logs")
    return found


def _history(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in state["log_history"]]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{name}.{key}").items()}
    return {name: value}


def _unequal(where: str, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    if one.keys() != other.keys():
        return [f"{where}: other names {sorted(one.keys() ^ other.keys())}"]
    same = {n: torch.equal(v, other[n]) if isinstance(v, torch.Tensor) else v == other[n] for n, v in one.items()}
    return [f"{where}: {name}" for name, equal in same.items() if not equal]


def try_kills(case: Case, name: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """Kill a run of the case at moments seeded by its name; every second is resumed by recipe, from the first."""
    generator = random.Random(name)
    case.model(0.1)  # captured once, before the forks
    straight = folder / "straight"
    straight.mkdir(parents=True)
    code = in_child(lambda: train(case, straight, kill=None, recipe=False), straight / "log")
    assert code == 0, (straight / "log").read_text()[-3000:]
    rows: list[dict[str, Any]] = []
    for index in range(count):
        moment = generator.choice(MOMENTS)
        # not at the last one, of a run that is over: resumed from there the Trainer goes one step beyond the end
        saves = STEPS // EVERY - 1
        step = EVERY * generator.randint(1, saves) if moment == "save" else generator.randint(1, STEPS)
        kill, recipe, run = Kill(step, moment), index % 2 == 0, folder / str(index)
        run.mkdir()
        code = in_child(lambda kill=kill, run=run: train(case, run, kill=kill, recipe=False), run / "log")
        assert code == -signal.SIGKILL, (run / "log").read_text()[-3000:]
        last = get_last_checkpoint(str(run))
        code = in_child(lambda run=run, recipe=recipe: train(case, run, kill=None, recipe=recipe), run / "log")
        wrong = differences(straight, run) if code == 0 else [(run / "log").read_text()[-3000:]]
        start = int(last.rpartition("-")[2]) if last else 0
        rows.append({"step": step, "moment": moment, "from": start, "recipe": recipe, "differences": wrong})
    return rows


def main(folder: Path, count: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the collections of the children would copy the memory that they share
    rows = {name: try_kills((CASES | CLUSTERED)[name], name, folder / name, count) for name in names or CASES}
    (folder / "kills.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
