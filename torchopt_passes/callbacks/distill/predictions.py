"""The logits of both models, position by position beside the labels that they predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.errors import CallbackError
from torchopt_passes.functional.losses import masked_mean
from torchopt_passes.functional.top_k import TopK

__all__ = ["KeptLogits", "Predictions"]


@dataclass(frozen=True)
class KeptLogits:
    """What a cache kept of a teacher's logits.

    Args:
        values: the k largest, less the largest of all, (..., k).
        indices: their classes, int64 (..., k).
        rest: log sum exp(z / T) over all other classes, for each temperature, (..., temperatures).
        temperatures: those that were kept.
        covered: bool (...): positions that are in the cache; the others have no part in the loss.
    """

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor
    temperatures: tuple[float, ...]
    covered: torch.Tensor

    def at(self, temperature: float) -> TopK:
        """Return what was kept for a temperature.

        Raises:
            CallbackError: it was not kept.
        """
        if temperature not in self.temperatures:
            raise CallbackError(
                f"the cache has what is left of the classes at temperatures {list(self.temperatures)}, not at "
                f"{temperature}: take one of them, or cache_teacher(..., temperatures=[{temperature}])"
            )
        return TopK(self.values, self.indices, self.rest[..., self.temperatures.index(temperature)])

    def without_last(self) -> KeptLogits:
        """Return all but the last position of each example."""
        return KeptLogits(
            self.values[..., :-1, :],
            self.indices[..., :-1, :],
            self.rest[..., :-1, :],
            self.temperatures,
            self.covered[..., :-1],
        )


@dataclass(frozen=True)
class Predictions:
    """What a loss on logits sees.

    Args:
        student: (..., C).
        teacher: (..., C), without gradient; or what a cache kept of it.
        labels: class indices (...), -100 where they do not count; None where there are none for these positions.
        temperature: that of the `Distillation` now.
    """

    student: torch.Tensor
    teacher: torch.Tensor | KeptLogits
    labels: torch.Tensor | None
    temperature: float

    @classmethod
    def align(
        cls,
        student: torch.Tensor,
        teacher: torch.Tensor | KeptLogits,
        labels: torch.Tensor | None,
        *,
        shifted: bool,
        temperature: float,
    ) -> Predictions:
        """Put classes last and positions beside their labels.

        Dense prediction has classes second, (B, C, H, W), and its labels may be at another resolution: then every
        position counts.

        Raises:
            CallbackError: the shapes do not fit, there are fewer than 2 classes, or the labels are no classes.
        """
        if isinstance(teacher, torch.Tensor):
            if student.shape != teacher.shape:
                raise CallbackError(
                    f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
                    "both need the same classes or vocabulary, and the same tokens or image size"
                )
            teacher = teacher.detach().to(student.device)
        if labels is not None:
            if labels.is_floating_point():
                raise CallbackError(f"soft targets need class labels, not {labels.dtype} (multi-label or regression)")
            if shifted:
                student, labels = student[..., :-1, :], labels[..., 1:]
                teacher = teacher.without_last() if isinstance(teacher, KeptLogits) else teacher[..., :-1, :]
            if student.shape[:-1] != labels.shape:
                student, teacher = _classes_last(student, teacher, labels)
        if student.shape[-1] < 2:
            raise CallbackError(
                f"soft targets need at least 2 classes, the logits have {student.shape[-1]} (a regression?)"
            )
        fitting = labels if labels is not None and labels.shape == student.shape[:-1] else None
        return cls(student, teacher, fitting, temperature)

    @property
    def valid(self) -> torch.Tensor | None:
        """Which positions count, bool (...); None for all."""
        return None if self.labels is None else self.labels.ne(IGNORE_INDEX)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of one value for each position over those that count."""
        if isinstance(self.teacher, KeptLogits):
            values = values.masked_fill(~self.teacher.covered, 0.0)
        return masked_mean(values, self.valid)

    def dense(self, name: str) -> torch.Tensor:
        """Return all of the teacher's logits, (..., C).

        Args:
            name: of the loss, for the error.

        Raises:
            CallbackError: a cache has kept the largest ones alone.
        """
        if isinstance(self.teacher, torch.Tensor):
            return self.teacher
        kept, classes = self.teacher.values.shape[-1], self.student.shape[-1]
        if kept < classes:
            raise CallbackError(
                f"{name} needs the teacher's logits of all {classes} classes, the cache has the {kept} largest: take "
                f"SoftTargets, or cache_teacher(..., top_k={classes})"
            )
        empty = torch.zeros(self.student.shape, dtype=self.teacher.values.dtype, device=self.student.device)
        return empty.scatter(-1, self.teacher.indices, self.teacher.values)


def _classes_last(
    student: torch.Tensor, teacher: torch.Tensor | KeptLogits, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dense = student.ndim >= 4 and labels.ndim == student.ndim - 1 and labels.shape[0] == student.shape[0]
    if not dense or isinstance(teacher, KeptLogits):
        raise CallbackError(
            f"logits of shape {tuple(student.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "expected (..., C) and (...)"
        )
    return student.movedim(1, -1), teacher.movedim(1, -1)
