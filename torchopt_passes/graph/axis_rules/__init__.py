"""How each operation moves labels, by its name; `rule_of` finds the rule of a node."""

from __future__ import annotations

import torch
from torch import fx

from torchopt_passes.graph.axes import Rule, base_name
from torchopt_passes.graph.axis_rules.contractions import CONTRACTIONS
from torchopt_passes.graph.axis_rules.convolutions import CONVOLUTIONS
from torchopt_passes.graph.axis_rules.elementwise import ELEMENTWISE, elementwise
from torchopt_passes.graph.axis_rules.indexing import INDEXING
from torchopt_passes.graph.axis_rules.movement import MOVEMENT
from torchopt_passes.graph.axis_rules.recurrent import RECURRENT
from torchopt_passes.graph.axis_rules.reductions import REDUCTIONS

__all__ = ["rule_of"]

_RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVEMENT,
    **INDEXING,
    **REDUCTIONS,
    **CONTRACTIONS,
    **CONVOLUTIONS,
    **RECURRENT,
}


def rule_of(node: fx.Node) -> Rule | None:
    """Return the rule of an operation, or None where there is none.

    PyTorch says itself which operations are element by element (``torch.Tag.pointwise``).
    """
    rule = _RULES.get(base_name(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return elementwise
    return rule
