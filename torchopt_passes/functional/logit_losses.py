"""Distances between the class distributions of a teacher and a student, beyond `soft_kl_divergence`.

Shapes: C classes, ``...`` positions (examples, or examples by tokens); N positions in rows. Half-precision logits are
computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchopt_passes.functional.losses import log_softened

__all__ = ["Correlations", "Decoupled", "decoupled_divergence", "js_divergence", "relation_distances"]


class Decoupled(NamedTuple):
    """The two parts of a divergence, one value for each position.

    Args:
        target: of the target class against all others together, (...).
        rest: among the classes that are not the target, (...).
    """

    target: torch.Tensor
    rest: torch.Tensor


class Correlations(NamedTuple):
    """One minus the mean correlation of two tables of probabilities, scalars in [0, 2].

    Args:
        inter: over rows: how one position's classes relate.
        intra: over columns: how the positions relate in one class.
    """

    inter: torch.Tensor
    intra: torch.Tensor


def decoupled_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> Decoupled:
    """Return the divergence of the target class and that among the other classes, for each position.

    Args:
        student_logits: (..., C), C >= 2.
        teacher_logits: (..., C).
        targets: the classes of the hard labels, int64 (...), each in 0..C-1.
        temperature: T > 0.

    Returns:
        Both in nats, >= 0, shape (...).

    Math:
        With p = softmax(z / T) and y the target: b = (p_y, 1 - p_y) and q_c = p_c / (1 - p_y) for c != y,
        TCKD = KL(b_t || b_s) and NCKD = KL(q_t || q_s). The plain divergence, KL(p_t || p_s) = TCKD + (1 - p_y,t) NCKD,
        forgets the dark knowledge of confident teachers.

    Source:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", equations 5 to 7.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 1.0, 2.0]])
        >>> target, rest = decoupled_divergence(student, teacher, torch.tensor([0]), 1.0)
        >>> [round(abs(float(value)), 4) for value in (target, rest)]  # the teacher disagrees on class 0 alone
        [0.9957, 0.0]
    """
    student, teacher = (_decoupled(logits, targets, temperature) for logits in (student_logits, teacher_logits))
    return Decoupled(*(_divergence(t, s) for t, s in zip(teacher, student, strict=True)))


def relation_distances(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> Correlations:
    """Return how far the relations of classes and of positions are apart; linear changes of a relation are free.

    Args:
        student_logits: (N, C), N >= 1 and C >= 2.
        teacher_logits: (N, C).
        temperature: T > 0.

    Math:
        With Y = softmax(z / T), an N x C table, and the Pearson correlation r(u, v):
        inter = 1 - 1/N sum_i r(Y_s[i, :], Y_t[i, :]), intra = 1 - 1/C sum_j r(Y_s[:, j], Y_t[:, j]).
        A row or column that is constant correlates with nothing: r = 0.

    Source:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", equations 6 to 9.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0]])
        >>> [round(abs(float(value)), 6) for value in relation_distances(logits, logits, 1.0)]
        [0.0, 0.0]
    """
    student, teacher = (log_softened(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    inter = 1.0 - _correlation(student, teacher, dim=1).mean()
    intra = 1.0 - _correlation(student, teacher, dim=0).mean()
    return Correlations(inter, intra)


def js_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, temperature: float
) -> torch.Tensor:
    """Return the generalised Jensen-Shannon divergence, for each position.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).
        beta: 0 <= beta <= 1. The ends are the limits of JSD / beta and JSD / (1 - beta): 0 is KL(p_t || p_s), which
            covers what the teacher says, 1 is KL(p_s || p_t), which seeks its modes.
        temperature: T > 0.

    Returns:
        (...), in nats, >= 0; at most ln 2 for beta = 0.5.

    Math:
        JSD_beta = beta KL(p_t || m) + (1 - beta) KL(p_s || m) with m = beta p_t + (1 - beta) p_s, p = softmax(z / T).

    Source:
        Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1 and the limits below it.

    Example:
        >>> student, teacher = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
        >>> round(float(js_divergence(student, teacher, 0.5, 1.0)), 4)  # apart as can be: ln 2
        0.6931
    """
    student, teacher = log_softened(student_logits, temperature), log_softened(teacher_logits, temperature)
    if beta == 0.0:
        return _divergence(teacher, student)
    if beta == 1.0:
        return _divergence(student, teacher)
    shares = torch.tensor([beta, 1.0 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(teacher + shares[0], student + shares[1])
    return beta * _divergence(teacher, mixture) + (1.0 - beta) * _divergence(student, mixture)


def _decoupled(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log b, (..., 2), and log q, (..., C) with -inf at the target."""
    log_p = log_softened(logits, temperature)
    index = targets.unsqueeze(-1)
    others = log_p.scatter(-1, index, float("-inf"))
    log_others = others.logsumexp(-1, keepdim=True)  # log (1 - p_y), without the cancellation
    return torch.cat((log_p.gather(-1, index), log_others), -1), others - log_others


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q); where both are zero, nothing."""
    ratio = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * ratio).sum(-1)


def _correlation(one: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    centred = [table - table.mean(dim, keepdim=True) for table in (one, other)]
    return torch.cosine_similarity(*centred, dim=dim)
