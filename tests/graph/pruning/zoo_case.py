"""What a case of the zoo is: a model, and the groups that must be found in it.

A group is written as ``channels(8, "blocks.0.weight:0", "blocks.2.weight:1*4")``: kind, number of units, some of the
(fqn : dimension) it cuts, and after ``*`` how many indices of it leave with each unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.graph.pruning.blocks import Block
from tests.graph.pruning.random_networks import (
    Classifier,
    Ids,
    Images,
    Network,
    RandomNetwork,
    Sequence,
    inputs_of,
    randomise,
)
from torchopt_passes.graph.channels import ChannelGroup

__all__ = [
    "Case",
    "Expected",
    "any_kind",
    "blocks",
    "case",
    "channels",
    "features",
    "find",
    "generated",
    "heads",
    "places",
]


@dataclass(frozen=True)
class Expected:
    """A group that must be there, unlocked.

    Args:
        kinds: it may be of one of these.
        size: number of units.
        cuts: some of its axes: fqn, dimension, and indices per unit (None: any number).
    """

    kinds: tuple[str, ...]
    size: int
    cuts: tuple[tuple[str, int, int | None], ...]

    @classmethod
    def of(cls, kinds: tuple[str, ...], size: int, cuts: tuple[str, ...]) -> Expected:
        read: list[tuple[str, int, int | None]] = []
        for text in cuts:
            fqn, _, rest = text.partition(":")
            dim, _, count = rest.partition("*")
            read.append((fqn, int(dim), int(count) if count else None))
        return cls(kinds, size, tuple(read))

    def __str__(self) -> str:
        cuts = ", ".join(f"{fqn}:{dim}" + (f"*{count}" if count else "") for fqn, dim, count in self.cuts)
        return f"{'|'.join(self.kinds)}({self.size}; {cuts})"

    def fits(self, group: ChannelGroup) -> bool:
        """Return whether a group is the expected one, whether or not it is locked."""
        if group.kind not in self.kinds or group.size != self.size:
            return False
        for fqn, dim, count in self.cuts:
            of_units = [[len(s.indices) for s in unit if (s.fqn, s.dim) == (fqn, dim)] for unit in group.slices]
            if not any(of_units) or (count is not None and any(sum(unit) != count for unit in of_units)):
                return False
        return True


def channels(size: int, *cuts: str) -> Expected:
    return Expected.of(("channels",), size, cuts)


def heads(size: int, *cuts: str) -> Expected:
    return Expected.of(("heads",), size, cuts)


def features(size: int, *cuts: str) -> Expected:
    return Expected.of(("head_dim",), size, cuts)


def blocks(size: int, *cuts: str) -> Expected:
    return Expected.of(("blocks",), size, cuts)


def places(size: int, *cuts: str) -> Expected:
    return Expected.of(("block_slices",), size, cuts)


def any_kind(size: int, *cuts: str) -> Expected:
    return Expected.of(("channels", "heads", "head_dim", "blocks", "block_slices"), size, cuts)


@dataclass(frozen=True)
class Case:
    """A model and what must be found in it.

    Args:
        make: the model.
        inputs: example inputs by batch size.
        expected: groups that must be found unlocked; none where locking is right too, as long as nothing is wrong.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    expected: tuple[Expected, ...] = field(default=())

    def build(self) -> nn.Module:
        return randomise(self.make())


def case(
    source: Images | Sequence | Ids, body: tuple[Block, ...], *expected: Expected, head: Classifier | None = None
) -> Case:
    """Make a case of a described network; its blocks are `blocks.0`, `blocks.1`, ..."""
    network = Network(source, body, head)
    return Case(lambda: RandomNetwork(network), lambda batch: inputs_of(network, batch), expected)


def generated(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Return what makes example inputs of normal numbers, by batch size."""
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),)


def find(groups: Iterable[ChannelGroup], expected: Expected) -> ChannelGroup:
    """Return the group that is expected; fails, and tells what there is, where it is missing or locked."""
    groups = list(groups)
    fitting = [group for group in groups if expected.fits(group)]
    unlocked = [group for group in fitting if group.locked is None]
    if not unlocked:
        there = "\n".join(f"  {g.kind}({g.size}) {g.name} {g.locked or ''}" for g in groups)
        locked = f" (locked: {fitting[0].locked})" if fitting else ""
        raise AssertionError(f"no {expected}{locked}; there are\n{there}")
    return unlocked[0]
