"""KeepZeros: what is pruned stays pruned while the rest is trained further."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets, put_masks
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.edit import Skip

__all__ = ["KeepZeros"]


@dataclass(kw_only=True, eq=False)
class KeepZeros(Callback):
    """Keep the weights that are zero when training begins at zero: for fine-tuning, or QAT, after pruning.

    Each weight gets a bool buffer ``<name>_mask`` beside it (True: trained), as `GradualPruning` has it, so that
    a resumed run keeps the zeros it began with. After each optimizer step they are set to zero again; at the end the
    buffers go.

    Args:
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        w <- m * w after each step, m = [w_0 != 0].

    Raises:
        ConfigError: no weight has a zero: nothing was pruned.

    Example:
        ```python
        top.PruneWeights(pattern="2:4")(graph)
        Trainer(graph, args, train_dataset=data, callbacks=[top.KeepZeros()]).train()
        ```
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """Parameters that are left alone, with the reason; filled when the callback is installed."""
    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)

    def install(self, student: Student) -> None:
        """Put a mask beside each weight."""
        targets, self.skips = choose_targets(student.model, self.include, self.skip)
        put_masks(student, self, {target: target.weight.detach() != 0 for target in targets})
        self._targets = targets

    def begin(self, progress: Progress) -> None:
        """Mask what is zero now; a resumed run has its masks from the checkpoint."""
        if progress.step == 0:
            for target in self._targets:
                target.mask.copy_(target.weight.detach() != 0)
        if all(bool(target.mask.all()) for target in self._targets):
            raise ConfigError(
                "KeepZeros: no weight has a zero to keep: prune the model first, and resume by loading its state_dict, "
                "masks included, after the callback is installed"
            )

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Zero what was zero."""
        for target in self._targets:
            target.weight.masked_fill_(~target.mask, 0)

    def metrics(self) -> dict[str, float]:
        """Return ``sparsity``: the share of zeros in the managed weights."""
        total = sum(target.weight.numel() for target in self._targets)
        kept_zero = sum(int((~target.mask).sum()) for target in self._targets)
        return {"sparsity": kept_zero / total} if total else {}

    def remove(self) -> None:
        """Take the masks away; the zeros stay."""
        for target in self._targets:
            delattr(target.owner, target.mask_name)
        self._targets = ()
