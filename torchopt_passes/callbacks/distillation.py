"""Distillation: the student also learns from what a teacher says about the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.distill.base import DistillationLoss, LogitLoss, Match, make_losses
from torchopt_passes.callbacks.distill.cache_source import CacheSource
from torchopt_passes.callbacks.distill.logit_losses import SoftTargets
from torchopt_passes.callbacks.distill.predictions import KeptLogits, Predictions
from torchopt_passes.callbacks.distill.sources import make_sources
from torchopt_passes.callbacks.distill.teaching import Teaching
from torchopt_passes.callbacks.distill.vocabulary import compare_tokenizers
from torchopt_passes.callbacks.items import IGNORE_INDEX, count_labels, shifts_labels
from torchopt_passes.callbacks.lifecycle import LossTerm, Progress
from torchopt_passes.callbacks.scheduled import Scheduled, read_scheduled, value_at, values_of
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.plan import Plan

__all__ = ["Distillation"]


@dataclass(eq=False)
class Distillation(Callback):
    """Replace a share of the student's loss by its distance to a teacher: of predictions, features and relations.

    In each training-mode forward of the student the teacher runs on the same inputs, without gradients and in
    eval mode, and the loss that the student returns becomes L. Evaluation is untouched. The teacher is never
    part of the student, its state_dict or a checkpoint. Positions whose label is -100 do not count; causal
    language models are compared where they predict.

    Args:
        teacher: takes the student's inputs and returns logits of the same shape; moved to the student's device
            when first used. In half precision, quantized, compiled, a captured graph: any module. Other inputs or
            another device: `Teacher`. Without running a model: `TeacherCache`. The student itself: `InitialWeights`,
            `AveragedWeights`, `DeeperLayers`. A list of these for several.
        alpha: weight of the soft term, 0 <= alpha <= 1; a number or a `Scheduled` one.
        temperature: T > 0; higher shows more of how the teacher ranks the wrong classes. Likewise.
        form: ``"kl"`` for the divergence, ``"ce"`` for the cross-entropy of the softened distributions; same
            gradient.
        scale_t2: multiply the soft term by T^2, so that its gradient does not shrink as T grows.
        logits: names of the outputs to compare; the mean over them (a question-answering head has two).
        losses: what to compare by, instead of soft targets alone: objects such as ``[SoftTargets(),
            Hint(weight=0.1)]``, or the same as data, ``["soft_targets", {"hint": {"weight": 0.1}}]``.
        layers: for losses on features that name no layers of their own: see `FeatureLoss`.
        match: which teacher layer a student layer of a pattern learns from: ``"even"``, ``"first"``, ``"last"`` or
            ``"only_last"``.
        hard_weight: weight of the student's own loss; None for 1 - alpha.
        kept: the plan, or plans in order, that made the student of this teacher: its channels are compared with the
            teacher's that stayed, and no projector is needed.
        tokenizers: those of student and teacher, to refuse different ones; logits beyond their vocabulary are left out.
            The student's alone where the teacher is a `TeacherCache` that was made with ``tokenizer=``.
        example_inputs: one batch, run once when the callback is installed, where the widths of layers cannot be read
            off the models.

    Math:
        L = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T), with p^T = softmax(z / T), by default;
        L = (1 - alpha) CE(y, p_s) + alpha CE(p_t^T, p_s^T) with ``form="ce", scale_t2=False``;
        L = hard_weight CE(y, p_s) + alpha sum_k w_k L_k with `losses`, the mean over teachers by their weights in each.
        CE(y, p_s) is whatever loss the student returns. Both are means over the same labels.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        ```python
        Trainer(student, args, train_dataset=data, callbacks=[top.Distillation(teacher, temperature=4.0)]).train()
        ```
    """

    changes_loss: ClassVar[bool] = True

    teacher: Any = field(repr=False)
    _: KW_ONLY
    alpha: float | Scheduled | Mapping[str, Any] = 0.5
    temperature: float | Scheduled | Mapping[str, Any] = 2.0
    form: Literal["kl", "ce"] = "kl"
    scale_t2: bool = True
    logits: tuple[str, ...] = ("logits",)
    losses: Sequence[DistillationLoss | str | Mapping[str, Any]] = ()
    layers: Mapping[str, str] | Sequence[str] = ()
    match: Match = "even"
    hard_weight: float | None = None
    kept: Plan | Sequence[Plan] = ()
    tokenizers: Any = field(default=None, repr=False)
    example_inputs: Any = field(default=None, repr=False)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], init=False, repr=False)
    _progress: Progress = field(default=Progress(0, None), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong for any model."""
        self._sources = make_sources(self.teacher)
        self._alpha, self._heat = read_scheduled(self.alpha), read_scheduled(self.temperature)
        if not all(0.0 <= alpha <= 1.0 for alpha in values_of(self._alpha)):
            raise ConfigError(f"alpha must be in [0, 1], not {self.alpha}")
        if not all(temperature > 0.0 for temperature in values_of(self._heat)):
            raise ConfigError(f"temperature must be positive, not {self.temperature}")
        if self.form not in ("kl", "ce"):
            raise ConfigError(f'form must be "kl" or "ce", not {self.form!r}')
        if isinstance(self.logits, str) or not self.logits:
            raise ConfigError(f'logits must be a tuple of output names such as ("logits",), not {self.logits!r}')
        if self.hard_weight is not None and self.hard_weight < 0.0:
            raise ConfigError(f"hard_weight must be >= 0, not {self.hard_weight}")
        if self.losses and (self.form, self.scale_t2) != ("kl", True):
            raise ConfigError(
                "with losses=, form and scale_t2 are options of SoftTargets: losses=[SoftTargets(form=...)]"
            )
        self._losses = make_losses(self.losses) or (SoftTargets(form=self.form, scale_t2=self.scale_t2),)
        self._names = _names(self._losses)
        fixed = next((source.temperatures for source in self._sources if source.temperatures), None)
        if fixed and isinstance(self._heat, Scheduled):
            raise ConfigError(
                f"temperature cannot be scheduled: the cache keeps the rest of the classes at temperatures "
                f"{list(fixed)} alone"
            )
        recorded = [source.tokenizer for source in self._sources if isinstance(source, CacheSource)]
        self._classes = None if self.tokenizers is None else compare_tokenizers(self.tokenizers, recorded)
        self._teaching = Teaching(
            self._sources,
            self._losses,
            layers=self.layers,
            match=self.match,
            plans=(self.kept,) if isinstance(self.kept, Plan) else tuple(self.kept),
            example_inputs=self.example_inputs,
            same_tokens=self._classes is not None,
        )

    def install(self, student: Student) -> None:
        """Put teachers in eval mode, find the layers, bring projectors; refuse what does not go together."""
        self._teaching.install(student, self)

    def begin(self, progress: Progress) -> None:
        """Place the schedules on the steps of this run."""
        self._follow(progress)
        if self.student is not None:
            self._teaching.begin(self.student.model, progress)

    def after_step(self, progress: Progress) -> None:
        """Go on with the schedules and with teachers that learn."""
        self._follow(progress)
        if self.student is not None:
            self._teaching.after_step(self.student.model, progress)

    def remove(self) -> None:
        """Leave the teachers as they came."""
        self._teaching.remove()
        self._sums = {}

    def take_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keep columns that are for a teacher alone from the student."""
        return self._teaching.take_inputs(model, kwargs)

    def loss_term(self, call: StudentCall) -> LossTerm:
        """Return the soft term, which stands in for the share `alpha` of the hard loss."""
        shifted = shifts_labels(call.model)
        lesson = self._teaching.ask(call)
        values: dict[str, torch.Tensor] = {}
        for place, (name, loss) in enumerate(zip(self._names, self._losses, strict=True)):
            terms: list[torch.Tensor] = []
            for number, share in self._teaching.shares(place):
                if isinstance(loss, LogitLoss):
                    logits = lesson.answers[number].logits
                    term = self._compare_logits(loss, call.output, logits, call.labels, shifted)
                else:
                    term = lesson.compare(place, number, shifted=shifted)
                terms.append(share * term)
            values[name] = _sum(terms)
        soft, alpha = self._soft(values), value_at(self._alpha, self._progress)
        self._record(call.labels, shifted, kd_loss=soft, ce_loss=call.loss, **(values if self.losses else {}))
        return LossTerm(alpha * soft, replaces=alpha if self.hard_weight is None else 1.0 - self.hard_weight)

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
            CallbackError: the shapes do not fit, there are several teachers, or a loss compares features.

        Example:
            >>> distillation = Distillation(nn.Linear(2, 3), alpha=0.0)
            >>> student, teacher, labels = torch.zeros(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
            >>> round(float(distillation.loss(student, teacher, labels)), 4)  # ln 3
            1.0986
        """
        other = [type(loss).__name__ for loss in self._losses if not isinstance(loss, LogitLoss)]
        if other or len(self._sources) > 1:
            what = f"{other[0]} compares features" if other else "there are several teachers"
            raise CallbackError(f"loss(...) takes logits, but {what}: let the student return its loss, and attach")

        def logits(name: str) -> torch.Tensor:
            return outputs.field(teacher_output, name, "teacher")

        values = {
            name: self._compare_logits(loss, student_output, logits, labels, shift_labels)
            for name, loss in zip(self._names, self._losses, strict=True)
            if isinstance(loss, LogitLoss)
        }
        hard_terms: list[torch.Tensor] = []
        for name in self.logits:
            student = outputs.field(student_output, name, "student")
            shifted, targets = (student[..., :-1, :], labels[..., 1:]) if shift_labels else (student, labels)
            classes_last = shifted if shifted.shape[:-1] == targets.shape else shifted.movedim(1, -1)
            flat = classes_last.reshape(-1, classes_last.shape[-1])
            hard_terms.append(cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX))
        soft, hard = self._soft(values), torch.stack(hard_terms).mean()
        alpha = value_at(self._alpha, self._progress)
        self._record(labels, shift_labels, kd_loss=soft, ce_loss=hard, **(values if self.losses else {}))
        return (1.0 - alpha if self.hard_weight is None else self.hard_weight) * hard + alpha * soft

    def metrics(self) -> dict[str, float]:
        """Return means over the labels since the last call, and what is scheduled as it is now.

        ``kd_loss`` is the soft term before alpha, T^2 included; ``ce_loss`` the student's own; with `losses`, each by
        its name too, before its weight.
        """
        sums, self._sums = self._sums, {}
        count = self.metrics_weight = float(sums.pop("count", torch.tensor(0)))
        found = {name: float(total) / count for name, total in sums.items()} if count else {}
        for name, value in (("kd_alpha", self._alpha), ("kd_temperature", self._heat)):
            if isinstance(value, Scheduled):
                found[name] = value.at(self._progress)
        return found

    def _check(self, trainer: Any) -> None:
        super()._check(trainer)
        if self._teaching.hides_columns and trainer.args.remove_unused_columns:
            raise CallbackError(
                "a teacher has inputs of its own, but the Trainer drops the columns that the student does not name: "
                "set remove_unused_columns=False"
            )

    def _follow(self, progress: Progress) -> None:
        """Take note of the step; a schedule that cannot be placed in this run is refused now."""
        self._progress = progress
        for value in (self._alpha, self._heat, *(loss.weight for loss in self._losses)):
            value_at(value, progress)

    def _soft(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the losses."""
        weights = [value_at(loss.weight, self._progress) for loss in self._losses]
        return _sum([weight * value for weight, value in zip(weights, values.values(), strict=True)])

    def _compare_logits(
        self,
        loss: LogitLoss,
        student_output: Any,
        teacher_logits: Callable[[str], torch.Tensor | KeptLogits],
        labels: torch.Tensor | None,
        shifted: bool,
    ) -> torch.Tensor:
        """Return the mean of a loss over the named outputs."""
        terms: list[torch.Tensor] = []
        for name in self.logits:
            student, teacher = outputs.field(student_output, name, "student"), teacher_logits(name)
            if self._classes is not None and isinstance(teacher, torch.Tensor):
                student, teacher = student[..., : self._classes], teacher[..., : self._classes]
            temperature = value_at(self._heat, self._progress)
            found = Predictions.align(student, teacher, labels, shifted=shifted, temperature=temperature)
            terms.append(loss.term(found))
        return torch.stack(terms).mean() if len(terms) > 1 else terms[0]

    def _record(self, labels: torch.Tensor | None, shifted: bool, **values: torch.Tensor) -> None:
        """Add up for `metrics`, each forward by its number of labels; on the device, without waiting for it."""
        some = next(iter(values.values()))
        count = torch.ones_like(some) if labels is None else count_labels(labels, shifted=shifted).to(some)
        added = {name: torch.where(count > 0, value.detach() * count, 0.0) for name, value in values.items()}
        added["count"] = count.detach()
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in added.items()}


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).sum() if len(terms) > 1 else terms[0]


def _names(losses: Sequence[DistillationLoss]) -> list[str]:
    """Return a name in the logs for each loss: ``hint_loss``, and ``hint_2_loss`` for the second of its kind."""
    seen: dict[str, int] = {}
    names: list[str] = []
    for loss in losses:
        number = seen[loss.label] = seen.get(loss.label, 0) + 1
        names.append(f"{loss.label}{'' if number == 1 else f'_{number}'}_loss")
    return names
