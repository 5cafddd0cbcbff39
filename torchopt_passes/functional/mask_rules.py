"""Which weights a sparsity removes: a scope over several tensors and a pattern within each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.layer_sparsities import layer_sparsities
from torchopt_passes.functional.masks import keep_largest, keep_largest_of_all, removed_count
from torchopt_passes.functional.patterns import block_scores, keep_n_of_m, parse_pattern, spread_blocks

__all__ = ["SCOPES", "MaskRule"]

SCOPES = ("tensor", "global", "uniform", "erk")
"""How a sparsity is shared among tensors: the same for each, all ranked together, or as `layer_sparsities` has it."""


@dataclass(frozen=True)
class MaskRule:
    """Makes masks from scores: exactly so many of the lowest go.

    Args:
        scope: one of `SCOPES`.
        pattern: ``""``, ``"N:M"`` or ``"block RxC"``. Below the share of an N:M pattern only what the pattern would
            remove goes, the lowest first.

    Raises:
        ConfigError: no such scope or pattern, or N:M with a scope other than ``"tensor"``: its share is that of the
            pattern everywhere.

    Example:
        >>> rule = MaskRule("global")
        >>> rule.masks({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 0.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
        >>> rule.removed([(2,), (2,)], 0.5)
        2
    """

    scope: str = "tensor"
    pattern: str = ""

    def __post_init__(self) -> None:
        """Refuse what fits nothing."""
        if self.scope not in SCOPES:
            raise ConfigError(f"scope must be one of {list(SCOPES)}, not {self.scope!r}")
        if self.kind == "dim":
            raise ConfigError("whole slices are channels, which GradualChannelPruning masks and takes away")
        if self.kind == "n:m" and self.scope != "tensor":
            raise ConfigError(f'{self.pattern} has the same share in each weight: scope must be "tensor"')

    @property
    def kind(self) -> str:
        """``""``, ``"n:m"`` or ``"block"``."""
        return parse_pattern(self.pattern)[0]

    @property
    def share(self) -> float | None:
        """The sparsity that the pattern itself has: 1 - N/M; None for the others."""
        n, m = parse_pattern(self.pattern)[1] if self.kind == "n:m" else (0, 0)
        return 1.0 - n / m if m else None

    def masks(
        self, scores: Mapping[str, torch.Tensor], sparsity: float, input_dims: Mapping[str, int | None] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the mask of each tensor.

        Args:
            scores: name -> importance of each weight; of equal ones the first goes first.
            sparsity: share to remove, in [0, 1].
            input_dims: name -> the dimension that N:M groups lie along.

        Returns:
            name -> bool, True for what is kept.

        Raises:
            ConfigError: a tensor that the pattern does not fit.
        """
        if self.kind == "n:m":
            return {name: self._n_of_m(each, sparsity, (input_dims or {}).get(name)) for name, each in scores.items()}
        ranked = {name: self._ranked(each) for name, each in scores.items()}
        shapes = [each.shape for each in scores.values()]
        if self.scope == "global":
            kept = keep_largest_of_all(ranked, sparsity)
        else:
            shares = layer_sparsities(self.scope, shapes, sparsity)
            kept = {name: keep_largest(ranked[name], share) for name, share in zip(ranked, shares, strict=True)}
        if self.kind == "block":
            return {name: spread_blocks(kept[name], scores[name].shape, self._block) for name in scores}
        return kept

    def removed(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        """Return how many weights of tensors of these shapes `masks` removes."""
        unit = math.prod(self._block) if self.kind == "block" else 1
        counts = [math.prod(shape) // unit for shape in shapes]
        if self.scope == "global":
            return unit * removed_count(sparsity, sum(counts))
        shares = layer_sparsities(self.scope, shapes, sparsity)
        return unit * sum(removed_count(share, count) for share, count in zip(shares, counts, strict=True))

    @property
    def _block(self) -> tuple[int, int]:
        rows, columns = parse_pattern(self.pattern)[1]
        return rows, columns

    def _ranked(self, scores: torch.Tensor) -> torch.Tensor:
        return block_scores(scores, self._block) if self.kind == "block" else scores.detach()

    def _n_of_m(self, scores: torch.Tensor, sparsity: float, dim: int | None) -> torch.Tensor:
        if dim is None:
            raise ConfigError("its uses do not agree on one input dimension for N:M")
        n, m = parse_pattern(self.pattern)[1]
        # Only what the pattern would remove may go, lowest first; at the final share that is the pattern.
        protected = keep_n_of_m(scores, n, m, dim=dim)
        return keep_largest(scores.masked_fill(protected, torch.inf), sparsity)
