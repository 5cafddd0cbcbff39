"""torch-pruning on one model, unaided: told nothing but the ratio and the layers that make the output.

The lists of indices that it removes are read off its own calls, to know what to zero in the original; nothing of what
it does is changed. Its stages get so many CPU seconds (`LIMITS`).
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_check import Removed, main_outputs
from benchmarks.coverage_models import BATCH, Case
from benchmarks.coverage_row import RATIO, Row, check, cost, peak, timed, train_step, words

__all__ = ["LIMITS", "run"]

LIMITS = {"building its graph": 30.0, "removing": 90.0}
"""CPU seconds for each stage; what is built at all is built in a few seconds."""


class OverTheLimitError(Exception):
    pass


def run(case: Case, row: Row) -> None:
    """Fill the row, as far as it gets."""
    import torch_pruning as tp

    row["version"] = f"torch-pruning {version('torch-pruning')}"
    args, kwargs = case.inputs(BATCH)
    model = case.build()
    row["parameters before"], row["macs before"] = cost(model, args, kwargs)
    stage = "finding the output layers"
    try:
        ignored = output_layers(model, args, kwargs)
        stage = "building its graph"
        with timed(row, "seconds prune"), cpu_limit(LIMITS[stage]):
            pruner = tp.pruner.MagnitudePruner(
                model,
                example_inputs=kwargs or args,
                importance=tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=RATIO,
                ignored_layers=ignored,
                output_transform=lambda output: [t for t in _predictions(output) if t.grad_fn is not None],
            )
        stage, groups = "removing", 0
        with recorded() as cuts, timed(row, "seconds prune"), cpu_limit(LIMITS[stage]):
            for group in pruner.step(interactive=True):
                group.prune()
                groups += 1
        row["groups"] = groups
    except OverTheLimitError:
        row |= {"outcome": "timeout", "note": f"{stage}: over {LIMITS[stage]:.0f} CPU seconds", "peak MB": peak()}
        return
    except Exception as error:
        row |= {"outcome": "crash", "note": words(error, stage), "peak MB": peak()}
        return
    row["peak MB"] = peak()
    row["parameters after"] = sum(p.numel() for p in model.parameters())
    if row["parameters after"] == row["parameters before"]:
        row["outcome"] = "nothing pruned"
        return
    check(row, case, model.eval(), removed_of(model, cuts))
    if row.get("outcome") != "crash":
        row["macs after"] = cost(model.eval(), args, kwargs)[1]
        row["trains"] = train_step(case, model)


def output_layers(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """Return the linear and convolution layers from which the output is reached through no other of them."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        made[output.grad_fn] = module

    layers = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, layers)]
    try:
        output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[nn.Module, None] = {}
    stack = [t.grad_fn for t in _predictions(output)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in made:
            found[made[node]] = None
        elif node is not None:
            following = {n for n, _ in node.next_functions} - seen
            seen |= following
            stack += following
    return list(found)


def _predictions(output: Any) -> list[torch.Tensor]:
    """Return the outputs without the loss: it adds nothing that the logits do not need."""
    if isinstance(output, dict):
        output = {name: value for name, value in output.items() if name != "loss"}
    return main_outputs(output)


Cuts = dict[int, tuple[nn.Parameter, dict[int, tuple[int, list[int]]]]]
"""id of a pruned parameter -> it (so the id stays its own), and of each cut dimension the size and what is left."""


@contextmanager
def recorded() -> Iterator[Cuts]:
    """Record each slice of a parameter that torch-pruning takes, in the numbering of the original."""
    from torch_pruning.pruner.function import BasePruningFunc

    cuts: Cuts = {}
    original = BasePruningFunc._prune_parameter_and_grad

    def observed(self: Any, weight: nn.Parameter, keep: Sequence[int], dim: int) -> nn.Parameter:
        result = original(self, weight, keep, dim)
        left = dict(cuts[id(weight)][1]) if id(weight) in cuts else {}
        dim %= weight.dim()
        size, before = left.get(dim, (weight.shape[dim], list(range(weight.shape[dim]))))
        left[dim] = (size, [before[int(i)] for i in keep])
        cuts[id(result)] = (result, left)
        return result

    BasePruningFunc._prune_parameter_and_grad = observed
    try:
        yield cuts
    finally:
        BasePruningFunc._prune_parameter_and_grad = original


def removed_of(model: nn.Module, cuts: Cuts) -> Removed:
    """Return what was removed of each parameter of the pruned model."""
    return {
        name: {dim: sorted(set(range(size)) - set(left)) for dim, (size, left) in cuts[id(parameter)][1].items()}
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in cuts
    }


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise `OverTheLimitError` in the block after so many CPU seconds."""

    def stop(*_: Any) -> None:
        raise OverTheLimitError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


warnings.filterwarnings("ignore", module="torch_pruning")
