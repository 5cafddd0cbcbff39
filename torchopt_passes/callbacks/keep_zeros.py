"""KeepZeros: what is pruned stays pruned while the rest is trained further."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import ConfigError

__all__ = ["KeepZeros"]


@dataclass(kw_only=True, eq=False)
class KeepZeros(WeightMasks):
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

    def begin(self, progress: Progress) -> None:
        """Mask what is zero now; a resumed run has its masks from the checkpoint."""
        if progress.step == 0:
            for target in self._targets:
                target.mask.copy_(target.weight.detach() != 0)
        if not self._removed():
            raise ConfigError(
                "KeepZeros: no weight has a zero to keep: prune the model first, and resume by loading its state_dict, "
                "masks included, after the callback is installed"
            )
        super().begin(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Zero what was zero."""
        super().after_step(progress)
        self._apply()

    def _reason(self) -> str:
        return "zero before training"
