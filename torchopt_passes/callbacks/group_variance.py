"""GroupVariance: a few units of each group get all the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.penalty import Penalty
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_blocks import UnitBlocks
from torchopt_passes.callbacks.unit_callback import UnitCallback
from torchopt_passes.functional.penalties import inverse_variance
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["GroupVariance"]


@dataclass(kw_only=True, eq=False)
class GroupVariance(Penalty, UnitCallback):
    """Make it costly for the units of a group to be alike in norm: a few get strong, and the others can be pruned.

    It removes nothing by itself: `PruneChannels` or `GradualChannelPruning` finds the weak units afterwards. Groups and
    units are those of `GroupLasso`; groups of one unit are left alone.

    Args:
        strength: factor of the penalty, > 0.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: which groups (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call, to find the groups of your own module with; by
            default those of the captured graph.

    Math:
        p(w) = strength * sum over groups of 1 / (var_g ||w_g||_2 + 1e-8), the variance over the units of the group.

    Source:
        Torfi et al. 2018, "Attention-Based Guided Structured Sparsity of Deep Neural Networks", section 2.2; as in
        Distiller's ``GroupVarianceRegularizer``, which takes the input channels of one layer.

    Example:
        ```python
        Trainer(graph, args, train_dataset=data, callbacks=[top.GroupVariance(strength=1e-3)]).train()
        top.PruneChannels(ratio=0.5)(graph)
        ```
    """

    _blocks: tuple[UnitBlocks, ...] = field(default=(), init=False, repr=False)

    def install(self, student: Student) -> None:
        """Find the groups."""
        self._find_units(student)
        self._blocks = tuple(UnitBlocks(unit_group) for unit_group in self._units)

    def penalty(self) -> torch.Tensor:
        """Return the penalty of the weights as they are now."""
        if self.student is None:
            return torch.zeros(())
        model = self.student.model
        terms = [inverse_variance(blocks.norms(model)) for blocks in self._blocks]
        return self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def remove(self) -> None:
        """Let the groups go."""
        super().remove()
        self._blocks = ()

    def _penalized(self) -> Sequence[torch.Tensor]:
        if self.student is None:
            return []
        return [get_tensor(self.student.model, fqn) for fqn in {f: None for b in self._blocks for f in b.fqns}]
