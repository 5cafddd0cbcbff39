"""Losses on the logits: soft targets, DKD, DIST, generalised Jensen-Shannon divergence."""

from __future__ import annotations

from typing import Literal

import torch

from torchopt_passes.callbacks.distill.base import LogitLoss
from torchopt_passes.callbacks.distill.predictions import KeptLogits, Predictions
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.logit_losses import decoupled_divergence, js_divergence, relation_distances
from torchopt_passes.functional.losses import soft_cross_entropy, soft_kl_divergence
from torchopt_passes.functional.top_k import top_k_divergence

__all__ = ["DIST", "DKD", "JSD", "SoftTargets"]


class _Softened(LogitLoss):
    """A loss on softened distributions.

    Args:
        temperature: T > 0; None for that of the `Distillation`, which may be scheduled.
        scale_t2: multiply by T^2, so that the gradient does not shrink as T grows.
    """

    temperature: float | None = None
    scale_t2: bool = True

    def check(self) -> None:
        """Refuse a temperature that is not positive."""
        super().check()
        if self.temperature is not None and not self.temperature > 0.0:
            raise ConfigError(f"{type(self).__name__}: temperature must be positive, not {self.temperature}")

    def heat(self, predictions: Predictions) -> tuple[float, float]:
        """Return T, and the factor of the term."""
        temperature = predictions.temperature if self.temperature is None else self.temperature
        return temperature, temperature**2 if self.scale_t2 else 1.0


class SoftTargets(_Softened):
    """The teacher's softened distribution as target: the classic, for classes and vocabularies alike.

    The only loss that works on the top k logits of a `TeacherCache`, with one outcome for all other classes.

    Args:
        form: ``"kl"`` for the divergence, ``"ce"`` for the cross-entropy: the same gradient.
        temperature: T > 0; None for that of the `Distillation`.
        scale_t2: multiply by T^2.

    Math:
        T^2 KL(p_t || p_s) or T^2 CE(p_t, p_s), p = softmax(z / T); the mean over the labels.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """

    form: Literal["kl", "ce"] = "kl"

    def term(self, predictions: Predictions) -> torch.Tensor:
        """Return the mean divergence over the labels that count."""
        temperature, factor = self.heat(predictions)
        student, teacher = predictions.student, predictions.teacher
        if isinstance(teacher, KeptLogits) and teacher.values.shape[-1] < student.shape[-1]:
            values = top_k_divergence(student, teacher.at(temperature), temperature, cross_entropy=self.form == "ce")
        else:
            divergence = soft_kl_divergence if self.form == "kl" else soft_cross_entropy
            values = divergence(student, predictions.dense("SoftTargets"), temperature)
        return factor * predictions.mean(values)


class DKD(_Softened):
    """Decoupled distillation: what the teacher says of the wrong classes counts even where it is sure of the right one.

    Needs hard labels. Best for classifiers with many classes and a confident teacher.

    Args:
        alpha: weight of the part of the target class (TCKD).
        beta: weight of the part of the other classes (NCKD); the paper has 8 for ResNets on CIFAR-100, 0.5 on ImageNet.
        temperature: T > 0; None for that of the `Distillation`.
        scale_t2: multiply by T^2.

    Math:
        T^2 (alpha TCKD + beta NCKD), see `functional.logit_losses.decoupled_divergence`; the mean over the labels.

    Source:
        Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7.
    """

    alpha: float = 1.0
    beta: float = 8.0

    def term(self, predictions: Predictions) -> torch.Tensor:
        """Return the weighted sum of both parts."""
        if predictions.labels is None:
            raise CallbackError("DKD needs a class label for each position: pass labels= to the model, or take JSD")
        temperature, factor = self.heat(predictions)
        teacher = predictions.dense("DKD")
        parts = decoupled_divergence(predictions.student, teacher, predictions.labels.clamp(min=0), temperature)
        return factor * predictions.mean(self.alpha * parts.target + self.beta * parts.rest)


class DIST(_Softened):
    """Relations instead of values: correlations over classes and over examples. For teachers that are much stronger.

    The second part compares the examples of a micro-batch with each other: it depends on who shares one, so that
    gradient accumulation is not the same as one large batch.

    Args:
        beta: weight of the relations over classes, of each position.
        gamma: weight of the relations over positions, of each class.
        temperature: T > 0; None for that of the `Distillation`. The paper has 1 on ImageNet, 4 on CIFAR-100.
        scale_t2: multiply by T^2; the authors' code does.

    Math:
        T^2 (beta inter + gamma intra), see `functional.logit_losses.relation_distances`.

    Source:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", equation 10.
    """

    beta: float = 1.0
    gamma: float = 1.0

    def term(self, predictions: Predictions) -> torch.Tensor:
        """Return the weighted sum of both relations, over the positions that count."""
        temperature, factor = self.heat(predictions)
        valid, tables = predictions.valid, (predictions.student, predictions.dense("DIST"))
        student, teacher = (t.flatten(0, -2) if valid is None else t[valid] for t in tables)
        if not len(student):
            return student.float().sum() * 0.0
        inter, intra = relation_distances(student, teacher, temperature)
        return factor * (self.beta * inter + self.gamma * intra)


class JSD(_Softened):
    """Generalised Jensen-Shannon divergence: from covering all that the teacher says to seeking what it prefers.

    Args:
        beta: 0 is the divergence of `SoftTargets`, 1 the reverse one, 0.5 the symmetric one.
        temperature: T > 0; None for that of the `Distillation`.
        scale_t2: multiply by T^2; TRL's GKD does not.

    Math:
        T^2 JSD_beta, see `functional.logit_losses.js_divergence`; the mean over the labels.

    Source:
        Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), equation 1.
    """

    beta: float = 0.5

    def check(self) -> None:
        """Refuse a beta outside of [0, 1]."""
        super().check()
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"JSD: beta must be in [0, 1], not {self.beta}")

    def term(self, predictions: Predictions) -> torch.Tensor:
        """Return the mean divergence over the labels that count."""
        temperature, factor = self.heat(predictions)
        teacher = predictions.dense("JSD")
        return factor * predictions.mean(js_divergence(predictions.student, teacher, self.beta, temperature))
