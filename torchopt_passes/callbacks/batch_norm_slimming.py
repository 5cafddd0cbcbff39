"""BatchNormSlimming: the scales of batch norms show which channels a network can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.penalty import Form, Penalty, check_form, learning_rates
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_callback import UnitCallback
from torchopt_passes.callbacks.unit_groups import UnitGroup
from torchopt_passes.callbacks.unit_removal import graph_of, inputs_of
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.penalties import soft_threshold
from torchopt_passes.functional.units import unit_scores
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.batch_norm import batch_norms
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.choose import choose_by_ratio
from torchopt_passes.graph.pruning.prune_channels import PruneChannels
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.weights import parameter_behind

__all__ = ["BatchNormSlimming"]


@dataclass(kw_only=True, eq=False)
class BatchNormSlimming(Penalty, UnitCallback):
    """Make the scales of batch norms costly, and plan at the end which channels go: those with the smallest of all.

    The proximal form leaves scales exactly at zero, the gradient form is the paper's. Nothing is removed by itself: a
    channel with a small scale still passes something on, and one with a zero scale its shift, so outputs change when
    it leaves. `plan`, filled when training ends, says what goes; apply it, and train on.

    The student is a captured graph, or your own module (then `example_inputs` are needed). Groups without a batch norm
    are left alone and in `skips`.

    Args:
        strength: factor of the penalty, > 0.
        ratio: share of the units, of all groups together, that the plan removes, in (0, 1).
        form: ``"proximal"`` or ``"gradient"``.
        min_units: units of each group that stay, at least.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph.

    Math:
        p = strength * sum |gamma|; at the end a unit goes when its |gamma|, the largest where several norms scale it,
        is among the `ratio` smallest of all.

    Source:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3, equation 1.

    Raises:
        ConfigError: no group has a batch norm.

    Example:
        ```python
        slimming = top.BatchNormSlimming(strength=1e-4, ratio=0.5, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[slimming]).train()
        slimming.plan.apply(model)                                              # smaller; train on
        ```
    """

    ratio: float = 0.5
    form: Form = "proximal"
    min_units: int = 1

    threshold: float = field(default=0.0, init=False, repr=False)
    """The largest scale that the plan removes; set at the end."""
    _gammas: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        check_form(self.form)
        if not 0.0 < self.ratio < 1.0:
            raise ConfigError(f"ratio must be in (0, 1), not {self.ratio}")
        if self.min_units < 1:
            raise ConfigError(f"min_units must be at least 1, not {self.min_units}")

    def install(self, student: Student) -> None:
        """Find the groups and the batch norms that scale their units."""
        self._find_units(student)
        if self._graph is None:
            return
        first = aliases(self._graph)
        gammas = {first.get(parameter_behind(norm.gamma) or "") for norm in batch_norms(self._graph.graph)}
        kept: list[UnitGroup] = []
        for unit_group in self._units:
            scales = tuple(entry for entry in unit_group.slices if entry[0] in gammas)
            if scales:
                kept.append(replace(unit_group, slices=scales))
            else:
                skip = Skip(target=unit_group.group.name, reason="no batch norm scales its units")
                self.skips = (*self.skips, skip)
        if not kept:
            raise ConfigError(f"no channel group of {type(student.model).__name__} has a batch norm")
        self._units = tuple(kept)
        self._gammas = tuple(dict.fromkeys(fqn for unit_group in kept for fqn, _, _ in unit_group.slices))

    def penalty(self) -> torch.Tensor:
        """Return ``strength * sum |gamma|``."""
        gammas = self._penalized()
        return self.strength * torch.stack([g.abs().sum().to(gammas[0].device) for g in gammas]).sum()

    def before_step(self, progress: Progress) -> None:
        """Add the gradient, in the gradient form."""
        if self.form == "gradient":
            super().before_step(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Take the proximal step, in the proximal form; none where the optimizer took none."""
        if self.form == "proximal" and progress.stepped and self.student is not None:
            gammas = dict(zip(self._gammas, self._penalized(), strict=True))
            for fqn, rate in learning_rates(self.student.optimizer, gammas).items():
                gammas[fqn].copy_(soft_threshold(gammas[fqn], rate * self.strength))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return ``batch_norm_slimming``, and ``zero_scales``: the share of scales that are exactly zero."""
        found = super().metrics()
        if found:
            gammas = self._penalized()
            found["zero_scales"] = sum(int((g == 0).sum()) for g in gammas) / sum(g.numel() for g in gammas)
        return found

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Plan what goes."""
        if self.student is None or not self._units:
            return
        model = self.student.model
        scores = [self._scales(unit_group).cpu().numpy() for unit_group in self._units]
        candidates = [
            unit_group.candidate(scales, 1.0, min_units=self.min_units, round_to=1)
            for unit_group, scales in zip(self._units, scores, strict=True)
        ]
        chosen = choose_by_ratio(candidates, self.ratio, "global")
        keep = {name: tuple(int(u) for u in (~gone).nonzero()[0]) for name, gone in chosen.items() if gone.any()}
        self.plan = Plan(skips=self.skips)
        if not keep:
            return
        pairs = zip(self._units, scores, strict=True)
        self.threshold = max(float(s[chosen[g.group.name]].max(initial=0.0)) for g, s in pairs)
        inputs = inputs_of(model, self.example_inputs)
        with self.student.aside():
            plan = PruneChannels(keep=keep).plan(graph_of(model, inputs), PassContext(example_inputs=inputs))
        why = f"scale of at most {self.threshold:.3g}, among the {self.ratio:g} smallest of all"
        edits = tuple(replace(e, reason=e.reason.replace("not among the units to keep", why)) for e in plan.edits)
        self.plan = Plan(edits, (*self.skips, *plan.skips))

    def remove(self) -> None:
        """Let the groups go."""
        super().remove()
        self._gammas = ()

    def _scales(self, unit_group: UnitGroup) -> torch.Tensor:
        """Return the largest |gamma| of each unit, (units,), float64."""
        largest = torch.zeros(unit_group.group.size, dtype=torch.float64)
        for fqn, _, units in unit_group.slices if self.student is not None else ():
            gamma = get_tensor(self.student.model, fqn).abs().cpu()  # pyright: ignore[reportOptionalMemberAccess]
            inside = torch.where(units < unit_group.group.size, units, -1)
            largest = torch.fmax(largest, unit_scores(gamma, inside, unit_group.group.size, p=float("inf")))
        return largest

    def _penalized(self) -> Sequence[torch.Tensor]:
        return [get_tensor(self.student.model, fqn) for fqn in self._gammas] if self.student is not None else []
