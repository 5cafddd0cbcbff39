"""The pass contract: a pass is its options; it plans without touching, applies in place, and proves the result."""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from torchopt_passes.errors import ConfigError, PassError, ProofError, TorchOptError
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.record import Record, snake_case
from torchopt_passes.graph.registry import register
from torchopt_passes.graph.report import PassReport, Proof, ReportRow
from torchopt_passes.graph.snapshot import Snapshot
from torchopt_passes.graph.tensors import check_patterns, matching_pattern
from torchopt_passes.graph.verify import Inputs, evaluate, first_difference, relative_error

__all__ = ["GraphPass", "PassContext", "PassResult", "on_copy"]


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """The live things of one run: what a recipe cannot hold.

    Args:
        example_inputs: ``(args, kwargs)`` to prove rewrites on; when None, the inputs the graph was captured with.
        calibration: batches for passes that look at data; each a tensor, a tuple of positional arguments or a dict
            of keyword arguments.
        skip: globs on fqns and module names that every pass leaves alone; one that matches nothing is an error.
        criteria: your own importance of channels, by the name that a pass's ``importance=`` gives; each a function
            ``(group, graph_module) -> tensor (group.size,)``.
        ranks: a process group, such as ``torch.distributed.group.WORLD``, whose ranks all run the pass, each with its
            part of the calibration data; ranges are then those of all of it, the same on every rank.
        scores: your own importance of single weights, fqn -> tensor of the weight's shape: `PruneWeights` removes the
            smallest ``|score|`` instead of the smallest ``|w|``.
        seed: of everything random in a pass.
        prove: compare before and after; switch it off for models too large to run here.
    """

    example_inputs: Inputs | None = None
    calibration: Iterable[Any] | None = None
    skip: tuple[str, ...] = ()
    criteria: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict[str, Callable[..., torch.Tensor]])
    ranks: Any = None
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    seed: int = 0
    prove: bool = True

    def skipped_by(self, fqn: str) -> str | None:
        """Return the skip pattern that covers `fqn`, or None."""
        return matching_pattern(fqn, self.skip)

    def inputs_for(self, graph_module: fx.GraphModule) -> Inputs | None:
        """Return the inputs to prove on: the context's, else those of the capture, else None."""
        if self.example_inputs is not None:
            return self.example_inputs
        return graph_module.meta.get("example_inputs")


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass returns; ``torch.fx``'s own PassManager accepts it.

    Args:
        graph_module: the module the pass was given, rewritten in place.
        plan: what was decided and applied.
        report: what was considered, changed, skipped, and the proof.
    """

    graph_module: fx.GraphModule
    plan: Plan
    report: PassReport

    @property
    def modified(self) -> bool:
        """Whether the module differs from before, seen by comparing, not declared."""
        return self.report.modified


class GraphPass(Record):
    """Base of all passes. A pass *is* its options; calling it rewrites a captured graph in place.

    A subclass is a frozen keyword-only dataclass by itself, is named by a verb phrase, registers itself under the
    snake_case of its name, and writes `plan`. It may refine the proof through `claim`, `tolerance`, `proof_dtype`,
    `reference_state`, `referring`, `expect` and `proving`.

    The order of one call: plan; apply the plan's edits; lint and recompile; run before and after on the same inputs
    and compare. Whatever goes wrong, the module is as it was before.

    Raises:
        ConfigError: a bad option, or a skip pattern that matches nothing.
        PassError: the pass failed.
        ProofError: the result is not what `claim` says; names the first node that differs.
    """

    name: ClassVar[str] = ""
    claim: ClassVar[str] = "outputs equal the outputs before"
    tolerance: ClassVar[float] = 1e-9
    proof_dtype: ClassVar[torch.dtype | None] = torch.float64

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.name = snake_case(cls.__name__)
        super().__init_subclass__(**kwargs)
        if not getattr(cls.plan, "__isabstractmethod__", False):
            register(cls)

    @abstractmethod
    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Decide what to change, and touch nothing."""

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return tensors by fqn with which the module *before* must give the outputs *after* (none: its own)."""
        del graph_module, plan
        return {}

    def referring(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Return the context in which the module *before* is run for the proof (fake-quant on, say)."""
        del graph_module
        return nullcontext()

    def expect(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        inputs: Inputs,
        *,
        dtype: torch.dtype | None,
        record: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run the module *before* as the plan says it must compute *after*; see `evaluate`."""
        state = {name: value.clone() for name, value in self.reference_state(graph_module, plan).items()}
        with self.referring(graph_module):
            return evaluate(graph_module, inputs, dtype=dtype, state=state, record=record)

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Return the context in which the module *after* is run for the proof (fake-quant off, say)."""
        del graph_module
        return nullcontext()

    def recipe(self) -> dict[str, Any]:
        """Return the pass as recipe data: ``{name: {option: value}}``, options at their default left out."""
        from dataclasses import fields

        defaults = {f.name: f.default for f in fields(self)}  # pyright: ignore[reportArgumentType]
        options = {k: v for k, v in self.to_dict().items() if not (k in defaults and v == defaults[k])}
        return {self.name: options}

    def __call__(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> PassResult:
        """Plan, apply, lint, recompile and prove, in place.

        Args:
            graph_module: a captured graph (see `capture`).
            context: data, example inputs, skip patterns, seed; the default has none.

        Returns:
            The same module with its plan and report.
        """
        context = context or PassContext()
        _check(self, graph_module, context)
        started = time.perf_counter()
        plan = self._decide(graph_module, context)
        snapshot = Snapshot(graph_module)
        try:
            proof = self._rewrite(graph_module, plan, context, snapshot)
        except BaseException as error:
            snapshot.restore()
            if isinstance(error, Exception) and not isinstance(error, PassError):
                raise PassError(f"{self.name}: {error}") from error
            raise
        changes = snapshot.changes()
        if changes and not plan:
            snapshot.restore()
            raise PassError(f"{self.name} changed {changes[:3]} though its plan is empty: rolled back")
        report = PassReport(
            name=self.name,
            options=self.to_dict(),
            rows=rows_of(plan),
            modified=bool(changes),
            seconds=time.perf_counter() - started,
            proof=proof,
        )
        return PassResult(graph_module=graph_module, plan=plan, report=report)

    def _decide(self, graph_module: fx.GraphModule, context: PassContext) -> Plan:
        try:
            plan = self.plan(graph_module, context)
        except TorchOptError:
            raise
        except Exception as error:
            raise PassError(f"{self.name}: planning failed: {error}") from error
        if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance] (users write passes)
            raise PassError(f"{self.name}: plan() must return a Plan, not {type(plan).__name__}")
        return plan if plan.passes else Plan(plan.edits, plan.skips, (self.recipe(),))

    def _rewrite(self, graph_module: fx.GraphModule, plan: Plan, context: PassContext, snapshot: Snapshot) -> Proof:
        inputs = context.inputs_for(graph_module)
        if not plan:
            return Proof(claim=self.claim, status="unproven", detail="nothing to change")
        if not context.prove or inputs is None:
            plan.apply(graph_module)
            why = "no example inputs" if context.prove else "switched off"
            return Proof(claim=self.claim, status="unproven", detail=why)
        dtype, tolerance = self._precision(graph_module)
        expected = self.expect(graph_module, plan, inputs, dtype=dtype)
        plan.apply(graph_module)
        with self.proving(graph_module):
            actual = evaluate(graph_module, inputs, dtype=dtype)
        error = relative_error(actual, expected)
        shown = str(dtype or "own dtype").removeprefix("torch.")
        if error <= tolerance:
            return Proof(claim=self.claim, status="proven", error=error, tolerance=tolerance, detail=shown)
        after: dict[str, Any] = {}
        with self.proving(graph_module):
            evaluate(graph_module, inputs, dtype=dtype, record=after)
        snapshot.restore()
        before: dict[str, Any] = {}
        self.expect(graph_module, plan, inputs, dtype=dtype, record=before)
        where = first_difference(before, after, graph_module.graph, tolerance)
        failed = Proof(claim=self.claim, status="failed", error=error, tolerance=tolerance, detail=where)
        raise ProofError(f"{self.name}: {failed}; rolled back")

    def _precision(self, graph_module: fx.GraphModule) -> tuple[torch.dtype | None, float]:
        """Return dtype and tolerance: submodules that are called (fake-quantizers) keep their own dtype."""
        called = any(node.op == "call_module" for node in graph_module.graph.nodes)
        if self.proof_dtype is torch.float64 and called:
            return None, max(self.tolerance, 1e-5)
        return self.proof_dtype, self.tolerance


def on_copy(pass_: GraphPass) -> Any:
    """Return the copying form of a pass: it rewrites a deep copy and leaves its input alone.

    Example: ``result = on_copy(PruneWeights(sparsity=0.5))(graph_module)``
    """

    def run(graph_module: fx.GraphModule, context: PassContext | None = None) -> PassResult:
        return pass_(copy.deepcopy(graph_module), context)

    return run


def rows_of(plan: Plan) -> tuple[ReportRow, ...]:
    """Return the report rows of a plan: edits, then skips."""
    changed = [
        ReportRow(target=e.target, action="changed", what=e.kind, reason=e.reason, numbers=e.numbers)
        for e in plan.edits
    ]
    skipped = [ReportRow(target=s.target, action="skipped", what="", reason=s.reason) for s in plan.skips]
    return (*changed, *skipped)


def _check(pass_: GraphPass, graph_module: Any, context: PassContext) -> None:
    if not isinstance(graph_module, fx.GraphModule):
        raise ConfigError(
            f"{pass_.name} rewrites a captured graph, not a {type(graph_module).__name__}: capture(model, ...) first"
        )
    check_patterns(graph_module, context.skip, "skip")
