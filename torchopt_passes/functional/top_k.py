"""The largest k logits of a teacher and the mass of the rest: what is kept of a prediction on disk.

Shapes: C classes, k of them kept, ``...`` positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchopt_passes.functional.losses import log_softened

__all__ = ["TopK", "bucket_log_probabilities", "keep_top_k", "top_k_divergence"]


class TopK(NamedTuple):
    """What is kept of logits z.

    Args:
        values: the k largest, less the largest of all, descending, (..., k); <= 0.
        indices: their classes, int64 (..., k).
        rest: log sum exp(z_c / T) over all other classes c, with z less the largest, (...), for one temperature T; -inf
            where all classes are kept.
    """

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor


def keep_top_k(logits: torch.Tensor, k: int, temperature: float) -> TopK:
    """Return the k largest logits and the rest's mass at a temperature.

    Args:
        logits: (..., C).
        k: 1 <= k <= C.
        temperature: T > 0.

    Returns:
        float32.

    Example:
        >>> kept = keep_top_k(torch.tensor([1.0, 3.0, 1.0]), 1, 2.0)
        >>> kept.values.tolist(), kept.indices.tolist(), round(float(kept.rest), 4)  # ln (2 exp(-1))
        ([0.0], [1], -0.3069)
    """
    wide = logits.float()
    values, indices = wide.topk(k, dim=-1)
    largest = values[..., :1]
    others = (wide - largest).scatter(-1, indices, float("-inf"))
    return TopK(values - largest, indices, (others / temperature).logsumexp(-1))


def bucket_log_probabilities(
    student_logits: torch.Tensor, kept: TopK, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of k + 1 outcomes: the k classes that were kept, and any other class.

    Args:
        student_logits: (..., C).
        kept: of the teacher, its ``rest`` for the same temperature.
        temperature: T > 0.

    Returns:
        The student's and the teacher's, (..., k + 1); -inf for the last where all classes were kept.
    """
    log_p = log_softened(student_logits, temperature)
    others = log_p.scatter(-1, kept.indices, float("-inf")).logsumexp(-1, keepdim=True)
    student = torch.cat((log_p.gather(-1, kept.indices), others), -1)
    teacher = torch.cat((kept.values / temperature, kept.rest.unsqueeze(-1)), -1)
    return student, teacher.to(student.dtype).log_softmax(-1)


def top_k_divergence(
    student_logits: torch.Tensor, kept: TopK, temperature: float, *, cross_entropy: bool = False
) -> torch.Tensor:
    """Return KL(p_t || p_s), or the cross-entropy, of k + 1 outcomes, for each position.

    Args:
        student_logits: (..., C).
        kept: of the teacher, its ``rest`` for the same temperature.
        temperature: T > 0.
        cross_entropy: return the cross-entropy instead: the divergence plus the teacher's entropy.

    Returns:
        (...), in nats.

    Math:
        sum_{c in top k} p_t,c log (p_t,c / p_s,c) + r_t log (r_t / r_s) with r = 1 - sum_{c in top k} p_c and
        p = softmax(z / T) over all C classes. By the log-sum inequality it is at most the divergence over all classes;
        they are equal when k = C, and when the rest is spread alike in both.

    Source:
        Top-k with one outcome for all others, the "ghost token" of Anshumann et al. 2025, "Sparse Logit Sampling:
        Accelerating Knowledge Distillation in LLMs", which shows how k alone, without it, is biased.

    Example:
        >>> teacher, student = torch.tensor([2.0, 0.0, -1.0]), torch.zeros(3)
        >>> kept = keep_top_k(teacher, 3, 1.0)
        >>> round(float(top_k_divergence(student, kept, 1.0)), 4)  # all are kept: the plain divergence
        0.5743
    """
    student, teacher = bucket_log_probabilities(student_logits, kept, temperature)
    nothing = teacher.isneginf()
    student = student.masked_fill(nothing, 0.0)
    ratio = -student if cross_entropy else teacher.masked_fill(nothing, 0.0) - student
    return (teacher.exp() * ratio).sum(-1)
