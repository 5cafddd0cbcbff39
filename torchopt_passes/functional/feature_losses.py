"""Distances between the features of a teacher and a student, one value for each example.

Features are ``(B, C, *positions)`` (convolutions) or ``(B, *positions, C)`` (tokens); here always with channels last,
``(B, P, C)``: see `positions_last`. `valid` tells which positions of an example count. Half precision is computed in
float32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

__all__ = [
    "attention_map",
    "attention_transfer",
    "cosine_distance",
    "flow_distance",
    "flow_matrix",
    "hint_distance",
    "mean_feature",
    "positions_last",
    "same_grid",
]


def positions_last(feature: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """Return a feature as (B, P, C) in float32 or wider: channels last, all positions in one dimension.

    Args:
        feature: (B, C), (B, T, C), (B, C, H, W), ...
        channel_dim: which dimension the channels are.

    Example:
        >>> positions_last(torch.zeros(2, 3, 4, 5), 1).shape, positions_last(torch.zeros(2, 3), -1).shape
        (torch.Size([2, 20, 3]), torch.Size([2, 1, 3]))
    """
    wide = feature.to(torch.promote_types(feature.dtype, torch.float32)).movedim(channel_dim, -1)
    return wide.reshape(wide.shape[0], -1, wide.shape[-1])


def same_grid(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two maps (B, C, H, W) on one grid: the larger one is averaged down to the other's height and width.

    Example:
        >>> a, b = same_grid(torch.zeros(1, 2, 8, 8), torch.zeros(1, 5, 4, 4))
        >>> a.shape, b.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 5, 4, 4]))
    """
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return _to_size(one, size), _to_size(other, size)


def mean_feature(feature: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean over the positions that count: (B, P, C) -> (B, 1, C).

    Args:
        feature: (B, P, C).
        valid: bool (B, P); None counts all.

    Example:
        >>> mean_feature(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist()
        [[[2.0]]]
    """
    return _over_positions(feature.movedim(-1, 0), valid).movedim(0, -1).unsqueeze(1)


def hint_distance(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None, *, normalized: bool = False
) -> torch.Tensor:
    """Return the mean squared error of a feature, for each example.

    Args:
        student: (B, P, C), behind the projector where there is one.
        teacher: (B, P, C).
        valid: bool (B, P); None counts all.
        normalized: divide by the teacher's mean square, so that layers of any scale weigh the same.

    Returns:
        (B,).

    Math:
        1/(P C) sum (s - t)^2, and normalized sum (s - t)^2 / sum t^2. The paper's 1/2 ||s - t||^2 is P C / 2 times the
        first.

    Source:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 1.0]]])
        >>> float(hint_distance(student, teacher)), float(hint_distance(student, teacher, normalized=True))
        (5.0, 1.0)
    """
    errors = _over_positions((student - teacher).square().mean(-1), valid)
    if not normalized:
        return errors
    scale = _over_positions(teacher.square().mean(-1), valid)
    return errors / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return one minus the cosine between the vectors of each position, meaned over them, for each example.

    Args:
        student: (B, P, C).
        teacher: (B, P, C).
        valid: bool (B, P); None counts all.

    Returns:
        (B,), in [0, 2].

    Source:
        Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 2 (L_cos on the last hidden state).

    Example:
        >>> float(cosine_distance(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])))
        1.0
    """
    return _over_positions(1.0 - torch.cosine_similarity(student, teacher, dim=-1), valid)


def attention_map(feature: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return where a layer is active, a vector of length 1 for each example.

    Args:
        feature: (B, P, C).
        valid: bool (B, P); positions that do not count are 0.

    Returns:
        (B, P).

    Math:
        Q / ||Q||_2 with Q_p = sum_c a_pc^2.

    Source:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", section 3.1 (F_sum^2) and equation 2.

    Example:
        >>> attention_map(torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]))
        tensor([[1., 0.]])
    """
    energy = feature.square().sum(-1)
    if valid is not None:
        energy = energy.masked_fill(~valid, 0.0)
    return normalize(energy, dim=-1)


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return how far two layers look at different positions, for each example; their widths may differ.

    Args:
        student: (B, P, C).
        teacher: (B, P, C').
        valid: bool (B, P); None counts all.

    Returns:
        (B,), in [0, 2].

    Math:
        || Q_s / ||Q_s||_2 - Q_t / ||Q_t||_2 ||_2^2 with Q as in `attention_map`. The paper's equation has the norm, its
        code the mean square: this is P times the latter.

    Source:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2.

    Example:
        >>> one, other = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])
        >>> float(attention_transfer(one, other))
        2.0
    """
    return (attention_map(student, valid) - attention_map(teacher, valid)).square().sum(-1)


def flow_matrix(first: torch.Tensor, last: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return the flow between two layers: the mean over positions of the products of their channels.

    Args:
        first: (B, P, C1).
        last: (B, P, C2).
        valid: bool (B, P); None counts all.

    Returns:
        (B, C1, C2).

    Math:
        G_ij = 1/P sum_p F1_pi F2_pj.

    Source:
        Yim et al. 2017, "A Gift from Knowledge Distillation", equation 1.

    Example:
        >>> flow_matrix(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0, 0.0], [2.0, 1.0]]])).tolist()
        [[[4.0, 1.5]]]
    """
    if valid is not None:
        first = first.masked_fill(~valid.unsqueeze(-1), 0.0)
    count = first.shape[1] if valid is None else valid.sum(-1).clamp(min=1).view(-1, 1, 1)
    return first.transpose(1, 2) @ last / count


def flow_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of two flow matrices, for each example.

    Args:
        student: (B, C1, C2).
        teacher: (B, C1, C2).

    Returns:
        (B,).

    Math:
        1/(C1 C2) ||G_s - G_t||_F^2. The paper sums: C1 C2 times as much.

    Source:
        Yim et al. 2017, "A Gift from Knowledge Distillation", equation 2.

    Example:
        >>> float(flow_distance(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]])))
        2.0
    """
    return (student - teacher).square().mean((1, 2))


def _over_positions(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over the last dimension of what counts, 0 where nothing does."""
    if valid is None:
        return values.mean(-1)
    return values.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)


def _to_size(feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return feature if feature.shape[2:] == size else adaptive_avg_pool2d(feature, size)
