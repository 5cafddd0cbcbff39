"""Distances between relations: of the examples of a batch to each other, of the tokens of an example to each other.

Half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import huber_loss, normalize

__all__ = ["angle_distance", "pair_distance", "relation_divergence", "relation_log_probabilities", "split_heads"]


def pair_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return how far the distances between examples are apart; the scales of the two spaces are free.

    Args:
        student: embeddings (N, D).
        teacher: (N, D').

    Returns:
        Scalar; 0 for fewer than 2 examples.

    Math:
        mean over pairs i < j of h(psi_s(i, j), psi_t(i, j)), psi(i, j) = ||x_i - x_j|| / mu with mu the mean distance
        of the batch's pairs, h the Huber loss with delta 1.

    Source:
        Park et al. 2019, "Relational Knowledge Distillation", equations 5 to 7.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(float(pair_distance(5.0 * x, x)), 6)
        0.0
    """
    if len(student) < 2:
        return student.float().sum() * 0.0
    return huber_loss(_distances(student), _distances(teacher))


def angle_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return how far the angles between triplets of examples are apart.

    Args:
        student: embeddings (N, D). N^3 angles are computed: N is a micro-batch.
        teacher: (N, D').

    Returns:
        Scalar; 0 for fewer than 3 examples.

    Math:
        mean over distinct i, j, k of h(cos_s(i, j, k), cos_t(i, j, k)), cos(i, j, k) = <e_ij, e_kj>,
        e_ij = (x_i - x_j) / ||x_i - x_j||, h the Huber loss with delta 1.

    Source:
        Park et al. 2019, "Relational Knowledge Distillation", equations 8 and 9.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> round(float(angle_distance(3.0 * x, x)), 6)
        0.0
    """
    n = len(student)
    if n < 3:
        return student.float().sum() * 0.0
    index = torch.arange(n, device=student.device)
    i, k, j = index.view(1, n, 1), index.view(1, 1, n), index.view(n, 1, 1)
    distinct = (i != j) & (k != j) & (i < k)  # the angle is symmetric in i and k
    return huber_loss(_angles(student)[distinct], _angles(teacher)[distinct])


def split_heads(feature: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (B, T, heads x D) as (B, heads, T, D), in float32 or wider."""
    wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
    return wide.unflatten(-1, (heads, -1)).transpose(1, 2)


def relation_log_probabilities(
    left: torch.Tensor, right: torch.Tensor, valid: torch.Tensor | None = None, *, causal: bool = False
) -> torch.Tensor:
    """Return the log-probabilities with which tokens look at each other: log softmax(L R^T / sqrt(d)).

    Args:
        left: queries, or values, (B, A, T, D): A heads.
        right: keys, or the same values, (B, A, T, D).
        valid: bool (B, T): which tokens are looked at; None for all.
        causal: tokens look only at themselves and earlier ones.

    Returns:
        (B, A, T, T); -inf where a token is not looked at.

    Source:
        Wang et al. 2020, "MiniLM", equations 6 to 9: with queries and keys the self-attention distribution, with values
        on both sides the value relation.
    """
    scores = left @ right.transpose(-1, -2) / left.shape[-1] ** 0.5
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        hidden = ~torch.ones_like(hidden).tril()
    if valid is not None:
        hidden = hidden | ~valid[:, None, None, :]
    # a finite number first: a row of -inf alone, of a token that does not count, would have NaN gradients
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1).masked_fill(hidden, float("-inf"))


def relation_divergence(
    log_student: torch.Tensor, log_teacher: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean divergence of what tokens look at, for each example.

    Args:
        log_student: (B, A, T, T), of `relation_log_probabilities`.
        log_teacher: (B, A, T, T).
        valid: bool (B, T): the tokens that look; None for all.

    Returns:
        (B,), in nats.

    Math:
        1/(A |x|) sum_a sum_t KL(R_t[a, t, :] || R_s[a, t, :]).

    Source:
        Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
        Transformers", equations 7 and 9.

    Example:
        >>> x = torch.randn(1, 2, 3, 4)
        >>> relation = relation_log_probabilities(x, x)
        >>> relation_divergence(relation, relation)
        tensor([0.])
    """
    unseen = log_teacher.isneginf()
    ratio = log_teacher.masked_fill(unseen, 0.0) - log_student.masked_fill(unseen, 0.0)
    values = (log_teacher.exp() * ratio).sum(-1).mean(1)  # (B, T)
    if valid is None:
        return values.mean(-1)
    return values.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)


def _distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the distances of the pairs i < j over their mean."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).flatten(1)
    distances = torch.pdist(wide)
    return distances / distances.mean().clamp(min=torch.finfo(distances.dtype).tiny)


def _angles(embeddings: torch.Tensor) -> torch.Tensor:
    """Return <e_ij, e_kj> at [j, i, k]."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).flatten(1)
    directions = normalize(wide.unsqueeze(0) - wide.unsqueeze(1), dim=-1)  # [j, i] = x_i - x_j
    return directions @ directions.transpose(1, 2)
