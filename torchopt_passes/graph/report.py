"""What a pass did: one row for each thing it considered, changed or not, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PassReport", "Proof", "ReportRow"]


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One thing a pass considered.

    Args:
        target: the user's name of it: a parameter's fqn, or a node of the graph.
        action: ``"changed"`` or ``"skipped"``.
        what: the kind of edit, such as ``"mask_weights"``; empty when skipped.
        reason: why, in words.
        numbers: the figures behind the decision, by name.
    """

    target: str
    action: Literal["changed", "skipped"]
    what: str
    reason: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result of comparing a rewritten module with what the pass promised.

    Args:
        claim: what was compared, in words.
        status: ``"proven"``, ``"failed"``, or ``"unproven"`` when there was nothing to run it on.
        error: largest relative error over all outputs, max|a-b| / max(1, max|b|); dimensionless.
        tolerance: the largest error that still proves the claim.
        detail: the dtype that was used, or why there is no proof, or the first node that differs.
    """

    claim: str
    status: Literal["proven", "failed", "unproven"]
    error: float = 0.0
    tolerance: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        figures = f", error {self.error:.1e} (allowed {self.tolerance:.0e})" if self.status != "unproven" else ""
        return f"{self.status}: {self.claim}{figures}{f' [{self.detail}]' if self.detail else ''}"


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """The report of one pass on one module, or of a pipeline (then `children` has one for each pass).

    Args:
        name: the pass's registered name.
        options: the pass's options, by name.
        rows: what it considered, in order.
        modified: whether the module differs from before, as seen by comparing it.
        seconds: wall-clock time of planning, applying and proving.
        proof: the result of the proof.
        children: the reports of a pipeline's passes.
    """

    name: str
    options: dict[str, Any]
    rows: tuple[ReportRow, ...]
    modified: bool
    seconds: float
    proof: Proof
    children: tuple[PassReport, ...] = ()

    @property
    def changed(self) -> tuple[ReportRow, ...]:
        """The rows of things that were changed."""
        return tuple(row for row in self.rows if row.action == "changed")

    @property
    def skipped(self) -> tuple[ReportRow, ...]:
        """The rows of things that were left as they were, each with its reason."""
        return tuple(row for row in self.rows if row.action == "skipped")

    def __str__(self) -> str:
        if self.children:
            return "\n".join([f"{self.name}: {self.seconds:.2f} s", *map(str, self.children)])
        head = f"{self.name}: {len(self.changed)} changed, {len(self.skipped)} skipped, {self.seconds:.2f} s"
        if not self.modified:
            head += "; nothing changed"
        rows = [f"  {row.action} {row.target}: {row.reason}" for row in self.rows]
        return "\n".join([head, f"  {self.proof}", *rows])
