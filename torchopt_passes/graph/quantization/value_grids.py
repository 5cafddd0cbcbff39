"""Which fake-quantizers of a graph are fitted to each value, and to what part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from torchopt_passes.graph.quantization.annotate import Place
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.quantization.value_quantizer import SCALED_FORMATS

__all__ = ["Rows", "ValueGrids"]

Granularity = Literal["", "tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Rows:
    """What has a scale of its own; granularity '' for a grid with a range of its own. `why`: not as it was asked."""

    granularity: Granularity = ""
    why: str = ""


@dataclass(frozen=True)
class ValueGrids:
    """The options of InsertFakeQuant that ask for such grids."""

    group_size: int
    activation_range: str
    weight_format: str
    activation_format: str
    per_channel: bool

    def choose(self, places: Iterable[Place], graph: fx.Graph) -> dict[str, Rows]:
        """Return the rows of each fake-quantizer; its places share them, so all of them must allow it."""
        nodes = {node.name: node for node in graph.nodes}
        found: dict[str, Rows] = {}
        for place in places:
            rows = self._weight(place, nodes) if place.weight else self._activation(place, nodes)
            before = found.setdefault(place.quantizer, rows)
            if before.granularity == "token" or (before.granularity == "group" and rows.granularity != "group"):
                found[place.quantizer] = rows
        return found

    def _weight(self, place: Place, nodes: Mapping[str, fx.Node]) -> Rows:
        if self.weight_format not in ("int", *SCALED_FORMATS):
            return Rows("tensor")
        otherwise: Granularity = ""
        if self.weight_format != "int":
            otherwise = "channel" if self.per_channel else "tensor"
        if not self.group_size or place.weight is None:
            return Rows(otherwise)
        shape = nodes[place.node].meta["val"].shape
        if len(shape) != 2:
            return Rows(otherwise, "no groups: the weight of a convolution")
        values = math.prod(shape) // int(shape[place.weight.channel_dim])
        if values % self.group_size:
            return Rows(otherwise, f"no groups: {self.group_size} does not divide its {values} values a channel")
        return Rows("group")

    def _activation(self, place: Place, nodes: Mapping[str, fx.Node]) -> Rows:
        if self.activation_range == "static":
            return Rows("tensor" if self.activation_format != "int" else "")
        if self.activation_range == "dynamic" or self.activation_format not in ("int", *SCALED_FORMATS):
            return Rows("tensor")
        value = nodes[place.node]
        for user in (nodes[name] for name in place.users):
            operands = KINDS.get(user.target)
            if operands is None:
                continue
            if operands.kind.startswith("conv"):
                return Rows("tensor", "no tokens: a convolution reads it")
            if operands.kind == "matmul" and user.args[operands.weight] is value:
                return Rows("tensor", "no tokens: it is the right side of a product, which sums over them")
        return Rows("token")
