"""DropFilter: in training, random filters of each layer are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.draws import seed_of, uniform
from torchopt_passes.graph.edit import Skip

__all__ = ["DropFilter"]


@dataclass(kw_only=True, eq=False)
class DropFilter(Callback):
    """Leave random filters (output channels, with their bias) out of each layer while training, and scale the others.

    The network learns not to rely on single filters, which makes it easier to prune, and regularizes it. Filters are
    drawn for each optimizer step, from the seed, the completed step and the name of the weight: the same in all
    micro-batches, on all ranks, and in a resumed run. In eval mode, and at the end, every filter is there.

    Args:
        rate: probability with which a filter is left out, in (0, 1).
        start: from when on, as a share of training (float), completed steps (int) or `Epochs`.
        end: until when, likewise.
        seed: of the draws.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone; the layer that makes the outputs should be among them.

    Math:
        W_i <- W_i m_i / (1 - rate), b_i likewise, m_i ~ Bernoulli(1 - rate) for each filter i.

    Source:
        Tian 2018, "DropFilter: Dropout for Convolutions", section 3; the scale is that of Srivastava et al. 2014,
        "Dropout" (inverted).

    Example:
        ```python
        Trainer(model, args, train_dataset=data, callbacks=[top.DropFilter(rate=0.1, skip=("classifier",))]).train()
        ```
    """

    rate: float = 0.1
    start: When = 0.0
    end: When = 1.0
    seed: int = 0
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """Parameters that are left alone, with the reason; filled when the callback is installed."""
    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)
    _window: tuple[int, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if not 0.0 < self.rate < 1.0:
            raise ConfigError(f"rate must be in (0, 1), not {self.rate}")
        check_when(self.start, "start")
        check_when(self.end, "end")

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the weights whose filters are left out."""
        return tuple(target.fqn for target in self._targets)

    def install(self, student: Student) -> None:
        """Choose the weights."""
        targets, self.skips = choose_targets(student.model, self.include, self.skip)
        known = [target for target in targets if target.input_dim in (0, 1)]
        lost = [Skip(target=t.fqn, reason="its uses do not agree on its filters") for t in targets if t not in known]
        self.skips = (*self.skips, *lost)
        if not known:
            raise ConfigError(f"no weight of {type(student.model).__name__} has filters: {lost[0].reason}")
        for target in known:
            student.claim(target.fqn, self)
        self._targets = tuple(known)

    def begin(self, progress: Progress) -> None:
        """Place the window on the steps of this run, and draw for the first step."""
        ends = (self.start, self.end) != (0.0, 1.0)  # all of training needs no length
        self._window = (progress.steps(self.start), progress.steps(self.end)) if ends else None
        self._step = progress.step

    def after_step(self, progress: Progress) -> None:
        """Draw for the next step."""
        self._step = progress.step
        if self.student is not None:
            self.student.lift()

    def stand_ins(self, training: bool) -> Mapping[str, torch.Tensor]:
        """Return the weights and biases without the filters that are left out."""
        outside = self._window is not None and not self._window[0] <= self._step < self._window[1]
        if not training or outside:
            return {}
        found: dict[str, torch.Tensor] = {}
        for target in self._targets:
            dim = 1 if target.input_dim == 0 else 0
            weight = target.weight
            kept = uniform((weight.shape[dim],), seed_of(self.seed, self._step, target.fqn), weight.device) >= self.rate
            scale = kept.to(weight.dtype) / (1.0 - self.rate)
            found[target.fqn] = weight * scale.view(-1, *[1] * (weight.ndim - 1 - dim))
            bias = target.owner._parameters.get("bias") if target.name == "weight" else None
            if bias is not None and bias.shape == scale.shape:
                found[target.fqn.removesuffix("weight") + "bias"] = bias * scale
        return found

    def metrics(self) -> dict[str, float]:
        """Return ``dropped_filters``: the share of filters that this step leaves out."""
        kept = total = 0
        for target in self._targets:
            size = target.weight.shape[1 if target.input_dim == 0 else 0]
            kept += int((uniform((size,), seed_of(self.seed, self._step, target.fqn)) >= self.rate).sum())
            total += size
        return {"dropped_filters": 1.0 - kept / total} if total else {}

    def remove(self) -> None:
        """Let the weights go."""
        self._targets, self._window = (), None
