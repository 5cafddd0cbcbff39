"""GradualChannelPruning: channels, heads and blocks fade out while the rest learns to do without, and then leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from torchopt_passes.callbacks.gradual import GradualMasks
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import put_masks
from torchopt_passes.callbacks.unit_groups import UnitGroup, choose_groups, count_bounds
from torchopt_passes.callbacks.unit_removal import graph_of, inputs_of, rehearse_removal, remove_units
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.choose import Candidate, choose_by_ratio
from torchopt_passes.graph.pruning.scores import Importance, parse_importance, score_groups
from torchopt_passes.graph.tensors import check_patterns

__all__ = ["GradualChannelPruning"]

_REFUSED = {
    **dict.fromkeys(
        ("apoz", "mean_activation", "wanda", "hsic"),
        "looks at activations on calibration data, which a callback does not see: PruneChannels takes it, on the "
        "captured graph, in rounds (steps=) between which you train",
    ),
    "fisher": "needs gradients of single samples, and those of a step are means over its batch: 'taylor' takes them",
}


@dataclass(kw_only=True, eq=False)
class GradualChannelPruning(GradualMasks):
    """Mask the least important units (channels, heads, blocks) along a schedule, and remove them when training ends.

    The student is a captured graph, or your own module (then `example_inputs` are needed: it is captured to find its
    groups, and stays what is trained). Each group has a bool buffer ``<name>_<dim>_mask``, shape (units,), True for a
    unit that is kept, beside the parameter it is named after, so that a checkpoint resumes exactly. After each
    optimizer step every slice of a masked unit is set to zero, of the weights that make it and of those that read it; a
    masked unit stays masked. When training ends, early too, the masked units leave the model in place and the buffers
    go; after an error nothing leaves. The end is rehearsed on a copy when the callback is installed.

    A group that a norm or a mean is computed over (the width of a transformer) is left alone and in `skips`, as masked
    units would count in it until they leave; named in `overrides` it is pruned too, and outputs jump at the end.

    The optimizer of `attach` and of the Trainer is made to fit; of a captured graph the parameters that shrink are new
    objects. A checkpoint of the masked model does not load into the smaller one.

    Args:
        ratio: share of the units that is masked from the last update on, 0 <= ratio < 1; of each group or of all
            (`scope`).
        start: first update, as a share of training (float), completed steps (int) or `Epochs`.
        end: last update, likewise; what remains is for recovery.
        every: steps between updates, or `Epochs`; None spreads 100 updates.
        schedule: a name that `named_shape` knows, or a function from progress in [0, 1] to the share of the way in
            [0, 1].
        importance: what ranks the units: ``"l1"``, ``"l2"``, ``"lp:P"``, ``"bn_scale"``, ``"fpgm"``, ``"lamp"``,
            ``"random"``; ``"taylor"``, from the gradients of the step (updates from step 1 on); or a function of a
            group and the graph. See `PruneChannels`.
        scope: ``"group"`` ranks the units of each group, ``"global"`` all together.
        min_units: units of each group that stay, at least.
        round_to: the channels that stay in a group are a multiple of it, where the group has as many.
        overrides: glob on group or parameter names -> ratio of those groups.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. The
            removal is proven on them.

    Math:
        Of n units floor(r_t n + 1/2) are masked after step t, within `min_units` and `round_to`; r_t = r f(p_t) with
        p_t from 0 at the first update to 1 at the last, f(p) = 1 - (1 - p)^3 for ``"cubic"``. At the end
        y(x; W without the units) = y(x; W with them zero).

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1 (the schedule); groups and importance as in
        `PruneChannels`.

    Raises:
        CallbackError: at the end, when the model computes something else without the units; nothing is removed then.

    Example:
        ```python
        pruning = top.GradualChannelPruning(ratio=0.5, start=0.1, end=0.7, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()   # the model is smaller now
        pruning.plan.apply(fresh)                                               # and so is another copy of it
        ```
    """

    counted: ClassVar[str] = "units"

    ratio: float = 0.5
    importance: Importance = "l2"
    scope: Literal["group", "global"] = "group"
    min_units: int = 1
    round_to: int = 1
    overrides: dict[str, float] = field(default_factory=dict[str, float])
    skip: tuple[str, ...] = ()
    kinds: tuple[Literal["channels", "heads", "head_dim", "blocks", "block_slices"], ...] = (
        "channels",
        "heads",
        "blocks",
    )
    example_inputs: Any = None

    _groups: tuple[UnitGroup, ...] = field(default=(), init=False, repr=False)
    _graph: fx.GraphModule | None = field(default=None, init=False, repr=False)
    _overflowed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        for name, ratio in {"ratio": self.ratio, **self.overrides}.items():
            if not 0.0 <= ratio < 1.0:
                raise ConfigError(f"the ratio of {name!r} must be in [0, 1), not {ratio}")
        if not any((self.ratio, *self.overrides.values())):
            raise ConfigError("ratio is 0, and no override has more: nothing would be pruned")
        if self.scope not in ("group", "global"):
            raise ConfigError(f'scope must be "group" or "global", not {self.scope!r}')
        for name in ("min_units", "round_to"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        self._criterion, _ = parse_importance(self.importance)
        if self._criterion in _REFUSED:
            raise ConfigError(f"importance {self.importance!r} {_REFUSED[self._criterion]}")
        super().__post_init__()

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups under a mask."""
        return tuple(unit_group.group for unit_group in self._groups)

    def install(self, student: Student) -> None:
        """Find the groups, rehearse the removal on a copy, and put masks that keep everything."""
        model = student.model
        check_patterns(model, self.skip, "skip")
        inputs = inputs_of(model, self.example_inputs)
        with student.aside():
            graph = graph_of(model, inputs)
            groups, self.skips = choose_groups(model, graph, kinds=self.kinds, overrides=self.overrides, skip=self.skip)
            rehearse_removal(model, graph, self._at_the_end(groups), inputs)
        device = next(model.parameters()).device
        put_masks(student, self, {g: torch.ones(g.group.size, dtype=torch.bool, device=device) for g in groups})
        self._groups = groups
        if graph is not model:
            graph.meta.pop("source")  # the callback keeps no model alive
            self._graph = graph

    def begin(self, progress: Progress) -> None:
        """Place the schedule on the steps of this run."""
        if self._criterion == "taylor" and progress.steps(self.start) == 0:
            raise CallbackError("importance 'taylor' needs the gradients of a step: give start=1 or later")
        if self._graph is not None and self.student is not None:
            now = dict(self.student.model.named_parameters())
            if any(now.get(name) is not parameter for name, parameter in self._graph.named_parameters()):
                raise CallbackError(
                    "the model has other parameters than when the callback was installed: install it last"
                )
        super().begin(progress)

    def after_step(self, progress: Progress) -> None:
        """Mask more if it is time, and zero what is masked so far."""
        self._overflowed = not progress.stepped
        super().after_step(progress)

    def metrics(self) -> dict[str, float]:
        """Return ``channel_ratio``: the share of the managed units that is masked."""
        total = sum(g.group.size for g in self._groups)
        return {"channel_ratio": self._removed() / total} if total else {}

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove the masked units, from the model and from the optimizer's state, and prove that nothing changed."""
        if self._ramp is None or not self._groups or self.student is None:
            return
        with torch.no_grad():
            self._apply()
        self._tell_if_short(self._bounds(1.0)[0])
        masks = {g: g.mask for g in self._groups if not g.mask.all()}
        self.plan = Plan(skips=self.skips)
        if masks:
            model = self.student.model
            inputs = inputs_of(model, self.example_inputs)
            with self.student.aside():
                plan = remove_units(model, graph_of(model, inputs), masks, inputs, optimizer=optimizer)
            why = f"lowest {self._named} while training"
            edits = tuple(replace(e, reason=e.reason.replace("not among the units to keep", why)) for e in plan.edits)
            self.plan = Plan(edits, (*self.skips, *plan.skips))

    def remove(self) -> None:
        """Take the masks away."""
        for unit_group in self._groups:
            if unit_group.mask_name in unit_group.owner._buffers:
                delattr(unit_group.owner, unit_group.mask_name)
        self._groups, self._ramp, self._graph = (), None, None

    @property
    def _named(self) -> str:
        return self.importance if isinstance(self.importance, str) else "importance of a function"

    @property
    def _span(self) -> tuple[float, float]:
        """The share of the way to every ratio."""
        return 0.0, 1.0

    @property
    def _shares(self) -> tuple[float, float]:
        return 0.0, self.ratio

    def _choose(self, value: float) -> None:
        if self.student is None:
            return
        graph = self._graph or self.student.model
        if not isinstance(graph, fx.GraphModule):
            raise CallbackError(f"{type(self).__name__} is not installed")
        # the gradients of a step that a scaler skipped are infinite
        infinite = self._overflowed and self._criterion == "taylor"
        scores = score_groups(graph, self.groups, "l2" if infinite else self.importance)
        reasons = {g.name: "its gradients overflowed" for g in self.groups} if infinite else scores.fallbacks
        for name, reason in reasons.items():
            skip = Skip(target=name, reason=f"{self._named} finds nothing: {reason}; ranked by l2")
            self.skips = self.skips if skip in self.skips else (*self.skips, skip)
        # what is masked ranks below all else, so that it stays masked
        ranked = [scores.values[g.group.name].masked_fill(~g.mask.cpu(), -torch.inf).numpy() for g in self._groups]
        candidates = [self._candidate(g, r, value) for g, r in zip(self._groups, ranked, strict=True)]
        chosen = choose_by_ratio(candidates, self.ratio * value, self.scope)
        for g in self._groups:
            g.mask.logical_and_(torch.from_numpy(~chosen[g.group.name]).to(g.mask.device))

    def _apply(self) -> None:
        if self.student is not None:
            for unit_group in self._groups:
                unit_group.zero(self.student.model, unit_group.mask)

    def _removed(self) -> int:
        return sum(int((~g.mask).sum()) for g in self._groups)

    def _bounds(self, value: float) -> tuple[int, int]:
        candidates = [self._candidate(g, np.zeros(g.group.size), value) for g in self._groups]
        least, most = count_bounds(candidates, self.ratio * value, self.scope)
        if callable(self.schedule) and value < 1.0:
            most = max(most, self._bounds(1.0)[1])  # it may come back; what is masked does not
        return least, most

    def _candidate(self, unit_group: UnitGroup, scores: npt.NDArray[np.float64], value: float) -> Candidate:
        return unit_group.candidate(scores, value, min_units=self.min_units, round_to=self.round_to)

    def _at_the_end(self, groups: Sequence[UnitGroup]) -> dict[UnitGroup, torch.Tensor]:
        """Return masks, of any units, with which the removal can be rehearsed."""
        candidates = [self._candidate(g, np.arange(g.group.size, dtype=np.float64), 1.0) for g in groups]
        chosen = choose_by_ratio(candidates, self.ratio, "group")
        masks = {g: torch.from_numpy(~chosen[g.group.name]) for g in groups if chosen[g.group.name].any()}
        if not masks:
            sizes = {g.group.name: g.group.size for g in groups}
            raise ConfigError(f"ratio, min_units and round_to leave no unit to remove; the groups have {sizes}")
        return masks
