"""Gates on the units of channel groups: numbers that what reads a unit is multiplied by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from torchopt_passes.callbacks.gates import Gates
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_callback import UnitCallback
from torchopt_passes.callbacks.unit_groups import UnitGroup
from torchopt_passes.callbacks.unit_removal import graph_of, inputs_of, rehearse_removal
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.pruning.activations import MatrixUse, matrix_uses
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["GatedUnits", "gate_weights", "readers_of"]


@dataclass(kw_only=True, eq=False)
class GatedUnits(Gates, UnitCallback):
    """Gates on units; those that are closed when training ends leave the model."""

    _uses: dict[UnitGroup, tuple[MatrixUse, ...]] = field(
        default_factory=dict[UnitGroup, tuple[MatrixUse, ...]], init=False, repr=False
    )

    def _gate_units(self, student: Student) -> None:
        """Find the groups and what reads them, and rehearse on a copy that closed units can leave.

        Raises:
            ConfigError: no group is left.
            CallbackError: the model without units computes something else than with their gates closed.
        """
        self._find_units(student)
        if self._graph is None:
            return
        self._uses, unread = readers_of(self._graph, self._units)
        claims = {fqn for unit_group in self._units for fqn in unit_group.claims}
        for fqn in sorted(claims):
            student.claim(fqn, self)
        self._units, self.skips = tuple(self._uses), (*self.skips, *unread)
        half = {g: torch.arange(g.group.size) < (g.group.size + 1) // 2 for g in self._units}
        model = student.model
        with student.aside():
            graph = graph_of(model, inputs_of(model, self.example_inputs))
            rehearse_removal(model, graph, half, inputs_of(model, self.example_inputs))

    def _multiplied(self, gates: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the weights that read the units, gated."""
        if self.student is None:
            return {}
        return gate_weights(self.student.model, dict(zip(self._units, gates, strict=True)))

    @torch.no_grad()
    def _fold_and_remove(
        self, gates: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer | None, why: str
    ) -> None:
        """Multiply the gates into the weights that read the units, and remove those that are closed."""
        if self.student is None:
            return
        for fqn, gated in self._multiplied(gates).items():
            get_tensor(self.student.model, fqn).copy_(gated)
        stays = {unit_group: gate != 0 for unit_group, gate in zip(self._units, gates, strict=True)}
        self._remove_units(stays, optimizer, why)

    @torch.no_grad()
    def _closed_ratio(self) -> float:
        """Return the share of units that an evaluation now would close."""
        gates = self.gates_at_test()
        return sum(int((gate == 0).sum()) for gate in gates) / sum(gate.numel() for gate in gates)

    def remove(self) -> None:
        """Let the groups and gates go."""
        super().remove()
        self._uses = {}


def readers_of(
    graph_module: fx.GraphModule, unit_groups: Sequence[UnitGroup]
) -> tuple[dict[UnitGroup, tuple[MatrixUse, ...]], tuple[Skip, ...]]:
    """Return the groups with the slices that read their units alone, and the operations that read.

    A convolution, linear or matrix product is linear in what it reads: a gate on the weights that read a unit is a gate
    on the unit itself, for all that comes after.

    Args:
        graph_module: the graph of the student.
        unit_groups: the groups.

    Returns:
        Group, its slices those of the readers -> their uses; and, with the reason, the groups that have none.

    Raises:
        ConfigError: no group is left.
    """
    uses = matrix_uses(graph_module, graph_module.graph)
    found: dict[UnitGroup, tuple[MatrixUse, ...]] = {}
    skips: list[Skip] = []
    for unit_group in unit_groups:
        reads = {(fqn, dim) for fqn, dim, _ in unit_group.slices} & {(use.fqn, use.in_dim) for use in uses}
        if reads:
            slices = tuple(entry for entry in unit_group.slices if entry[:2] in reads)
            found[replace(unit_group, slices=slices)] = tuple(u for u in uses if (u.fqn, u.in_dim) in reads)
        else:
            reason = "no convolution, linear or matrix product reads its units: there is no weight to gate them at"
            skips.append(Skip(target=unit_group.group.name, reason=reason))
    if not found:
        raise ConfigError(f"no channel group can be gated: {'; '.join(f'{s.target}: {s.reason}' for s in skips)}")
    return found, tuple(skips)


def gate_weights(model: nn.Module, gates: Mapping[UnitGroup, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that read the units, each multiplied by the gates of what it reads.

    Args:
        model: the student.
        gates: group -> (units,); gradients reach it.

    Returns:
        fqn -> tensor of the parameter's shape and dtype.
    """
    gated: dict[str, torch.Tensor] = {}
    for unit_group, gate in gates.items():
        for fqn, dim, units in unit_group.slices:
            weight = gated[fqn] if fqn in gated else get_tensor(model, fqn)
            padded = torch.cat([gate, gate.new_ones(1)]).to(weight.device)
            of_index = padded[units.to(weight.device)].to(weight.dtype)
            gated[fqn] = weight * of_index.view(-1, *[1] * (weight.ndim - 1 - dim))
    return gated
