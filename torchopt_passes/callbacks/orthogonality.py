"""Orthogonality: the filters of a layer are kept apart from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from torchopt_passes.callbacks.sharded import whole
from torchopt_passes.callbacks.weight_penalty import WeightPenalty
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.penalties import restricted_isometry, soft_orthogonality

__all__ = ["Orthogonality"]


@dataclass(kw_only=True, eq=False)
class Orthogonality(WeightPenalty):
    """Make it costly for the filters of a layer to repeat each other: less redundancy, better conditioned training.

    Each weight is a matrix with a row for each output. Where it has more rows than columns its columns are compared.

    Args:
        strength: factor of the penalty, > 0.
        measure: ``"soft"`` takes the distance of the Gram matrix from the identity, ``"srip"`` its spectral norm by
            power iteration, which punishes the worst direction alone.
        steps: power iterations of ``"srip"``.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        soft: strength * sum over weights of ||W W^T - I||_F^2; srip: strength * sum of sigma_max(W W^T - I).

    Source:
        Bansal et al. 2018, "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", equations 1
        (SO), 7 and 8 (SRIP).

    Example:
        ```python
        Trainer(model, args, train_dataset=data, callbacks=[top.Orthogonality(strength=1e-4)]).train()
        ```
    """

    measure: Literal["soft", "srip"] = "soft"
    steps: int = 2

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        if self.measure not in ("soft", "srip"):
            raise ConfigError(f'measure must be "soft" or "srip", not {self.measure!r}')
        if self.steps < 1:
            raise ConfigError(f"power iteration takes at least 1 step, not {self.steps}")

    def penalty(self) -> torch.Tensor:
        """Return the penalty of the weights as they are now."""
        pairs = zip(self._targets, self._wide(), strict=True)
        rows = [whole(weight).movedim(1 if target.input_dim == 0 else 0, 0).flatten(1) for target, weight in pairs]
        if self.measure == "soft":
            return self.strength * torch.stack([soft_orthogonality(matrix) for matrix in rows]).sum()
        return self.strength * torch.stack([restricted_isometry(matrix, self.steps) for matrix in rows]).sum()
