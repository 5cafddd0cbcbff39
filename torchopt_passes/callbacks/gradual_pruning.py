"""GradualPruning: weights go to zero little by little while the rest learns to do without them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from torchopt_passes.callbacks.gradual import GradualMasks
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets, put_masks
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import (
    block_mask,
    global_magnitude_masks,
    keep_largest,
    magnitude_mask,
    n_m_mask,
    removed_count,
)
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.prune_weights import MaskWeights, parse_pattern

__all__ = ["GradualPruning"]


@dataclass(kw_only=True, eq=False)
class GradualPruning(GradualMasks):
    """Raise the share of zero weights from `initial_sparsity` to `sparsity` along a schedule, by smallest magnitude.

    Each weight gets a bool buffer ``<name>_mask`` beside it (True: kept), so that a checkpoint holds the masks and a
    resumed run goes on exactly. After each optimizer step the removed weights are set to zero again. At the
    end the buffers go and the zeros stay; the names of the weights never change.

    Args:
        sparsity: share of the weights that is zero from the last update on, 0 < sparsity < 1; for ``"N:M"`` patterns
            leave it out, it is 1 - N/M.
        start: first update, as a share of training (float) or completed steps (int).
        end: last update, likewise; what remains is for recovery.
        every: steps between updates; None spreads 100 updates.
        schedule: ``"cubic"``, ``"linear"``, ``"cosine"``, ``"constant"``, or a function from progress in [0,
            1] to the share of the way in [0, 1].
        initial_sparsity: share at the first update.
        scope: ``"tensor"`` reaches the share in each weight; ``"global"`` ranks all weights together.
        pattern: ``""`` for single weights; ``"N:M"``, reached gradually, the N largest of every M along the
            input dimension are never removed; ``"block RxC"`` for whole blocks.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 for t in {t0, t0 + dt, ..., t0 + n dt}, s_f afterwards.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Example:
        ```python
        pruning = top.GradualPruning(sparsity=0.8, start=0.1, end=0.7, skip=("classifier",))
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
        ```
    """

    sparsity: float | None = None
    initial_sparsity: float = 0.0
    scope: Literal["tensor", "global"] = "tensor"
    pattern: str = ""
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        self._kind, self._numbers = parse_pattern(self.pattern)
        if self._kind == "dim":
            raise ConfigError("whole slices are channels, which GradualChannelPruning masks and takes away")
        if self._kind == "n:m":
            share = 1.0 - self._numbers[0] / self._numbers[1]
            if self.sparsity not in (None, share):
                raise ConfigError(f"the sparsity of {self.pattern} is {share}, not {self.sparsity}: leave sparsity out")
            self.sparsity = share
        if self.sparsity is None or not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be in (0, 1), not {self.sparsity}")
        if not 0.0 <= self.initial_sparsity <= self.sparsity:
            raise ConfigError(f"initial_sparsity must be in [0, sparsity], not {self.initial_sparsity}")
        if self.scope not in ("tensor", "global"):
            raise ConfigError(f'scope must be "tensor" or "global", not {self.scope!r}')
        if self.pattern and self.scope == "global":
            raise ConfigError('a pattern works on each weight by itself: scope must be "tensor"')
        super().__post_init__()

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the weights under a mask."""
        return tuple(target.fqn for target in self._targets)

    def install(self, student: Student) -> None:
        """Choose the weights and put a mask that keeps everything beside each."""
        targets, skips = choose_targets(student.model, self.include, self.skip)
        kept: list[Target] = []
        for target in targets:
            try:
                self._mask(target, self._span[1])
            except ConfigError as error:
                skips = (*skips, Skip(target=target.fqn, reason=str(error)))
                continue
            kept.append(target)
        if not kept:
            raise ConfigError(f"pattern {self.pattern!r} fits no weight: {skips[-1].target}: {skips[-1].reason}")
        put_masks(student, self, {target: torch.ones_like(target.weight, dtype=torch.bool) for target in kept})
        self._targets, self.skips = tuple(kept), skips

    def metrics(self) -> dict[str, float]:
        """Return ``sparsity``: the share of the managed weights that is removed."""
        total = sum(target.weight.numel() for target in self._targets)
        return {"sparsity": self._removed() / total} if total else {}

    @torch.no_grad()
    def remove(self) -> None:
        """Take the masks away; the zeros stay."""
        if self._ramp is not None and self._targets:
            self._apply()
            self._tell_if_short()
            self.plan = Plan(tuple(map(_edit, self._targets)), self.skips)
        for target in self._targets:
            delattr(target.owner, target.mask_name)
        self._targets, self._ramp = (), None

    @property
    def _span(self) -> tuple[float, float]:
        """The sparsities at the first update and from the last one on."""
        return self.initial_sparsity, self.sparsity or 0.0

    def _choose(self, value: float) -> None:
        """Mask the smallest weights, so many that `value` is the sparsity."""
        if self.scope == "global":
            found = global_magnitude_masks({t.fqn: t.weight for t in self._targets}, value)
        else:
            found = {target.fqn: self._mask(target, value) for target in self._targets}
        for target in self._targets:
            target.mask.copy_(found[target.fqn])

    def _apply(self) -> None:
        """Set the masked weights to zero."""
        for target in self._targets:
            target.weight.masked_fill_(~target.mask, 0)

    def _removed(self) -> int:
        """Return how many weights are masked."""
        return sum(int((~target.mask).sum()) for target in self._targets)

    def _bounds(self, value: float) -> tuple[int, int]:
        """Return how many weights a sparsity removes, all weights together, by the rules of the masks: twice."""
        sizes = [target.weight.numel() for target in self._targets]
        if self.scope == "global":
            expected = removed_count(value, sum(sizes))
        else:
            block = self._numbers[0] * self._numbers[1] if self._kind == "block" else 1
            expected = sum(block * removed_count(value, size // block) for size in sizes)
        return expected, expected

    def _mask(self, target: Target, sparsity: float) -> torch.Tensor:
        weight = target.weight.detach()
        if self._kind == "block":
            return block_mask(weight, (self._numbers[0], self._numbers[1]), sparsity)
        if self._kind == "n:m":
            if target.input_dim is None:
                raise ConfigError("its uses do not agree on one input dimension for N:M")
            # Only what the pattern would remove may go, smallest first; at the final share that is the pattern.
            protected = n_m_mask(weight, *self._numbers, dim=target.input_dim)
            return keep_largest(weight.abs().masked_fill(protected, torch.inf), sparsity)
        return magnitude_mask(weight, sparsity)


def _edit(target: Target) -> MaskWeights:
    removed = int((~target.mask).sum())
    return MaskWeights(
        target=target.fqn,
        reason="chosen by magnitude while training",
        numbers={"removed": float(removed), "sparsity": removed / target.mask.numel()},
        mask=target.mask.clone(),
    )
