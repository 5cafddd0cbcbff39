"""The losses of a distillation: small records of options, usable from a recipe, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import nn

from torchopt_passes.callbacks.distill.predictions import Predictions
from torchopt_passes.callbacks.distill.taps import Tap
from torchopt_passes.callbacks.scheduled import Scheduled, read_scheduled, values_of
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.losses import weighted_mean
from torchopt_passes.graph.record import Record, snake_case

if TYPE_CHECKING:
    from torchopt_passes.callbacks.distill.links import Link
    from torchopt_passes.callbacks.lifecycle import Lifecycle
    from torchopt_passes.callbacks.student import Student

__all__ = ["DistillationLoss", "FeatureLoss", "LogitLoss", "Match", "Rows", "loss_types", "make_losses"]

Match = Literal["even", "first", "last", "only_last"]
"""Which teacher layers a pattern's student layers learn from; see `match_layers`."""


class DistillationLoss(Record):
    """What a student is compared with its teacher by.

    Args:
        weight: of the term, a number or a `Scheduled` one.
        teacher: which of several teachers it listens to, from 0; None for all of them, by their weights.
    """

    weight: float | Scheduled = 1.0
    teacher: int | None = None

    @property
    def label(self) -> str:
        """Its name in logs and recipes."""
        return snake_case(type(self).__name__)

    def check(self) -> None:
        """Refuse a negative weight or teacher."""
        if min(values_of(self.weight)) < 0.0:
            raise ConfigError(f"{type(self).__name__}: weight must be >= 0, not {self.weight}")
        if self.teacher is not None and self.teacher < 0:
            raise ConfigError(f"{type(self).__name__}: teacher must be >= 0, not {self.teacher}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make a loss from its options by name; a mapping stands for a `Scheduled` number."""
        weight = {"weight": read_scheduled(data["weight"])} if "weight" in data else {}
        return super().from_dict(data | weight)


class LogitLoss(DistillationLoss):
    """A loss on the logits of both models."""

    def term(self, predictions: Predictions) -> torch.Tensor:
        """Return the loss, a scalar: a mean over the labels that count."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rows:
    """One feature of both models.

    Args:
        student: (B, P, C), float32 or wider, behind the projector where there is one.
        teacher: (B, P, C), with the student's channels where it was pruned from this teacher; without gradient.
        valid: bool (B, P): the positions that count, None for all.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    valid: torch.Tensor | None


class FeatureLoss(DistillationLoss):
    """A loss on what layers compute.

    The value of an example is a mean over its positions, those of padding left out where the model gets an
    ``attention_mask`` of that length; examples weigh by how many of their labels count. So micro-batches add up
    exactly.

    Args:
        layers: a layer of the student -> a layer of the teacher, by module path: ``{"layer2": "layer3"}``. With ``{i}``
            in both, every layer of that pattern: ``{"bert.encoder.layer.{i}": "bert.encoder.layer.{i}"}``. A tuple of
            paths stands for the same ones in both models. Empty for the layers of the `Distillation`.
        match: which teacher layer a pattern's student layer learns from; None for the rule of the `Distillation`.
        channel_dim: the dimension of the channels; None for 1 where there are four or more dimensions, and the last one
            where there are fewer.
    """

    same_width: ClassVar[bool] = True
    """Whether both features must have one width, by a projector if need be."""
    same_positions: ClassVar[bool] = True
    """Whether both features must have the same number of positions."""

    layers: dict[str, str] | tuple[str, ...] = field(default_factory=dict[str, str])
    match: Match | None = None
    channel_dim: int | None = None

    def taps(self, model: nn.Module, layer: str) -> tuple[Tap, ...]:
        """Return what to look at for a layer; its output."""
        return (Tap(layer),)

    def prepare(self, rows: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is compared of a feature, (B, P, C), and which of its positions count; all of it."""
        return rows, valid

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the loss of each example, (B,), on one pair of layers: one `Rows` for each of its taps."""
        raise NotImplementedError

    def installed(
        self, student: Student, callback: Lifecycle, teacher: nn.Module | None, links: Sequence[Sequence[Link]]
    ) -> None:
        """Check what the loss is about to train; called once, when its links are made."""

    def settle(self, student: nn.Module, teacher: nn.Module | None, links: Sequence[Sequence[Link]]) -> None:
        """Act after each optimizer step, and before the first."""

    def term(self, pairs: Sequence[tuple[Rows, ...]], counts: torch.Tensor | None) -> torch.Tensor:
        """Return the loss, a scalar: the mean over pairs of layers of the examples' mean.

        Args:
            pairs: in the order of the student's layers.
            counts: how many labels of each example count, (B,); None for one each.
        """
        return torch.stack([weighted_mean(self.values(rows), counts) for rows in pairs]).mean()


def loss_types() -> dict[str, type[DistillationLoss]]:
    """Return every loss by its name: the built-in ones, and subclasses that were defined."""
    found: dict[str, type[DistillationLoss]] = {}
    pending: list[type[DistillationLoss]] = [LogitLoss, FeatureLoss]
    while pending:
        for kind in pending.pop().__subclasses__():
            if not kind.__name__.startswith("_"):
                found.setdefault(snake_case(kind.__name__), kind)
            pending.append(kind)
    return dict(sorted(found.items()))


def make_losses(given: Any) -> tuple[DistillationLoss, ...]:
    """Return losses for what a user gives: objects, or recipe data, ``"name"`` or ``{name: {option: value}}``.

    Raises:
        ConfigError: an unknown loss or option; lists the known ones.

    Example:
        >>> import torchopt_passes.callbacks
        >>> make_losses(["dkd", {"jsd": {"beta": 0.1}}])[1].beta
        0.1
    """
    if isinstance(given, str | Mapping | DistillationLoss) or not isinstance(given, Sequence):
        raise ConfigError(f"losses must be a list of losses such as [SoftTargets(), Hint(...)], not {given!r}")
    return tuple(_make_loss(item) for item in cast("Sequence[Any]", given))


def _make_loss(item: Any) -> DistillationLoss:
    if isinstance(item, DistillationLoss):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(cast("Mapping[Any, Any]", item)) != 1:
        raise ConfigError(f"a loss is an object, a name or {{name: {{option: value}}}}, not {item!r}")
    ((name, options),) = cast("Mapping[Any, Any]", item).items()
    types = loss_types()
    if name not in types:
        raise ConfigError(f"no loss is named {name!r}; known: {list(types)}")
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"the options of {name!r} must be {{option: value}}, not {options!r}")
    return types[name].from_dict({str(key): value for key, value in (options or {}).items()})
