"""What a removal means for the module that the graph was captured from, found by trial while the plan is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.grouping import Grouping
from torchopt_passes.graph.pruning.attributes import find_attributes
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices
from torchopt_passes.graph.removal_proof import evaluate_masked
from torchopt_passes.graph.surgery import Removal, removed_atoms

__all__ = ["OnlyGraph", "source_edits"]


class OnlyGraph(Edit):
    """Say that a plan fits the captured graph alone: the source module's own code cannot follow the removal."""

    on_source = False
    writes_values = False

    def apply(self, module: nn.Module) -> None:
        """Change nothing: the graph is what the plan was made for."""


def source_edits(
    graph_module: fx.GraphModule,
    grouping: Grouping,
    edits: Sequence[RemoveIndices],
    context: PassContext,
) -> tuple[tuple[Edit, ...], tuple[Skip, ...]]:
    """Return what the source module needs besides smaller tensors, or why it cannot take the plan.

    Args:
        graph_module: the captured graph, before the removal.
        grouping: its groups.
        edits: what is removed.
        context: where its inputs are, and whether to prove.

    Returns:
        `ResizeAttribute` edits, or one `OnlyGraph`; and what was not tried.
    """
    source: nn.Module | None = graph_module.meta.get("source")
    inputs = context.inputs_for(graph_module)
    if source is None or inputs is None or not context.prove:
        why = "the graph has none" if source is None else "nothing is proven in this run"
        return (), (Skip(target="source module", reason=f"its attributes were not looked at: {why}"),)
    theirs = dict(source.named_parameters())
    if any(theirs.get(name) is not parameter for name, parameter in graph_module.named_parameters()):
        reason = "the graph was rewritten since it was captured: its source is another model now"
        return (OnlyGraph(target="source module", reason=f"{reason}; capture the source again"),), ()
    removal = {(edit.target, edit.dim): edit.indices for edit in edits}
    expected = evaluate_masked(grouping.axes, removed_atoms(grouping.axes, removal), inputs)
    try:
        found = find_attributes(source, edits, inputs, expected, counts=_counts(grouping, removal))
    except PlanError as error:
        return (OnlyGraph(target="source module", reason=f"{error}{_dead(graph_module, theirs)}"),), ()
    return tuple(found), ()


def _dead(graph_module: fx.GraphModule, parameters: Mapping[str, nn.Parameter]) -> str:
    """Name the parameters that the source runs and the graph does not, since no output depends on them."""
    live = {*graph_module.graph.find_nodes(op="output")}
    for node in reversed(graph_module.graph.nodes):
        live |= set(node.all_input_nodes) if node in live else set()
    read = {id(parameters.get(str(node.target))) for node in live}
    dead = [name for name, parameter in parameters.items() if id(parameter) not in read]
    more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
    return f". No output depends on {', '.join(dead[:3])}{more}: take that code out of the source" if dead else ""


def _counts(grouping: Grouping, removal: Removal) -> Mapping[str, Mapping[int, int]]:
    """Return, for each tensor that loses heads or blocks, their number before -> after."""
    counts: dict[str, dict[int, int]] = {}
    for group in grouping.groups:
        for axis in group.axes if group.kind in ("heads", "blocks") and group.locked is None else ():
            gone = np.unique(axis.unit_of[list(removal.get((axis.fqn, axis.dim), ()))])
            left = group.size - int((gone >= 0).sum())
            if left < group.size:
                counts.setdefault(axis.fqn, {})[group.size] = left
    return counts
