"""Links: a loss on features, the layers of both models that it compares, and what makes their features comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchopt_passes.callbacks.distill.base import FeatureLoss, Rows
from torchopt_passes.callbacks.distill.layers import match_layers
from torchopt_passes.callbacks.distill.taps import Tap, layer_names
from torchopt_passes.callbacks.distill.widths import channel_dim, check_width, kept_channels
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.feature_losses import positions_last, same_grid
from torchopt_passes.graph.plan import Plan

__all__ = ["Link", "Side", "Width", "make_links", "make_projector", "pair_taps"]

Width = Callable[[Tap], int | None]
"""How many channels a layer of a model has, None if unknown."""


@dataclass(frozen=True)
class Side:
    """One model's part in a link.

    Args:
        tap: what is looked at.
        width: how many channels it should have, None where nobody asked.
    """

    tap: Tap
    width: int | None


@dataclass(eq=False)
class Link:
    """One feature of a student beside one of a teacher.

    Args:
        loss: whose it is.
        student: the student's side.
        teacher: the teacher's side.
        kept: which of the teacher's channels the student has, int64; None for all.
        projector: from the student's width to that of the teacher, where they differ.
    """

    loss: FeatureLoss
    student: Side
    teacher: Side
    kept: torch.Tensor | None
    projector: nn.Linear | None

    def rows(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_tokens: torch.Tensor | None,
        teacher_tokens: torch.Tensor | None,
    ) -> Rows:
        """Return both features as the loss compares them.

        Args:
            student: what the student's layer computed.
            teacher: what the teacher's did.
            student_tokens: bool (B, T), which of the student's tokens are not padding; None for all.
            teacher_tokens: of the teacher, likewise.

        Raises:
            CallbackError: batches, positions or widths differ.
        """
        teacher = teacher.detach().to(student.device)
        ours, theirs = (channel_dim(feature.ndim, self.loss.channel_dim) for feature in (student, teacher))
        check_width(student, ours, self.student.width, self.student.tap, "student")
        check_width(teacher, theirs, self.teacher.width, self.teacher.tap, "teacher")
        if self.kept is not None:
            teacher = teacher.index_select(theirs, self.kept.to(teacher.device))
        if student.ndim == teacher.ndim == 4 and ours == theirs == 1:
            student, teacher = same_grid(student, teacher)
        small, valid = self._prepared(student, ours, student_tokens)
        large, _ = self._prepared(teacher, theirs, teacher_tokens)
        if self.projector is not None:
            small = self.projector(small.to(self.projector.weight.dtype))
        agreeing = 2 if self.loss.same_positions else 1
        if small.shape[:agreeing] != large.shape[:agreeing]:
            raise CallbackError(
                f"{self.loss.label}: {self.student.tap.path!r} of the student has {small.shape[0]} examples of "
                f"{small.shape[1]} positions, {self.teacher.tap.path!r} of the teacher {large.shape[0]} of "
                f'{large.shape[1]}: name layers that agree, or pool="mean" where the loss has it'
            )
        return Rows(small, large, valid)

    def _prepared(
        self, feature: torch.Tensor, dim: int, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = positions_last(feature, dim)
        fits = tokens is not None and tokens.shape == rows.shape[:2]
        return self.loss.prepare(rows, tokens if fits else None)


def pair_taps(
    loss: FeatureLoss, student: nn.Module, teacher: nn.Module, layers: Mapping[str, str] | Sequence[str], match: str
) -> list[list[tuple[Tap, Tap]]]:
    """Return, for each pair of layers of a loss, what to look at in the student and in the teacher.

    Args:
        loss: may name layers of its own.
        student: unwrapped.
        teacher: unwrapped.
        layers: for a loss that names none.
        match: for a loss that names no rule.

    Raises:
        ConfigError: no layers are named, or one does not exist.
    """
    layers = loss.layers or layers
    if not layers:
        raise ConfigError(
            f'{type(loss).__name__} compares layers: name them, layers={{"student.layer": "teacher.layer"}}, in the '
            "loss or in Distillation"
        )
    pairs = match_layers(layer_names(student), layer_names(teacher), layers, loss.match or match)
    return [list(zip(loss.taps(student, ours), loss.taps(teacher, theirs), strict=True)) for ours, theirs in pairs]


def make_links(
    loss: FeatureLoss,
    pairs: Sequence[Sequence[tuple[Tap, Tap]]],
    student_width: Width,
    teacher: nn.Module,
    teacher_width: Width,
    plans: Sequence[Plan],
) -> list[list[Link]]:
    """Return the links of a loss, each with the teacher's channels that stayed or a projector where widths differ.

    Args:
        loss: whose they are.
        pairs: of `pair_taps`.
        student_width: of the student's layers.
        teacher: unwrapped.
        teacher_width: of the teacher's layers.
        plans: what made the student of this teacher; empty where it is another model.

    Raises:
        ConfigError: a width is needed and unknown, or the plans do not lead to the student's.
    """

    def link(ours: Tap, theirs: Tap) -> Link:
        if not (loss.same_width or plans):
            return Link(loss, Side(ours, None), Side(theirs, None), None, None)
        small, large = student_width(ours), teacher_width(theirs)
        if small is None or large is None:
            tap, who = (ours, "student") if small is None else (theirs, "teacher")
            raise ConfigError(
                f"{type(loss).__name__}: how many channels {tap.path!r} of the {who} has cannot be read off its parts: "
                "give Distillation(example_inputs=one batch), which is run once to see"
            )
        kept = kept_channels(plans, teacher, theirs, large)
        if kept is not None and len(kept) != small:
            raise ConfigError(
                f"kept: the plan leaves {len(kept)} of the {large} channels of {theirs.path!r}, but the student has "
                f"{small}: give the plans that made it of this teacher"
            )
        indices = None if kept is None else torch.tensor(kept)
        needed = loss.same_width and kept is None and small != large
        projector = make_projector(small, large) if needed else None
        return Link(loss, Side(ours, small), Side(theirs, large), indices, projector)

    return [[link(ours, theirs) for ours, theirs in pair] for pair in pairs]


def make_projector(student: int, teacher: int) -> nn.Linear:
    """Return a linear map from the student's width to the teacher's, the same in every process."""
    projector = nn.Linear(student, teacher, device="meta").to_empty(device="cpu")
    nn.init.uniform_(projector.weight, -(student**-0.5), student**-0.5, torch.Generator().manual_seed(0))
    nn.init.zeros_(projector.bias)
    return projector
