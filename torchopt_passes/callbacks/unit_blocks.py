"""The weights of each unit of a channel group as one block: its norm, its size, and its scale."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import nn

from torchopt_passes.callbacks.unit_groups import UnitGroup
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["UnitBlocks"]

_Slices = list[tuple[int, torch.Tensor]]


class UnitBlocks:
    """The blocks of a group: all that makes, scales or reads a unit is one block.

    A weight that is made by the units and read by them (the branch of a residual) lies in the block of its row and in
    that of its column; an entry counts once in a block.

    Args:
        unit_group: the group.
    """

    def __init__(self, unit_group: UnitGroup) -> None:
        self.unit_group = unit_group
        self._of: dict[str, _Slices] = {}
        for fqn, dim, units in unit_group.slices:
            self._of.setdefault(fqn, []).append((dim, units))

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the parameters that the blocks lie in."""
        return tuple(self._of)

    def norms(self, model: nn.Module) -> torch.Tensor:
        """Return ||w_g||_2 of each unit, (units,), in float32 at least; its gradient is 0 where the norm is."""
        squares = self._sum(model, torch.square)
        return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)

    def sizes(self, model: nn.Module) -> torch.Tensor:
        """Return the number of weights in each unit, (units,)."""
        with torch.no_grad():
            return self._sum(model, torch.ones_like)

    @torch.no_grad()
    def scale(self, model: nn.Module, factors: torch.Tensor) -> None:
        """Multiply each unit's weights by its factor, in place; an entry of two units by both.

        Args:
            model: the student.
            factors: (units,).
        """
        padded = torch.cat([factors, factors.new_ones(1)])
        for fqn, slices in self._of.items():
            weight = get_tensor(model, fqn)
            for dim, units in slices:
                of_index = padded[units.to(padded.device)].to(weight)
                weight.mul_(of_index.view(-1, *[1] * (weight.ndim - 1 - dim)))

    def _sum(self, model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the sum of a function of the weights over each unit's block."""
        size = self.unit_group.group.size
        total = torch.zeros(size + 1, device=get_tensor(model, self.fqns[0]).device)
        for fqn, slices in self._of.items():
            weight = get_tensor(model, fqn)
            values = function(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            slices = [(dim, units.to(weight.device)) for dim, units in slices]
            for dim, units in slices:
                along = values.sum([d for d in range(values.ndim) if d != dim]) if values.ndim > 1 else values
                total = total + along.new_zeros(size + 1).index_add(0, units, along).to(total.device)
            for one, other in combinations(slices, 2):
                total = total - self._twice(values, one, other, size).to(total.device)
        return total[:-1]

    @staticmethod
    def _twice(
        values: torch.Tensor, one: tuple[int, torch.Tensor], other: tuple[int, torch.Tensor], size: int
    ) -> torch.Tensor:
        """Return the sum over the entries whose row and column belong to the same unit."""
        (rows, row_units), (columns, column_units) = one, other
        rest = [d for d in range(values.ndim) if d not in (rows, columns)]
        matrix = values.sum(rest) if rest else values
        matrix = matrix if rows < columns else matrix.T
        shared = (row_units[:, None] == column_units[None, :]) & (row_units[:, None] < size)
        along = (matrix * shared).sum(1)
        return along.new_zeros(size + 1).index_add(0, row_units, along)
