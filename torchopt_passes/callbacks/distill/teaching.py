"""Teaching: the teachers of one distillation at work on one student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torchopt_passes.callbacks.distill.base import DistillationLoss, FeatureLoss, LogitLoss, Rows
from torchopt_passes.callbacks.distill.inputs import token_mask
from torchopt_passes.callbacks.distill.links import Link, make_links, pair_taps
from torchopt_passes.callbacks.distill.taps import Tap, Taps
from torchopt_passes.callbacks.distill.teachers import Answer, ModelSource, Source
from torchopt_passes.callbacks.distill.vocabulary import check_classes, check_tokens
from torchopt_passes.callbacks.distill.widths import channel_dim, read_width
from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.callbacks.lifecycle import Lifecycle, Progress
from torchopt_passes.callbacks.owned import OWNED
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.verify import in_eval_mode

__all__ = ["Lesson", "Teaching", "label_counts"]

_Pairs = list[list[tuple[Tap, Tap]]]


class Teaching:
    """Teachers, the losses that listen to them, and the layers of both models that these compare.

    Args:
        sources: the teachers.
        losses: what compares.
        layers: for losses on features that name none.
        match: for losses on features that name no rule.
        plans: what made the student of its teacher, if anything did.
        example_inputs: one batch, to measure the widths of layers; None to read them off the models.
        same_tokens: whether the tokenizers were compared.

    Raises:
        ConfigError: a loss listens to no teacher.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        losses: Sequence[DistillationLoss],
        *,
        layers: Mapping[str, str] | Sequence[str],
        match: str,
        plans: Sequence[Plan],
        example_inputs: Any,
        same_tokens: bool,
    ) -> None:
        self._sources, self._losses = tuple(sources), tuple(losses)
        self._layers, self._match, self._plans = layers, match, tuple(plans)
        self._example, self._same_tokens = example_inputs, same_tokens
        self._shares = [_shares(loss, self._sources) for loss in self._losses]
        self._links: dict[tuple[int, int], list[list[Link]]] = {}
        self._own: Taps | None = None
        self._batch: dict[str, Any] = {}

    def install(self, student: Student, callback: Lifecycle) -> None:
        """Find the layers, make projectors, bring what a resumed run needs; refuse what does not go together."""
        model = student.model
        for source in self._sources:
            source.install(model)
            self._check(model, source)
        pairs = self._find_layers(model)
        self._make_taps(model, pairs)
        measured = None if self._example is None else self._measure(student)
        brought = nn.Module()
        projectors = nn.ModuleList()
        for (place, number), found in pairs.items():
            loss, source = self._losses[place], self._sources[number]
            if isinstance(loss, FeatureLoss) and source.model is not None:
                links = make_links(
                    loss,
                    found,
                    partial(_width, model, loss, None if measured is None else measured[-1]),
                    source.model,
                    partial(_width, source.model, loss, None if measured is None else measured[number]),
                    self._plans,
                )
                projectors.extend(link.projector for pair in links for link in pair if link.projector is not None)
                self._links[place, number] = links
        if len(projectors):
            brought.add_module("projectors", projectors)
        for number, source in enumerate(self._sources):
            state = source.brings()
            if state is not None:
                brought.add_module(f"teacher_{number}", state)
        if len(list(brought.children())):
            student.own(_free_name(model), brought, callback)
        for loss, source, links in self._linked():
            loss.installed(student, callback, source.model, links)

    def begin(self, model: nn.Module, progress: Progress) -> None:
        """Training begins, or goes on: the student has its weights."""
        for source in self._sources:
            source.begin(model, progress)
        self._settle(model)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        """An optimizer step is done."""
        for source in self._sources:
            source.after_step(model, progress)
        self._settle(model)

    def remove(self) -> None:
        """Leave all models as they came."""
        if self._own is not None:
            self._own.remove()
            self._own = None
        for source in self._sources:
            source.remove()
        self._links, self._batch = {}, {}

    @property
    def hides_columns(self) -> bool:
        """Whether batches have columns that are for a teacher alone."""
        return any(source.hides is not None for source in self._sources)

    def take_inputs(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keep what is for the teachers from the student, and begin to record its layers."""
        hidden: set[str] = set()
        for source in self._sources:
            if source.hides is not None:
                hidden.update(source.hides(model, kwargs))
        self._batch = {name: kwargs[name] for name in hidden if name in kwargs} if model.training else {}
        if self._own is not None and model.training:
            self._own.open()
        return {name: value for name, value in kwargs.items() if name not in hidden} if hidden else kwargs

    def ask(self, call: StudentCall) -> Lesson:
        """Return what the teachers say about a forward of the student, beside what it computed."""
        own = self._own.take() if self._own is not None else {}
        answers = [source.ask(call, self._batch, own) for source in self._sources]
        return Lesson(self, call, own, answers)

    def shares(self, place: int) -> list[tuple[int, float]]:
        """Return to which teachers a loss listens, by number, and how much; the shares add up to 1."""
        return self._shares[place]

    def linked(self, place: int, number: int) -> tuple[FeatureLoss, list[list[Link]]]:
        """Return a loss and its links with a teacher."""
        loss = self._losses[place]
        if not isinstance(loss, FeatureLoss):
            raise CallbackError(f"{type(loss).__name__} compares no features")
        return loss, self._links[place, number]

    def _linked(self) -> list[tuple[FeatureLoss, Source, list[list[Link]]]]:
        return [
            (loss, self._sources[number], links)
            for (place, number), links in self._links.items()
            if isinstance(loss := self._losses[place], FeatureLoss)
        ]

    def _settle(self, model: nn.Module) -> None:
        for loss, source, links in self._linked():
            loss.settle(model, source.model, links)

    def _check(self, model: nn.Module, source: Source) -> None:
        if not isinstance(source, ModelSource):
            return
        if source.hides is None and not self._same_tokens:
            check_tokens(model, source.model)
        if any(isinstance(loss, LogitLoss) for loss in self._losses):
            check_classes(model, source.model)

    def _find_layers(self, model: nn.Module) -> dict[tuple[int, int], _Pairs]:
        found: dict[tuple[int, int], _Pairs] = {}
        for place, loss in enumerate(self._losses):
            for number, _ in self._shares[place]:
                teacher = self._sources[number].model
                if isinstance(loss, FeatureLoss) and teacher is not None:
                    found[place, number] = pair_taps(loss, model, teacher, self._layers, self._match)
        return found

    def _make_taps(self, model: nn.Module, pairs: Mapping[tuple[int, int], _Pairs]) -> None:
        own: list[Tap] = []
        for number, source in enumerate(self._sources):
            mine = [pair for (_, other), found in pairs.items() if other == number for part in found for pair in part]
            own += [ours for ours, _ in mine]
            theirs = [tap for _, tap in mine]
            if source.own_layers:
                own += theirs
            elif theirs:
                source.tap(theirs)
        self._own = Taps(model, own, "student") if own else None

    def _measure(self, student: Student) -> list[dict[Tap, torch.Size]]:
        """Run the example once; return the shapes of the layers of each teacher, and of the student last."""
        model = student.model
        args, kwargs = as_call(self._example)
        with student.aside(), in_eval_mode(model):
            kwargs = self.take_inputs(model, dict(kwargs))
            if self._own is not None:
                self._own.open()
            output = model(*args, **kwargs)
            where = next((p.device for p in model.parameters()), torch.device("cpu"))
            lesson = self.ask(StudentCall(model, args, kwargs, None, output, torch.zeros((), device=where)))
        return [{tap: value.shape for tap, value in found.items()} for found in lesson.features()]


class Lesson:
    """One forward of the student beside its teachers' answers.

    Args:
        teaching: whose it is.
        call: the student's forward.
        own: what its layers computed.
        answers: one for each teacher.
    """

    def __init__(
        self, teaching: Teaching, call: StudentCall, own: Mapping[Tap, torch.Tensor], answers: Sequence[Answer]
    ) -> None:
        self._teaching, self._call, self._own, self.answers = teaching, call, own, tuple(answers)

    def features(self) -> list[Mapping[Tap, torch.Tensor]]:
        """Return the features of each teacher, and those of the student last."""
        return [*(answer.features for answer in self.answers), self._own]

    def compare(self, place: int, number: int, *, shifted: bool) -> torch.Tensor:
        """Return a loss on features with one teacher, a scalar.

        Args:
            place: of the loss among the losses.
            number: of the teacher.
            shifted: whether the student predicts the next token.
        """
        loss, links = self._teaching.linked(place, number)
        rows = [tuple(self._rows(link, self.answers[number]) for link in pair) for pair in links]
        examples = rows[0][0].student.shape[0]
        return loss.term(rows, label_counts(self._call.labels, shifted=shifted, examples=examples))

    def _rows(self, link: Link, answer: Answer) -> Rows:
        ours, theirs = link.student.tap, link.teacher.tap
        tokens = token_mask(self._call.model, self._call.args, self._call.kwargs, ours.path)
        return link.rows(self._own[ours], answer.features[theirs], tokens, answer.tokens(theirs.path))


def label_counts(labels: torch.Tensor | None, *, shifted: bool, examples: int) -> torch.Tensor | None:
    """Return how many labels of each example count, int64 (B,); None where labels do not tell."""
    if labels is None or labels.ndim == 0 or labels.shape[0] != examples:
        return None
    counted = labels[..., 1:] if shifted else labels
    return counted.ne(IGNORE_INDEX).reshape(examples, -1).sum(1)


def _shares(loss: DistillationLoss, sources: Sequence[Source]) -> list[tuple[int, float]]:
    name = type(loss).__name__
    able = [
        number
        for number, source in enumerate(sources)
        if (source.has_features if isinstance(loss, FeatureLoss) else source.has_logits)
        and loss.teacher in (None, number)
    ]
    if not able:
        needed = "features" if isinstance(loss, FeatureLoss) else "logits"
        which = "no teacher" if loss.teacher is None else f"no teacher {loss.teacher} among {len(sources)}"
        raise ConfigError(f"{name} compares {needed}, and there is {which} that has them")
    total = sum(sources[number].weight for number in able)
    return [(number, sources[number].weight / total) for number in able]


def _width(model: nn.Module, loss: FeatureLoss, measured: Mapping[Tap, torch.Size] | None, tap: Tap) -> int | None:
    if measured is None:
        return read_width(model, tap, loss.channel_dim)
    shape = measured[tap]
    return shape[channel_dim(len(shape), loss.channel_dim)]


def _free_name(model: nn.Module) -> str:
    """Return the name for what a distillation brings; a second one on the same student takes the next."""
    names = (f"distillation{'' if number == 1 else f'_{number}'}" for number in range(1, 1000))
    return next(name for name in names if not hasattr(model, f"{OWNED}{name}"))
