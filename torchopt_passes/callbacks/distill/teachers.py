"""Teachers: what a distillation asks in each forward of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.distill.inputs import InputsOf, extra_columns, named_inputs, to_model, token_mask
from torchopt_passes.callbacks.distill.predictions import KeptLogits
from torchopt_passes.callbacks.distill.taps import Tap, Taps
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import unwrap
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.errors import CallbackError, ConfigError

__all__ = ["Answer", "ModelSource", "Source", "Teacher"]


@dataclass(frozen=True)
class Answer:
    """What a teacher says about one batch.

    Args:
        logits: name of an output -> its logits, or what a cache kept of them.
        features: what its layers computed.
        tokens: path of a layer -> its tokens that are not padding, bool (B, T), None for all.
    """

    logits: Callable[[str], torch.Tensor | KeptLogits]
    features: Mapping[Tap, torch.Tensor]
    tokens: Callable[[str], torch.Tensor | None]


class Source:
    """Where answers come from; a distillation has one for each teacher."""

    has_logits: ClassVar[bool] = True
    has_features: ClassVar[bool] = True
    own_layers: ClassVar[bool] = False
    """Whether its features are layers of the student."""

    weight: float = 1.0
    temperatures: tuple[float, ...] = ()
    """The temperatures that its logits serve; empty for all."""

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers are named, unwrapped; None where there is none."""
        return None

    @property
    def hides(self) -> Callable[[nn.Module, Mapping[str, Any]], Iterable[str]] | None:
        """Which columns of a batch are for the teacher alone: they do not reach the student."""
        return None

    def install(self, student: nn.Module) -> None:
        """Get ready."""

    def brings(self) -> nn.Module | None:
        """Return what must be in the student's state_dict, for a run to resume."""
        return None

    def tap(self, taps: Iterable[Tap]) -> None:
        """Note which layers are asked for."""

    def begin(self, student: nn.Module, progress: Progress) -> None:
        """Training begins, or goes on: the student has its weights."""

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        """An optimizer step is done."""

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        """Return the answer for a batch.

        Args:
            call: the student's forward.
            batch: the columns that did not reach the student.
            own: features of the student.
        """
        raise NotImplementedError

    def remove(self) -> None:
        """Leave everything as it came."""


@dataclass(eq=False)
class Teacher:
    """A teacher that is not simply a model on the student's inputs and device.

    Args:
        model: any module: in half precision, quantized, compiled, a captured graph.
        weight: relative to the other teachers.
        inputs: where it does not take the student's inputs: its argument -> a column of the batch,
            ``{"pixel_values": "image"}``, or a function from the batch (a mapping) to its keyword arguments. Columns
            that the student's forward does not name are kept from it. In the Trainer set
            ``remove_unused_columns=False``.
        device: where it stays; None to move it to the student's device when it is first used. A model with a
            ``hf_device_map`` stays where it is.

    Example:
        >>> Teacher(nn.Linear(2, 2), weight=0.3).weight
        0.3
    """

    model: nn.Module = field(repr=False)
    _: KW_ONLY
    weight: float = 1.0
    inputs: InputsOf | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no teacher."""
        if not isinstance(self.model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"teacher must be a torch.nn.Module, not {type(self.model).__name__}")
        if not self.weight > 0.0:
            raise ConfigError(f"the weight of a teacher must be positive, not {self.weight}")


class ModelSource(Source):
    """Runs a model, in eval mode and without gradients."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.weight = teacher, teacher.weight
        self._was_training: list[nn.Module] = []
        self._taps: Taps | None = None

    @property
    def model(self) -> nn.Module:
        """The teacher, unwrapped."""
        return unwrap(self.teacher.model)

    @property
    def hides(self) -> Callable[[nn.Module, Mapping[str, Any]], Iterable[str]] | None:
        """The columns that the student does not name, where the teacher has inputs of its own."""
        return None if self.teacher.inputs is None else extra_columns

    def install(self, student: nn.Module) -> None:
        """Put the teacher in eval mode; refuse one that is, or shares weights with, the student."""
        weights = {id(parameter) for parameter in student.parameters()}
        shared = next((fqn for fqn, p in self.model.named_parameters() if id(p) in weights), None)
        if shared is not None:
            raise CallbackError(
                f"teacher and student share the weight {shared}: give a copy, copy.deepcopy(model), or a self-teacher "
                "such as InitialWeights()"
            )
        self._was_training = [module for module in self.teacher.model.modules() if module.training]
        self.teacher.model.eval()

    def tap(self, taps: Iterable[Tap]) -> None:
        """Look at the teacher's layers."""
        self._taps = Taps(self.model, taps, "teacher")

    def remove(self) -> None:
        """Leave the teacher as it came."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        for module in self._was_training:
            module.training = True
        self._was_training = []

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        """Run the teacher on the batch."""
        args, kwargs = self._inputs(call, batch)
        device = self._device(call.loss.device)
        args, kwargs = to_model((args, kwargs), device, _dtype(self.model))
        if self._taps is not None:
            self._taps.open()
        with torch.no_grad():
            output = self.run(args, kwargs)
        features = self._taps.take() if self._taps is not None else {}
        return Answer(
            partial(outputs.field, output, who="teacher"), features, partial(token_mask, self.model, args, kwargs)
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the teacher."""
        try:
            return self.teacher.model(*args, **kwargs)
        except TypeError as error:
            raise CallbackError(
                f"the teacher {type(self.model).__name__} does not take the student's inputs ({error}): give it its "
                "own, Teacher(model, inputs={argument: column}), or wrap it in a module whose forward does"
            ) from error

    def _inputs(self, call: StudentCall, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wanted = self.teacher.inputs
        if wanted is None:
            takes_labels = outputs.accepts(self.model, "labels")
            return call.args, {k: v for k, v in call.kwargs.items() if takes_labels or k != "labels"}
        columns = named_inputs(call.model, call.args, call.kwargs) | dict(batch)
        if not isinstance(wanted, Mapping):
            return (), dict(wanted(columns))
        missing = sorted(set(wanted.values()) - set(columns))
        if missing:
            raise CallbackError(
                f"Teacher.inputs names {missing}, but the batch has {sorted(columns)} (in the Trainer, set "
                "remove_unused_columns=False)"
            )
        return (), {argument: columns[column] for argument, column in wanted.items()}

    def _device(self, student: torch.device) -> torch.device | None:
        """Return where the inputs go; the teacher is there, or put there."""
        if hasattr(self.model, "hf_device_map"):  # in parts on several devices, its hooks move the inputs
            return None
        device = torch.device(self.teacher.device) if self.teacher.device is not None else student
        if any(tensor.device != device for tensor in self.model.parameters()):
            self.teacher.model.to(device)
        return device


def _dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that a model computes in, None where its parameters have several."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None
