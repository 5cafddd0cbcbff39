"""This library on one model: captured, planned, pruned and proven, then checked from outside."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torchopt_passes as top
from benchmarks.coverage_check import Removed
from benchmarks.coverage_models import BATCH, Case
from benchmarks.coverage_row import RATIO, Row, check, cost, peak, timed, train_step, words
from torchopt_passes.errors import CaptureError, ProofError

__all__ = ["run"]


def run(case: Case, row: Row) -> None:
    """Fill the row, as far as it gets."""
    row["version"] = f"torchopt_passes {version('torchopt_passes')} ({_commit()})"
    args, kwargs = case.inputs(BATCH)
    model = case.build()
    row["parameters before"], row["macs before"] = cost(model, args, kwargs)
    try:
        with timed(row, "seconds capture"):
            graph = top.capture(model, args, kwargs, prove=False)  # capture's own proof is the capture matrix
    except CaptureError as error:
        row |= {"captured": f"refused: {case.refused or ' '.join(str(error).split())}", "outcome": "refused"}
        return
    except Exception as error:
        row |= {"captured": words(error, "no"), "outcome": "crash"}
        return
    row["captured"] = "yes"
    del model
    graph.eval()
    describe_groups(row, graph, case.free_outputs)
    try:
        with seconds_of_planning_and_surgery(row):
            result = top.PruneChannels(ratio=RATIO, free_outputs=case.free_outputs)(graph, top.PassContext())
    except ProofError as error:
        row |= {"outcome": "wrong, rolled back", "note": words(error, "proof")}
        return
    except Exception as error:
        row |= {"outcome": "crash", "note": words(error, "pruning")}
        return
    proof = result.report.proof
    row["proof error"] = proof.error if proof.status == "proven" else f"{proof.status}: {proof.detail}"
    row["parameters after"], row["macs after"] = cost(graph, args, kwargs)
    if not result.plan.edits:
        row["outcome"] = "nothing pruned"
        return
    check(row, case, graph, removed_of(result.plan))
    row["trains"] = train_step(case, graph)


def removed_of(plan: Any) -> Removed:
    """Return the plan's removals, by parameter and dimension."""
    removed: Removed = {}
    for edit in plan.edits:
        if not isinstance(edit, top.RemoveIndices):  # a size attribute of the source module
            continue
        removed.setdefault(edit.target, {})[edit.dim] = edit.indices
    return removed


@contextmanager
def seconds_of_planning_and_surgery(row: Row) -> Iterator[None]:
    """Time `PruneChannels.plan` and `Plan.apply` where the pass calls them, to leave the float64 proof out.

    The peak of memory is read when the plan is made, before the proof runs the model in float64.
    """
    plan, apply = top.PruneChannels.plan, top.Plan.apply

    def timed_plan(*args: Any, **kwargs: Any) -> Any:
        with timed(row, "seconds prune"):
            made = plan(*args, **kwargs)
        row["peak MB"] = peak()
        return made

    def timed_apply(*args: Any, **kwargs: Any) -> Any:
        with timed(row, "seconds prune"):
            return apply(*args, **kwargs)

    top.PruneChannels.plan, top.Plan.apply = timed_plan, timed_apply
    try:
        yield
    finally:
        top.PruneChannels.plan, top.Plan.apply = plan, apply


def describe_groups(row: Row, graph: top.CapturedModule, free_outputs: tuple[str, ...] = ()) -> None:
    """Count the groups of a captured model, and say which are locked and why."""
    try:
        groups = top.find_channel_groups(graph, free_outputs)
    except Exception as error:
        row["locked"] = words(error, "groups")
        return
    locked = [group for group in groups if group.locked]
    row |= {"groups": len(groups), "units": sum(group.size for group in groups), "locked groups": len(locked)}
    row["lock reasons"] = "; ".join(dict.fromkeys(_short(group.locked or "") for group in locked))
    row["locked"] = "\n".join(f"{group.name} ({group.kind}, {group.size} units): {group.locked}" for group in locked)


def _short(reason: str) -> str:
    """Return a reason without its particulars: up to the first comma, colon or bracket."""
    for mark in (" (", ": ", ", ", "; "):
        reason = reason.split(mark)[0]
    return reason[:80]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return found or "no commit"
