"""Find the size attributes of the user's own modules that a removal changes: by trial on a copy, never by a guess."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.attribute_candidates import (
    Candidate,
    Choice,
    Counts,
    axes_of,
    candidates_of,
    is_expected,
    true_of_config,
)
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices, removals
from torchopt_passes.graph.pruning.resize_attribute import ResizeAttribute, write_size
from torchopt_passes.graph.tracing import no_cache
from torchopt_passes.graph.verify import Inputs, in_eval_mode, relative_error

__all__ = ["find_attributes"]

_TOLERANCE, _OWN_TOLERANCE, _TRIALS = 1e-5, 1e-3, 120


def find_attributes(
    source: nn.Module,
    edits: Sequence[RemoveIndices],
    example_inputs: Inputs,
    expected_outputs: Sequence[Any],
    *,
    counts: Counts | None = None,
) -> list[ResizeAttribute]:
    """Find what must be set on the user's module so that it computes what the pruned graph computes.

    A copy of the module is cut once; then attributes are set on it, run and compared, in float64 where the module can
    (relative error within 1e-5: modules cast to float32 inside). What is needed is found from the module that fails;
    then numbers of heads and inner widths that are called so are made true too, if the outputs stay equal.

    Args:
        source: the user's module; it is left as it is.
        edits: what is removed.
        example_inputs: ``(args, kwargs)``.
        expected_outputs: flat outputs of the pruned graph on these inputs, in eval mode.
        counts: hints: path of a module or fqn -> number of units (heads) before -> after.

    Returns:
        The attributes to set, to be put behind the edits in the plan.

    Raises:
        PlanError: no setting makes the module compute what the graph does; names the line that fails.
    """
    trials = _Trials(source, edits, example_inputs, expected_outputs, counts or {})
    chosen = _search(trials)
    chosen = _make_true(trials, chosen)
    return [
        ResizeAttribute(
            target=candidate.target,
            old=candidate.old,
            new=candidate.new,
            reason="the module's own size follows what was removed; its outputs equal those of the pruned graph",
        )
        for candidate in trials.candidates_in(chosen)
    ]


@dataclass(frozen=True)
class _Outcome:
    """What a trial gave: the error, or where the module failed."""

    error: float
    done: int = 0
    modules: tuple[str, ...] = ()
    message: str = ""


Chosen = frozenset[Choice]


class _Trials:
    """The cut copy of a module, and every trial that was made on it."""

    def __init__(
        self,
        source: nn.Module,
        edits: Sequence[RemoveIndices],
        inputs: Inputs,
        expected: Sequence[Any],
        counts: Counts,
    ) -> None:
        self.name = type(source).__name__
        cut = removals(source, edits)
        self.axes = axes_of(cut)
        self.twin = copy.deepcopy(source)
        dtype = torch.float64 if _runs(self.twin, inputs) else None
        self.tolerance = _TOLERANCE if dtype else _OWN_TOLERANCE
        RemoveIndices.apply_all(self.twin, edits)
        self._inputs = pytree.tree_map(lambda value: _cast(value, dtype), inputs)
        self._expected = pytree.tree_leaves(expected)
        self.candidates = candidates_of(self.twin, self.axes, counts)
        self._known: dict[Chosen, _Outcome] = {}
        self._set: list[Candidate] = []

    def candidates_in(self, chosen: Chosen) -> list[Candidate]:
        """Return the attributes that a set of choices sets."""
        return [candidate for candidate in self.candidates if candidate.choice in chosen]

    def choices(self, paths: Sequence[str] | None = None) -> list[Choice]:
        """Return the choices about modules (about all of them), in the order of the modules."""
        found: dict[Choice, None] = {}
        if paths is not None:
            held = [self.twin.get_submodule(path) for path in paths]
            shared = getattr(self.twin, "config", None)
            paths = [*paths, *(["config"] if any(getattr(module, "config", None) is shared for module in held) else [])]
        for path in paths if paths is not None else [""]:
            for candidate in self.candidates:
                if paths is None or candidate.target.rpartition(".")[0] == path:
                    found[candidate.choice] = None
        return list(found)

    def works(self, chosen: Chosen) -> bool:
        """Return whether the module computes what the graph does under a set of choices."""
        return self.run(chosen).error <= self.tolerance

    def run(self, chosen: Chosen) -> _Outcome:
        """Set the attributes and run."""
        if chosen not in self._known:
            if len(self._known) >= _TRIALS:
                return _Outcome(float("inf"))
            for candidate in self._set:
                write_size(self.twin, candidate.target, candidate.old)
            self._set = self.candidates_in(chosen)
            for candidate in self._set:
                write_size(self.twin, candidate.target, candidate.new)
            self._known[chosen] = self._run()
        return self._known[chosen]

    def _run(self) -> _Outcome:
        calls: list[int] = []
        handle = register_module_forward_hook(lambda module, args, output: calls.append(1))
        try:
            outputs = _outputs(self.twin, self._inputs)
        except Exception as error:  # whatever the user's code raises is what a trial is for
            paths = {module: path for path, module in self.twin.named_modules()}
            failing = _failing(error.__traceback__, paths)
            return _Outcome(float("inf"), len(calls), failing, _message(error, failing))
        finally:
            handle.remove()
        return _Outcome(relative_error(outputs, self._expected), len(calls))


def _search(trials: _Trials) -> Chosen:
    """Return the choices under which the module works, few of them.

    Raises:
        PlanError: there are none.
    """
    nothing: Chosen = frozenset()
    expected = frozenset(choice for choice in trials.choices() if is_expected(choice) and choice.rank == 0)
    for start in (nothing, expected):
        if trials.works(start):
            return start
    for start in (nothing, expected):
        found = _climb(trials, start)
        if found is not None:
            return found
    first = trials.run(nothing)
    why = first.message or f"it computes something else (relative error {first.error:.1e})"
    raise PlanError(
        f"{trials.name} has sizes of its own that do not fit what is removed, and none of its attributes makes them "
        f"fit: {why}. The plan still applies to the captured graph; or make that line read its size from tensors"
    )


def _climb(trials: _Trials, start: Chosen) -> Chosen | None:
    """Add the choice that lets the module run further, again and again, until it works."""
    chosen = start
    for _ in range(16):
        outcome = trials.run(chosen)
        near = trials.choices(outcome.modules) if outcome.modules else []
        better: Chosen | None = None
        for choice in dict.fromkeys([*near, *trials.choices()]):
            attempt = chosen ^ {choice}
            attempt -= {other for other in attempt if _excludes(choice, other)}
            if trials.works(attempt):
                return attempt
            if better is None and choice in near and trials.run(attempt).done > outcome.done:
                better = attempt
                break
        if better is None:
            return None
        chosen = better
    return None


def _make_true(trials: _Trials, chosen: Chosen) -> Chosen:
    """Add the numbers of heads and inner widths, which other paths through the code read, where nothing changes."""
    wanted = [choice for choice in trials.choices() if is_expected(choice) and choice.rank == 0]
    chosen = _add(trials, chosen, [c for c in wanted if not any(_excludes(c, other) for other in chosen)])
    config = true_of_config(trials.twin, trials.axes, trials.candidates_in(chosen))
    if any(candidate.choice in chosen for candidate in trials.candidates if candidate.target.startswith("config.")):
        return chosen  # the configuration was needed, so what is there is decided
    trials.candidates = [c for c in trials.candidates if not c.target.startswith("config.")] + config
    return _add(trials, chosen, [candidate.choice for candidate in config])


def _add(trials: _Trials, chosen: Chosen, wanted: Sequence[Choice]) -> Chosen:
    if trials.works(chosen.union(wanted)):
        return chosen.union(wanted)
    for choice in wanted:
        if trials.works(chosen | {choice}):
            chosen |= {choice}
    return chosen


def _excludes(one: Choice, other: Choice) -> bool:
    """Return whether two choices give one attribute different values."""
    return one != other and (one.owner, one.name) == (other.owner, other.name)


def _runs(module: nn.Module, inputs: Inputs) -> bool:
    """Take a module to float64 if it runs there; otherwise leave it."""
    dtypes = {tensor: tensor.dtype for tensor in (*module.parameters(), *module.buffers())}
    module.double()
    try:
        _outputs(module, pytree.tree_map(lambda value: _cast(value, torch.float64), inputs))
    except Exception:  # a cast inside the user's code
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)
        return False
    return True


def _outputs(module: nn.Module, inputs: Inputs) -> list[Any]:
    args, kwargs = inputs
    with no_cache(module), in_eval_mode(module):
        return pytree.tree_leaves(module(*args, **kwargs))


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and dtype is not None else value


def _failing(trace: TracebackType | None, paths: Mapping[nn.Module, str]) -> tuple[str, ...]:
    """Return the paths of the modules whose code was running, the innermost first."""
    found: dict[str, None] = {}
    for frame, _ in traceback.walk_tb(trace):
        for name in ("self", "module"):
            value = frame.f_locals.get(name)
            if isinstance(value, nn.Module) and value in paths:
                found[paths[value]] = None
    return tuple(reversed(found))


def _message(error: Exception, modules: Sequence[str]) -> str:
    """Return what failed, and where in the user's code, or else in which module."""
    frames = traceback.extract_tb(error.__traceback__)
    machinery = ("/torch/", "/torchopt_passes/")
    own = [frame for frame in frames if not any(part in frame.filename.replace("\\", "/") for part in machinery)]
    where = f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line}): " if own else f"{modules[0]!r}: " if modules else ""
    return f"{where}{(str(error).strip() or type(error).__name__).splitlines()[0]}"
