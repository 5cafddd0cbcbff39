"""Losses on features: hints, cosine, attention transfer, flow between layers, relations between examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch

from torchopt_passes.callbacks.distill.base import FeatureLoss, Rows
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.feature_losses import (
    attention_transfer,
    cosine_distance,
    flow_distance,
    flow_matrix,
    hint_distance,
    mean_feature,
)
from torchopt_passes.functional.losses import weighted_mean
from torchopt_passes.functional.relation_losses import angle_distance, pair_distance

__all__ = ["FSP", "RKD", "AttentionTransfer", "Cosine", "Hint"]


class _Pooled(FeatureLoss):
    """A loss on vectors.

    Args:
        pool: ``"mean"`` to compare the mean over positions, ``"first"`` the first position (a class token); None to
            compare position by position.
    """

    pool: Literal["mean", "first"] | None = None

    def prepare(self, rows: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the vectors to compare."""
        if self.pool is None:
            return rows, valid
        return (mean_feature(rows, valid) if self.pool == "mean" else rows[:, :1]), None


class Hint(_Pooled):
    """The feature itself as target, for a teacher whose layers do at each depth what the student's shall do.

    Args:
        pool: see `Cosine`.
        normalized: divide by the teacher's mean square, so that layers of any scale weigh the same.

    Math:
        mean (r(s) - t)^2 with r the projector where widths differ, or that over mean t^2.

    Source:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3.
    """

    normalized: bool = False

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the mean squared error of each example."""
        (one,) = rows
        return hint_distance(one.student, one.teacher, one.valid, normalized=self.normalized)


class Cosine(_Pooled):
    """The direction of hidden states as target, their length left free. DistilBERT's, on the last layer.

    Args:
        pool: ``"mean"`` to compare the mean over positions, ``"first"`` the first position (a class token); None to
            compare position by position.

    Math:
        mean over positions of 1 - cos(r(s), t), with r the projector where widths differ.

    Source:
        Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 2.
    """

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the mean distance of each example."""
        (one,) = rows
        return cosine_distance(one.student, one.teacher, one.valid)


class AttentionTransfer(FeatureLoss):
    """Where a layer is active, whatever its width: needs no projector. For convolutional networks.

    Math:
        || Q_s / ||Q_s|| - Q_t / ||Q_t|| ||^2, Q = sum over channels of a^2; the larger map is averaged down to the
        other.

    Source:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2.
    """

    same_width: ClassVar[bool] = False

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the distance of each example."""
        (one,) = rows
        return attention_transfer(one.student, one.teacher, one.valid)


class FSP(FeatureLoss):
    """The flow from each named layer to the next: how features become features. For convolutional networks.

    Layers are compared two by two in the order given, and must have one number of positions in each model.

    Math:
        mean (G_s - G_t)^2 with G = F1^T F2 / P for layers F1 and F2 with P positions.

    Source:
        Yim et al. 2017, "A Gift from Knowledge Distillation", equations 1 and 2.
    """

    def term(self, pairs: Sequence[tuple[Rows, ...]], counts: torch.Tensor | None) -> torch.Tensor:
        """Return the mean over neighbouring layers of the examples' mean."""
        if len(pairs) < 2:
            raise ConfigError("FSP compares how one layer becomes the next: name at least 2 layers")
        values: list[torch.Tensor] = []
        for (first,), (last,) in pairwise(pairs):
            if first.student.shape[1] != last.student.shape[1]:
                raise ConfigError(
                    f"FSP: layers with {first.student.shape[1]} and {last.student.shape[1]} positions follow each "
                    "other: name layers of one resolution, and give each resolution an FSP of its own"
                )
            student = flow_matrix(first.student, last.student, first.valid)
            values.append(weighted_mean(flow_distance(student, flow_matrix(first.teacher, last.teacher)), counts))
        return torch.stack(values).mean()


class RKD(_Pooled):
    """How examples lie to each other: distances of pairs and angles of triplets; widths and scales are free.

    It compares the examples of a micro-batch with each other: the value depends on who shares one, so that gradient
    accumulation is not the same as one large batch. The angles take memory of batch^3.

    Args:
        pool: ``"mean"`` to compare the mean over positions, ``"first"`` the first position (a class token); None for
            all positions as one vector.
        distance: weight of the distances.
        angle: weight of the angles; twice that of the distances in the paper.

    Math:
        distance L_D + angle L_A, see `functional.relation_losses`.

    Source:
        Park et al. 2019, "Relational Knowledge Distillation", equations 5 to 9.
    """

    same_width: ClassVar[bool] = False
    same_positions: ClassVar[bool] = False

    distance: float = 1.0
    angle: float = 2.0

    def term(self, pairs: Sequence[tuple[Rows, ...]], counts: torch.Tensor | None) -> torch.Tensor:
        """Return the mean over layers of the batch's distance, over the examples with labels that count."""
        terms: list[torch.Tensor] = []
        for (one,) in pairs:
            student, teacher = one.student.flatten(1), one.teacher.flatten(1)
            if counts is not None:
                student, teacher = student[counts > 0], teacher[counts > 0]
            distance = self.distance * pair_distance(student, teacher) if self.distance else 0.0
            angle = self.angle * angle_distance(student, teacher) if self.angle else 0.0
            terms.append(torch.as_tensor(distance + angle))
        return torch.stack(terms).mean()
