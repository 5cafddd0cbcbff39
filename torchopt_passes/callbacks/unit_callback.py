"""UnitCallback: what callbacks that work on channel groups have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_groups import UnitGroup, choose_groups
from torchopt_passes.callbacks.unit_removal import graph_of, inputs_of, remove_units
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.tensors import check_patterns

__all__ = ["UnitCallback"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class UnitCallback(Callback):
    """Finds the channel groups of the student, and lets units leave it when training ends.

    The student is a captured graph, or the user's own module (then `example_inputs` are needed: it is captured to find
    its groups, and stays what is trained).

    Args:
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. A
            removal is proven on them.
    """

    skip: tuple[str, ...] = ()
    kinds: tuple[Literal["channels", "heads", "head_dim", "blocks", "block_slices"], ...] = (
        "channels",
        "heads",
        "blocks",
    )
    example_inputs: Any = None

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """What is left alone, with the reason; filled when the callback is installed."""
    plan: Plan = field(default=Plan(), init=False, repr=False)
    """What training chose to remove, as a plan that other copies of the model take; filled at the end."""
    _units: tuple[UnitGroup, ...] = field(default=(), init=False, repr=False)
    _graph: fx.GraphModule | None = field(default=None, init=False, repr=False)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that the callback works on."""
        return tuple(unit_group.group for unit_group in self._units)

    def _find_units(self, student: Student) -> None:
        """Find the groups that may lose units; call it in `install`.

        Raises:
            ConfigError: a pattern matches nothing, or no group is left.
        """
        model = student.model
        check_patterns(model, self.skip, "skip")
        with student.aside():
            graph = graph_of(model, inputs_of(model, self.example_inputs))
            self._units, self.skips = choose_groups(model, graph, kinds=self.kinds, overrides={}, skip=self.skip)
        self._graph = graph
        if graph is not model:
            graph.meta.pop("source")  # the callback keeps no model alive

    def _check_parameters(self) -> None:
        """Refuse a model whose parameters are others than when its groups were found; call it in `begin`."""
        if self._graph is not None and self.student is not None:
            now = dict(self.student.model.named_parameters())
            graph = {n: p for n, p in self._graph.named_parameters() if not n.startswith("torchopt_")}
            if any(now.get(name) is not parameter for name, parameter in graph.items()):
                raise CallbackError(
                    "the model has other parameters than when the callback was installed: install it last"
                )

    def begin(self, progress: Progress) -> None:
        """Training begins."""
        self._check_parameters()

    def _remove_units(
        self, stays: Mapping[UnitGroup, torch.Tensor], optimizer: torch.optim.Optimizer | None, why: str
    ) -> None:
        """Remove units that do nothing from the student, in place, and prove that nothing changed; sets `plan`.

        Args:
            stays: bool, (units,), True for a unit that stays; groups that lose none may be among them. One that would
                lose all keeps what it must, with a warning.
            optimizer: of the student.
            why: the reason in the plan.

        Raises:
            CallbackError: the model computes something else without the units; nothing is removed then.
        """
        for group, mask in stays.items():
            least = group.group.constraints.min_units
            if int(mask.sum()) < least:
                mask[:least] = True
                logger.warning(
                    "%s: no unit of %s is left; the first %d stay, at zero",
                    type(self).__name__,
                    group.group.name,
                    least,
                )
        masks = {group: mask for group, mask in stays.items() if not mask.all()}
        self.plan = Plan(skips=self.skips)
        if masks and self.student is not None:
            model = self.student.model
            inputs = inputs_of(model, self.example_inputs)
            with self.student.aside():
                plan = remove_units(model, graph_of(model, inputs), masks, inputs, optimizer=optimizer)
            edits = tuple(replace(e, reason=e.reason.replace("not among the units to keep", why)) for e in plan.edits)
            self.plan = Plan(edits, (*self.skips, *plan.skips))

    def remove(self) -> None:
        """Let the groups go."""
        self._units, self._graph = (), None
