"""Distillation: the student also learns from what a teacher says about the same inputs."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.items import IGNORE_INDEX, count_labels, shifts_labels
from torchopt_passes.callbacks.lifecycle import LossTerm
from torchopt_passes.callbacks.student import Student, StudentCall
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.losses import masked_mean, soft_cross_entropy, soft_kl_divergence

__all__ = ["Distillation"]


@dataclass(eq=False)
class Distillation(Callback):
    """Replace a share of the student's loss by its distance to a teacher's softened predictions.

    In each training-mode forward of the student the teacher runs on the same inputs, without gradients and in
    eval mode, and the loss that the student returns becomes L. Evaluation is untouched. The teacher is never
    part of the student, its state_dict or a checkpoint. Positions whose label is -100 do not count; causal
    language models are compared where they predict.

    Args:
        teacher: takes the student's inputs and returns logits of the same shape; moved to the student's device
            when first used.
        alpha: weight of the soft term, 0 <= alpha <= 1.
        temperature: T > 0; higher shows more of how the teacher ranks the wrong classes.
        form: ``"kl"`` for the divergence, ``"ce"`` for the cross-entropy of the softened distributions; same
            gradient.
        scale_t2: multiply the soft term by T^2, so that its gradient does not shrink as T grows.
        logits: names of the outputs to compare; the mean over them (a question-answering head has two).

    Math:
        L = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T), with p^T = softmax(z / T), by default;
        L = (1 - alpha) CE(y, p_s) + alpha CE(p_t^T, p_s^T) with ``form="ce", scale_t2=False``.
        CE(y, p_s) is whatever loss the student returns. Both are means over the same labels.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        ```python
        Trainer(student, args, train_dataset=data, callbacks=[top.Distillation(teacher, temperature=4.0)]).train()
        ```
    """

    changes_loss: ClassVar[bool] = True

    teacher: nn.Module = field(repr=False)
    _: KW_ONLY
    alpha: float = 0.5
    temperature: float = 2.0
    form: Literal["kl", "ce"] = "kl"
    scale_t2: bool = True
    logits: tuple[str, ...] = ("logits",)
    _was_training: list[nn.Module] = field(default_factory=list[nn.Module], init=False, repr=False)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong for any model."""
        if not isinstance(self.teacher, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"teacher must be a torch.nn.Module, not {type(self.teacher).__name__}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha must be in [0, 1], not {self.alpha}")
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature must be positive, not {self.temperature}")
        if self.form not in ("kl", "ce"):
            raise ConfigError(f'form must be "kl" or "ce", not {self.form!r}')
        if isinstance(self.logits, str) or not self.logits:
            raise ConfigError(f'logits must be a tuple of output names such as ("logits",), not {self.logits!r}')

    def install(self, student: Student) -> None:
        """Put the teacher in eval mode; refuse one that is, or shares weights with, the student."""
        weights = {id(parameter) for parameter in student.model.parameters()}
        shared = next((fqn for fqn, p in self.teacher.named_parameters() if id(p) in weights), None)
        if shared is not None:
            raise CallbackError(f"teacher and student share the weight {shared}: give a copy, copy.deepcopy(model)")
        self._was_training = [module for module in self.teacher.modules() if module.training]
        self.teacher.eval()

    def remove(self) -> None:
        """Leave the teacher as it came."""
        for module in self._was_training:
            module.training = True
        self._was_training = []
        self._sums = {}

    def loss_term(self, call: StudentCall) -> LossTerm:
        """Return the soft term, which stands in for the share `alpha` of the hard loss."""
        shifted = shifts_labels(call.model)
        answer = self._ask(call)
        terms = [
            self._soft(
                outputs.field(call.output, name, "student"),
                outputs.field(answer, name, "teacher"),
                call.labels,
                shifted,
            )
            for name in self.logits
        ]
        soft = torch.stack(terms).mean() if len(terms) > 1 else terms[0]
        self._record(call.labels, shifted, kd_loss=soft, ce_loss=call.loss)
        return LossTerm(self.alpha * soft, replaces=self.alpha)

    def loss(
        self, student_output: Any, teacher_output: Any, labels: torch.Tensor, *, shift_labels: bool = False
    ) -> torch.Tensor:
        """Return L for a loop that owns the loss: a mean over the labels of this batch.

        Args:
            student_output: logits (..., C), or an output that holds them.
            teacher_output: likewise; computed under ``torch.no_grad()`` by the caller.
            labels: class indices (...), -100 where none.
            shift_labels: position i predicts label i + 1, as in causal language models.

        Returns:
            Scalar; multiply by c / n for a share of an accumulated batch (c of n labels).

        Raises:
            CallbackError: the shapes do not fit.

        Example:
            >>> distillation = Distillation(nn.Linear(2, 3), alpha=0.0)
            >>> student, teacher, labels = torch.zeros(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
            >>> round(float(distillation.loss(student, teacher, labels)), 4)  # ln 3
            1.0986
        """
        hard_terms: list[torch.Tensor] = []
        soft_terms: list[torch.Tensor] = []
        for name in self.logits:
            student = outputs.field(student_output, name, "student")
            teacher = outputs.field(teacher_output, name, "teacher")
            soft_terms.append(self._soft(student, teacher, labels, shift_labels))
            logits, targets = (student[..., :-1, :], labels[..., 1:]) if shift_labels else (student, labels)
            classes_last = logits if logits.shape[:-1] == targets.shape else logits.movedim(1, -1)
            flat = classes_last.reshape(-1, classes_last.shape[-1])
            hard_terms.append(cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX))
        hard, soft = torch.stack(hard_terms).mean(), torch.stack(soft_terms).mean()
        self._record(labels, shift_labels, kd_loss=soft, ce_loss=hard)
        return (1.0 - self.alpha) * hard + self.alpha * soft

    def metrics(self) -> dict[str, float]:
        """Return ``kd_loss`` (the soft term, T^2 included, before alpha) and ``ce_loss``: means over the labels."""
        sums, self._sums = self._sums, {}
        count = float(sums.pop("count", torch.tensor(0)))
        return {name: float(total) / count for name, total in sums.items()} if count else {}

    def _ask(self, call: StudentCall) -> Any:
        device = call.loss.device
        if any(parameter.device != device for parameter in self.teacher.parameters()):
            self.teacher.to(device)
        takes_labels = outputs.accepts(self.teacher, "labels")
        kwargs = {name: value for name, value in call.kwargs.items() if takes_labels or name != "labels"}
        try:
            with torch.no_grad():
                return self.teacher(*call.args, **kwargs)
        except TypeError as error:
            raise CallbackError(
                f"the teacher {type(self.teacher).__name__} does not take the student's inputs ({error}): wrap it in a "
                "module whose forward does"
            ) from error

    def _soft(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, shifted: bool
    ) -> torch.Tensor:
        """Return the mean soft term over the positions that count."""
        if student.shape != teacher.shape:
            raise CallbackError(
                f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: both "
                "need the same classes or vocabulary, and the same tokens or image size"
            )
        if labels is not None:
            student, teacher, labels = _align(student, teacher, labels, shifted)
        if student.shape[-1] < 2:
            raise CallbackError(
                f"soft targets need at least 2 classes, the logits have {student.shape[-1]} (a regression?)"
            )
        divergence = soft_kl_divergence if self.form == "kl" else soft_cross_entropy
        values = divergence(student, teacher.detach().to(student.device), self.temperature)
        valid = labels.ne(IGNORE_INDEX) if labels is not None and labels.shape == values.shape else None
        scale = self.temperature**2 if self.scale_t2 else 1.0
        return scale * masked_mean(values, valid)

    def _record(self, labels: torch.Tensor | None, shifted: bool, **values: torch.Tensor) -> None:
        """Add up for `metrics`, each forward by its number of labels; on the device, without waiting for it."""
        some = next(iter(values.values()))
        count = torch.ones_like(some) if labels is None else count_labels(labels, shifted=shifted).to(some)
        added = {name: torch.where(count > 0, value.detach() * count, 0.0) for name, value in values.items()}
        added["count"] = count.detach()
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in added.items()}


def _align(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits with classes last, position by position beside the labels that they predict.

    Dense prediction has classes second, (B, C, H, W), and its labels may be at another resolution: then every
    position counts.
    """
    if labels.is_floating_point():
        raise CallbackError(f"soft targets need class labels, not {labels.dtype} (multi-label or regression)")
    if shifted:
        student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
    if student.shape[:-1] == labels.shape:
        return student, teacher, labels
    if student.ndim >= 4 and labels.ndim == student.ndim - 1 and labels.shape[0] == student.shape[0]:
        return student.movedim(1, -1), teacher.movedim(1, -1), labels
    raise CallbackError(
        f"logits of shape {tuple(student.shape)} do not fit labels of shape {tuple(labels.shape)}: "
        "expected (..., C) and (...)"
    )
