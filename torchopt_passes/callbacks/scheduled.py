"""Scheduled: an option that changes over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torchopt_passes.callbacks.lifecycle import Epochs, Progress, When, check_when
from torchopt_passes.functional.schedules import Ramp, Shape, named_shape
from torchopt_passes.graph.record import Record

__all__ = ["Scheduled", "read_scheduled", "value_at", "values_of"]


class Scheduled(Record):
    """A number that goes from `initial` to `final` while the model trains.

    It stands where an option takes one, and is a function of the completed step alone, so that a resumed run goes on
    with it exactly. In a recipe it is ``{initial: 0.9, final: 0.1}``.

    Args:
        initial: until `start`.
        final: from `end` on.
        start: a share of training (float), completed steps (int) or `Epochs`.
        end: likewise.
        shape: a name that `named_shape` knows, such as ``"linear"`` or ``"cosine"``, or a function from progress in
            [0, 1] to the share of the way in [0, 1].

    Example:
        >>> alpha = Scheduled(initial=0.9, final=0.1, end=0.5)
        >>> [round(alpha.at(Progress(step, 100)), 2) for step in (0, 25, 50, 99)]
        [0.9, 0.5, 0.1, 0.1]
    """

    initial: float
    final: float
    start: When = 0
    end: When = 1.0
    shape: str | Shape = "linear"

    def check(self) -> None:
        """Refuse moments and shapes that are none."""
        check_when(self.start, "start")
        check_when(self.end, "end")
        named_shape(self.shape, self.initial, self.final)

    def at(self, progress: Progress) -> float:
        """Return the value in the step that follows so many completed ones.

        Raises:
            CallbackError: a moment is a share of training, and its length is unknown.
            ConfigError: it ends before it starts.
        """
        start, end = progress.steps(self.start), progress.steps(self.end)
        shape = named_shape(self.shape, self.initial, self.final)
        ramp = Ramp(initial=self.initial, final=self.final, start=start, end=end, shape=shape)
        return ramp.at(progress.step)


def value_at(value: float | Scheduled, progress: Progress) -> float:
    """Return an option's value now, scheduled or not."""
    return value.at(progress) if isinstance(value, Scheduled) else value


def values_of(value: float | Scheduled) -> tuple[float, ...]:
    """Return the values that an option starts and ends with, to check their range."""
    return (value.initial, value.final) if isinstance(value, Scheduled) else (value,)


def read_scheduled(value: Any) -> Any:
    """Return a `Scheduled` for its fields as a mapping, as a recipe has them; anything else as it is.

    Raises:
        ConfigError: a field is wrong.

    Example:
        >>> read_scheduled({"initial": 1.0, "final": 0.0}), read_scheduled(0.5)
        (Scheduled(initial=1.0, final=0.0, start=0, end=1.0, shape='linear'), 0.5)
    """
    if not isinstance(value, Mapping):
        return value
    fields = {str(name): _read_moment(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    return Scheduled.from_dict(fields)


def _read_moment(value: Any) -> Any:
    epochs = isinstance(value, Mapping) and set(cast("Mapping[Any, Any]", value)) == {"epochs"}
    return Epochs(value["epochs"]) if epochs else value
