"""Channel groups: what can be removed from a captured model, as units that leave together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["ChannelGroup", "Constraints", "GroupAxis", "Kind", "Slice"]

Kind = Literal["channels", "heads", "head_dim", "blocks", "block_slices"]
"""What the units of a group are.

``"channels"``: channels of a convolution, features of a linear. ``"heads"``: attention heads (under GQA whole KV
groups: a KV head with its query heads). ``"head_dim"``: the same feature of every head. ``"blocks"``: equal blocks of
an axis that the model computes with separately (groups of a grouped convolution or a group norm). ``"block_slices"``:
the same place in every block.
"""


@dataclass(frozen=True)
class Slice:
    """Indices of one dimension of one parameter or buffer that leave together.

    Args:
        fqn: dotted name of the parameter or buffer.
        dim: the dimension.
        indices: ascending.
    """

    fqn: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class GroupAxis:
    """One dimension of one parameter or buffer that a group cuts.

    Args:
        fqn: dotted name of the parameter or buffer (the first one of a tied tensor).
        dim: the dimension.
        unit_of: int64, shape (size of the dimension,): the unit that each index leaves with; -1 where none does.
    """

    fqn: str
    dim: int
    unit_of: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a choice of units must keep.

    Args:
        min_units: units that must stay, at least.
        product_with: name of the other group that cuts the same axes, when the axes are blocks x slices: an index of
            such an axis leaves when its block or its slice does.
    """

    min_units: int = 1
    product_with: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelGroup:
    """Units of one kind, each of which can leave the model by itself.

    Args:
        name: of the group: fqn and dimension where it is made, such as ``"layer1.0.conv1.weight:0"``.
        kind: what its units are.
        axes: every dimension of every parameter and buffer that the units cut.
        size: number of units.
        locked: why none of them may leave, with node, op and the user's line; None when they may.
        constraints: what a choice must keep.

    Example:
        >>> group = ChannelGroup(
        ...     name="fc.weight:0", kind="channels", size=2, locked=None, constraints=Constraints(),
        ...     axes=(GroupAxis("fc.weight", 0, np.array([0, 1])), GroupAxis("head.weight", 1, np.array([0, 0, 1, 1]))),
        ... )
        >>> group.slices[1]
        (Slice(fqn='fc.weight', dim=0, indices=(1,)), Slice(fqn='head.weight', dim=1, indices=(2, 3)))
    """

    name: str
    kind: Kind
    axes: tuple[GroupAxis, ...]
    size: int
    locked: str | None
    constraints: Constraints

    @property
    def units(self) -> range:
        """The numbers of the units."""
        return range(self.size)

    @cached_property
    def slices(self) -> tuple[tuple[Slice, ...], ...]:
        """For each unit, what leaves with it."""
        return tuple(
            tuple(
                Slice(axis.fqn, axis.dim, tuple(int(i) for i in np.flatnonzero(axis.unit_of == unit)))
                for axis in self.axes
                if (axis.unit_of == unit).any()
            )
            for unit in self.units
        )
