"""Losses of distillation, one value for each position; the mean over what counts is taken separately.

Shapes: C classes, ``...`` positions (examples, or examples by tokens). Half-precision logits are computed in float32.
"""

from __future__ import annotations

import torch

__all__ = ["log_softened", "masked_mean", "soft_cross_entropy", "soft_kl_divergence", "weighted_mean"]


def soft_kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return KL(p_t || p_s) of the softened distributions, for each position.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).
        temperature: T > 0; 1 leaves the distributions as they are.

    Returns:
        (...), in nats, >= 0.

    Math:
        sum_c p_t (log p_t - log p_s) with p = softmax(z / T). Its gradient shrinks as 1 / T^2: multiply by T^2 to keep
        the balance with a hard-label loss.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> soft_kl_divergence(logits, logits, 2.0)
        tensor([0.])
    """
    log_student = log_softened(student_logits, temperature)
    log_teacher = log_softened(teacher_logits, temperature)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def soft_cross_entropy(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross-entropy of the softened distributions, for each position.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).
        temperature: T > 0.

    Returns:
        (...), in nats.

    Math:
        -sum_c p_t log p_s with p = softmax(z / T): `soft_kl_divergence` plus the teacher's entropy, the same gradient.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        >>> round(float(soft_cross_entropy(torch.zeros(2), torch.zeros(2), 1.0)), 4)  # ln 2
        0.6931
    """
    return -(log_softened(teacher_logits, temperature).exp() * log_softened(student_logits, temperature)).sum(-1)


def masked_mean(values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean of the valid values, 0 where there are none.

    Args:
        values: any shape.
        valid: bool, shape of `values`; None counts all.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    if valid is None:
        return values.mean()
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return sum(w v) / sum(w), 0 where the weights are all 0.

    Args:
        values: any shape.
        weights: >= 0, shape of `values`; None for equal ones. A value of weight 0 has no influence, not even NaN.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2, 1, 0]))
        tensor(2.)
    """
    if weights is None:
        return values.mean()
    weighted = (values * weights.to(values.dtype)).masked_fill(weights == 0, 0)
    return weighted.sum() / weights.sum().clamp(min=1).to(values.dtype)


def log_softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log softmax(z / T) over the last dimension, in float32 or wider.

    Example:
        >>> log_softened(torch.zeros(2).bfloat16(), 2.0)
        tensor([-0.6931, -0.6931])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)
