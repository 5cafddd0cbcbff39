"""Losses on the relations of tokens inside attention: MiniLM's."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from torchopt_passes.callbacks.distill.base import FeatureLoss, Rows
from torchopt_passes.callbacks.distill.taps import Tap, check_path, layer_names
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.relation_losses import relation_divergence, relation_log_probabilities, split_heads

__all__ = ["AttentionRelations", "ValueRelations"]

_NAMES = {
    "query": ("query", "q_proj", "q_lin", "q", "to_q"),
    "key": ("key", "k_proj", "k_lin", "k", "to_k"),
    "value": ("value", "v_proj", "v_lin", "v", "to_v"),
}


class _Relations(FeatureLoss):
    """A loss on an attention layer: `layers` name the modules that hold the projections.

    Args:
        heads: into how many heads both models' projections are split: their own number of heads if that is the same, or
            any number that divides both widths.
        causal: tokens look at earlier ones alone, as in decoders.
    """

    same_width: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ()

    heads: int
    causal: bool = False

    def check(self) -> None:
        """Refuse a number of heads that is none."""
        super().check()
        if self.heads < 1:
            raise ConfigError(f"{type(self).__name__}: heads must be at least 1, not {self.heads}")

    def taps(self, model: nn.Module, layer: str) -> tuple[Tap, ...]:
        """Return the outputs of the projections in an attention layer."""
        names = set(layer_names(model))
        found: list[Tap] = []
        for side in self.sides:
            here = [f"{layer}.{name}" for name in _NAMES[side] if f"{layer}.{name}" in names]
            if not here:
                check_path(model, layer, "model")
                inside = [name.removeprefix(f"{layer}.") for name in names if name.startswith(f"{layer}.")]
                raise ConfigError(
                    f"{type(self).__name__}: {layer!r} of {type(model).__name__} has no {side} projection named "
                    f"{' or '.join(_NAMES[side])}; it has {sorted(inside)}: name the module that holds them"
                )
            found.append(Tap(here[0]))
        return tuple(found)

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the divergence of each example."""
        valid = rows[0].valid
        student = self._relation([one.student for one in rows], valid)
        return relation_divergence(student, self._relation([one.teacher for one in rows], valid), valid)

    def _relation(self, features: list[torch.Tensor], valid: torch.Tensor | None) -> torch.Tensor:
        left, right = features[0], features[-1]
        if left.shape[-1] % self.heads:
            raise CallbackError(
                f"{type(self).__name__}: a projection of width {left.shape[-1]} has no {self.heads} heads"
            )
        width = left.shape[-1] // self.heads
        if right.shape[-1] % width or self.heads % (right.shape[-1] // width):
            raise CallbackError(
                f"{type(self).__name__}: queries of width {left.shape[-1]} in {self.heads} heads do not go with keys "
                f"of width {right.shape[-1]}"
            )
        groups = right.shape[-1] // width  # fewer than heads in grouped-query attention
        keys = split_heads(right, groups).repeat_interleave(self.heads // groups, dim=1)
        return relation_log_probabilities(split_heads(left, self.heads), keys, valid, causal=self.causal)


class AttentionRelations(_Relations):
    """Which tokens look at which: the attention distribution of a layer, the last one in the paper.

    It is made of what the projections of queries and keys return; rotary embeddings, which come later, are not in it.

    Args:
        layers: the modules that hold the projections, such as ``"bert.encoder.layer.{i}.attention.self"``.
        heads: into how many heads both models' projections are split: their own number of heads if that is the same, or
            any number that divides both widths.
        causal: tokens look at earlier ones alone, as in decoders.

    Math:
        1/(A |x|) sum over heads and tokens of KL(softmax(Q_t K_t^T / sqrt d_t) || softmax(Q_s K_s^T / sqrt d_s)).

    Source:
        Wang et al. 2020, "MiniLM", equations 6 and 7.
    """

    sides: ClassVar[tuple[str, ...]] = ("query", "key")


class ValueRelations(_Relations):
    """Which tokens have like values: needs neither equal widths nor a projector.

    Args:
        layers: see `AttentionRelations`.
        heads: see `AttentionRelations`.
        causal: see `AttentionRelations`.

    Math:
        1/(A |x|) sum over heads and tokens of KL(softmax(V_t V_t^T / sqrt d_t) || softmax(V_s V_s^T / sqrt d_s)).

    Source:
        Wang et al. 2020, "MiniLM", equations 8 and 9.
    """

    sides: ClassVar[tuple[str, ...]] = ("value",)
