"""WeightMasks: what callbacks have in common that mask single weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.masking import Masking
from torchopt_passes.callbacks.sharded import count_false, own_part, whole
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets, put_masks
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import zero_out
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.prune_weights import MaskWeights

__all__ = ["WeightMasks"]


@dataclass(kw_only=True, eq=False)
class WeightMasks(Masking):
    """A bool buffer ``<name>_mask`` beside each weight (True: kept); what it removes is zero after each step.

    A subclass chooses the masks, and may keep more beside each weight (`_state`). What is removed may come back where
    it is `_dense`: then the model computes with masked weights, as ever, and the optimizer trains the dense ones,
    which lie in a buffer ``<name>_dense`` meanwhile. A weight is the leaf that autograd sees, masked or not, so its
    gradient is that of the masked weight, for all of its entries: straight-through.

    Args:
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)
    _kinds: tuple[str, ...] = field(default=("mask",), init=False, repr=False)
    _begun: bool = field(default=False, init=False, repr=False)
    _whole: bool = field(default=False, init=False, repr=False)
    """Whether the optimizer has the dense weights now."""

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the weights under a mask."""
        return tuple(target.fqn for target in self._targets)

    @property
    def _dense(self) -> bool:
        """Whether what is removed keeps a value and may come back."""
        return False

    @property
    def _masks_gradients(self) -> bool:
        """Whether the optimizer sees no gradient of what is removed."""
        return False

    @property
    def acts_before_step(self) -> bool:
        """Whether anything is to be done before a step."""
        return self._dense or self._masks_gradients

    def _fits(self, target: Target) -> None:
        """Raise a ConfigError for a weight that cannot be masked: it is skipped with that reason."""

    def _state(self, target: Target) -> dict[str, torch.Tensor]:
        """Return what to keep beside a weight, by the ending of the buffer's name."""
        return {}

    def install(self, student: Student) -> None:
        """Choose the weights and put a mask that keeps everything beside each."""
        targets, skips = choose_targets(student.model, self.include, self.skip)
        kept: list[Target] = []
        for target in targets:
            try:
                self._fits(target)
            except ConfigError as error:
                skips = (*skips, Skip(target=target.fqn, reason=str(error)))
                continue
            kept.append(target)
        if not kept:
            raise ConfigError(f"{type(self).__name__} fits no weight: {skips[-1].target}: {skips[-1].reason}")
        states = {target: self._all_state(target) for target in kept}
        for target, state in states.items():
            for kind, value in state.items():
                target.refuse_taken(kind, value)
        put_masks(student, self, {target: torch.ones_like(target.weight, dtype=torch.bool) for target in kept})
        self._targets, self.skips = tuple(kept), skips
        for target, state in states.items():
            self._kinds = ("mask", *state)
            for kind, value in state.items():
                target.put_state(kind, value)

    def begin(self, progress: Progress) -> None:
        """Note the dense weights; a resumed run has them from the checkpoint."""
        self._begun = True
        if self._dense and progress.step == 0:
            for target in self._targets:
                target.state("dense").copy_(target.weight.detach())
        super().begin(progress)

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Give the optimizer the dense weights, and gradients of what it may change."""
        if self._dense:
            for target in self._targets:
                target.weight.copy_(target.state("dense"))
            self._whole = True
        self._observe(progress)
        for target in self._targets if self._masks_gradients else ():
            if target.weight.grad is not None:
                target.weight.grad.masked_fill_(~target.mask, 0)

    def _observe(self, progress: Progress) -> None:
        """Look at final gradients, and dense weights, before the step."""

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Take the dense weights back from the optimizer; what follows chooses masks and applies them."""
        self._keep_dense()
        super().after_step(progress)

    def metrics(self) -> dict[str, float]:
        """Return ``sparsity``: the share of the managed weights that is removed."""
        total = sum(target.weight.numel() for target in self._targets)
        return {"sparsity": self._removed() / total} if total else {}

    @torch.no_grad()
    def remove(self) -> None:
        """Take the masks away; the zeros stay."""
        if self._begun and self._targets:
            self._keep_dense()
            self._apply()
            self._ended()
            self.plan = Plan(tuple(self._edit(target) for target in self._targets), self.skips)
        for target in self._targets:
            for kind in self._kinds:
                target.drop_state(kind)
        self._targets, self._begun = (), False

    def _ended(self) -> None:
        """Training is over, and the masks are still there."""

    def _keep_dense(self) -> None:
        if self._whole:
            for target in self._targets:
                target.state("dense").copy_(target.weight)
        self._whole = False

    def _apply(self) -> None:
        """Set the masked weights to zero."""
        for target in self._targets:
            if self._dense:
                target.weight.copy_(target.state("dense"))
            zero_out(own_part(target.weight), own_part(target.mask))

    def _removed(self) -> int:
        """Return how many weights are masked."""
        return sum(count_false(target.mask) for target in self._targets)

    def _reason(self) -> str:
        """Return why weights are removed, for the plan."""
        return f"chosen by {type(self).__name__} while training"

    def _edit(self, target: Target) -> MaskWeights:
        removed = count_false(target.mask)
        numbers = {"removed": float(removed), "sparsity": removed / target.mask.numel()}
        return MaskWeights(target=target.fqn, reason=self._reason(), numbers=numbers, mask=whole(target.mask).clone())

    def _all_state(self, target: Target) -> dict[str, torch.Tensor]:
        dense = {"dense": target.weight.detach().clone()} if self._dense else {}
        return {**dense, **self._state(target)}
