"""A pipeline of passes is itself a pass."""

from __future__ import annotations

import copy
import time
from typing import Any

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import GraphPass, PassContext, PassResult
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.report import PassReport, Proof
from torchopt_passes.graph.snapshot import Snapshot

__all__ = ["Pipeline"]


class Pipeline(GraphPass):
    """Run passes in order, each on what the one before left; stop at the first that fails its proof.

    All or nothing: when a pass fails, the module is as it was before the pipeline.

    Args:
        passes: the passes, in order; pipelines nest.

    Example:
        >>> from torchopt_passes.graph.pruning import PruneWeights
        >>> Pipeline(PruneWeights(sparsity=0.5)).recipe()
        {'pipeline': {'passes': [{'prune_weights': {'sparsity': 0.5}}]}}
    """

    claim = "each pass proved its own rewrite"

    passes: tuple[Any, ...] = ()

    def __init__(self, *passes: GraphPass) -> None:
        for item in passes:
            if not isinstance(item, GraphPass):  # pyright: ignore[reportUnnecessaryIsInstance] (user input)
                raise ConfigError(f"a pipeline is made of passes, not of {item!r}")
        object.__setattr__(self, "passes", passes)

    def recipe(self) -> dict[str, Any]:
        """Return ``{"pipeline": {"passes": [...]}}``."""
        return {self.name: {"passes": [item.recipe() for item in self.passes]}}

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Decide by running on a copy: a later pass plans on what an earlier one leaves."""
        return self._run(copy.deepcopy(graph_module), context).plan

    def __call__(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> PassResult:
        """Run the passes in place; see `GraphPass.__call__`."""
        snapshot = Snapshot(graph_module)
        try:
            return self._run(graph_module, context)
        except BaseException:
            snapshot.restore()
            raise

    def _run(self, graph_module: fx.GraphModule, context: PassContext | None) -> PassResult:
        started = time.perf_counter()
        results = [item(graph_module, context) for item in self.passes]
        reports = tuple(result.report for result in results)
        proven = [r.proof for r in reports if r.proof.status == "proven"]
        changed = [r for r in reports if r.modified]
        proof = Proof(
            claim=self.claim,
            status="proven" if changed and all(r.proof.status == "proven" for r in changed) else "unproven",
            error=max((p.error for p in proven), default=0.0),
            tolerance=max((p.tolerance for p in proven), default=0.0),
            detail=f"{len(proven)} of {len(changed)} changing passes proven",
        )
        report = PassReport(
            name=self.name,
            options=self.recipe()[self.name],
            rows=tuple(row for r in reports for row in r.rows),
            modified=bool(changed),
            seconds=time.perf_counter() - started,
            proof=proof,
            children=reports,
        )
        plan = sum((result.plan for result in results), Plan())
        return PassResult(graph_module=graph_module, plan=plan, report=report)
