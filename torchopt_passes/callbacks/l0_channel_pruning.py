"""L0ChannelPruning: the network learns which of its channels, heads and blocks it needs, and loses the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from torchopt_passes.callbacks.hard_concrete_gates import HardConcreteGates
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_gates import GatedUnits
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.axes import analyse_axes
from torchopt_passes.graph.grouping import group_axes
from torchopt_passes.graph.pruning.choose import CostModel, choose_by_budget, choose_by_ratio

__all__ = ["L0ChannelPruning"]


@dataclass(kw_only=True, eq=False)
class L0ChannelPruning(HardConcreteGates, GatedUnits):
    """Train a gate with each unit (channel, head, block); open gates are costly, and those that close leave at the end.

    The gate multiplies the weights that read the unit (the columns of the next layers), which is a gate on the unit
    itself. In training the forward computes with the noisy gates of the step, in evaluation with those without noise.
    When training ends, early too, the gates are multiplied into the weights and the units that closed leave the model
    in place, which is proven to change nothing. That it can be done is rehearsed on a copy when the callback is
    installed; after an error nothing leaves. With `sparsity` the units that are least likely to be open are closed as
    well if it takes more to reach the target, in each evaluation that of its step.

    The student is a captured graph, or your own module (then `example_inputs` are needed). Groups that a norm or a mean
    is computed over (the width of a transformer), and such as no weight reads, are left alone and in `skips`.

    Args:
        strength: factor of the expected number of gated weights that are open, > 0; or
        sparsity: the share that has left at the end, in (0, 1): exactly one of the two.
        of: with `sparsity`, the share of what: ``"units"`` under gates, ``"params"`` or ``"macs"`` of the whole model.
        start: with `sparsity`, when the target begins to rise from 0, as a share of training (float) or completed steps
            (int).
        end: when it is reached, likewise; what remains is for recovery.
        ascent: with `sparsity`, step size of the multipliers.
        closed: probability with which a gate's concrete variable is below 1/2 at first, in (0, 1). Up to 0.083 the
            gates are exactly open at first when there is no noise: the model begins as it came.
        beta: temperature of the gates, > 0.
        gamma: < 0, and
        zeta: > 1: the interval that the concrete distribution is stretched to.
        lr: learning rate of the gates; None for that of the model. Gates want a larger one than most models.
        seed: of the noise.
        settle: from when on the gates are held, without noise and penalty, as a share of training (float), completed
            steps (int) or `Epochs`: weights and batch-norm statistics adapt to what will remain. None for never.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. The
            removal is proven on them.

    Math:
        z and a as in `L0Pruning`; p = strength * sum_g |g| sigmoid(a_g - beta log(-gamma / zeta)), |g| the weights that
        read unit g; or the Lagrangian of `L0Pruning` with s = 1 - E[cost] / cost, the expected cost that with the size
        of each axis at its expected value.

    Source:
        Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", section 2.3 (groups); the
        Lagrangian and the cost: Wang et al. 2020, "Structured Pruning of Large Language Models", section 3.3, and Xia
        et al. 2022, "Structured Pruning Learns Compact and Accurate Models", section 3.1.

    Raises:
        ConfigError: the sparsity cannot be reached.
        CallbackError: at the end, when the model computes something else without the units; nothing is removed then.

    Example:
        ```python
        pruning = top.L0ChannelPruning(sparsity=0.5, of="macs", lr=0.05, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()   # the model is smaller now
        pruning.plan.apply(fresh)                                               # and so is another copy of it
        ```
    """

    module_name: ClassVar[str] = "l0_channels"

    of: Literal["units", "params", "macs"] = "params"

    _cost: CostModel | None = field(default=None, init=False, repr=False)
    _read: tuple[float, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        if self.of not in ("units", "params", "macs"):
            raise ConfigError(f'of must be "units", "params" or "macs", not {self.of!r}')

    def install(self, student: Student) -> None:
        """Find the groups, rehearse the removal on a copy, and bring the gates."""
        self._gate_units(student)
        sizes = [sum(student.model.get_parameter(f).numel() // len(u) for f, _, u in g.slices) for g in self._units]
        self._read = tuple(float(size) for size in sizes)
        if self.sparsity is not None:
            if self.of != "units" and self._graph is not None:
                self._cost = CostModel(group_axes(analyse_axes(self._graph, free_outputs=())), self.of)
            self._close([torch.zeros(g.group.size) for g in self._units], self.sparsity)  # refuses what is too much
        self._bring(student, self._make({g.group.name: torch.Size([g.group.size]) for g in self._units}))

    def begin(self, progress: Progress) -> None:
        """Place the target on the steps of this run."""
        self._check_parameters()
        super().begin(progress)

    def _noisy(self) -> Mapping[str, torch.Tensor]:
        pairs = zip(self._units, self._log_alphas, strict=True)
        return self._multiplied([self._draw(a, unit_group.group.name) for unit_group, a in pairs])

    def expected_sparsity(self) -> torch.Tensor:
        """Return the expected share of units, parameters or MACs that has left."""
        open_ = {g.group.name: self._open(a) for g, a in zip(self._units, self._log_alphas, strict=True)}
        if self._cost is None:
            return 1.0 - torch.cat(list(open_.values())).mean()
        return 1.0 - self._cost.expected(open_) / self._cost.full

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Multiply the gates into the weights, and remove the units that closed."""
        self._fold_and_remove(self.gates_at_test(), optimizer, "gate closed while training")

    def metrics(self) -> dict[str, float]:
        """Return ``channel_ratio`` of an evaluation now, ``expected_sparsity``, ``l0_penalty``, ``target_sparsity``."""
        found = super().metrics()
        return found | {"channel_ratio": self._closed_ratio()} if found else {}

    def remove(self) -> None:
        """Let the groups and gates go."""
        super().remove()
        self._cost, self._read = None, ()

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    def _expected_norm(self) -> torch.Tensor:
        terms = [size * self._open(a).sum() for size, a in zip(self._read, self._log_alphas, strict=True)]
        return torch.stack(terms).sum()

    def _make_gates_at_test(self) -> list[torch.Tensor]:
        log_alphas = [a.detach() for a in self._log_alphas]
        gates = [self._at_test(a) for a in log_alphas]
        if self.target > 0.0:
            gates = [g * ~c for g, c in zip(gates, self._close(log_alphas, self.target), strict=True)]
        return gates

    def _close(self, log_alphas: list[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
        """Return which units must be closed for a sparsity, those of the lowest log alpha."""
        candidates = [
            g.candidate(a.double().cpu().numpy(), 1.0, min_units=1, round_to=1)
            for g, a in zip(self._units, log_alphas, strict=True)
        ]
        if self._cost is None:
            chosen = choose_by_ratio(candidates, sparsity, "global")
        else:
            budget = int((1.0 - sparsity) * self._cost.full)
            chosen = choose_by_budget(candidates, budget, "global", self._cost.cost, self.of)
        pairs = zip(self._units, log_alphas, strict=True)
        return [torch.from_numpy(chosen[g.group.name]).to(a.device) for g, a in pairs]
