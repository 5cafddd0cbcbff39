"""Self-distillation: the student's own past, its running average, or its deeper layers as teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call

from torchopt_passes.callbacks.distill.inputs import token_mask
from torchopt_passes.callbacks.distill.taps import Tap
from torchopt_passes.callbacks.distill.teachers import Answer, ModelSource, Source, Teacher
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.owned import is_owned
from torchopt_passes.callbacks.sharded import is_sharded, whole
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.fingerprint import fingerprint_of
from torchopt_passes.graph.record import Record

__all__ = ["AveragedWeights", "DeeperLayers", "InitialWeights", "SelfTeacher", "source_of"]


class SelfTeacher(Record):
    """A teacher that is made of the student.

    Args:
        weight: relative to the other teachers.
    """

    weight: float = 1.0

    def check(self) -> None:
        """Refuse a weight that is not positive."""
        if not self.weight > 0.0:
            raise ConfigError(f"the weight of a teacher must be positive, not {self.weight}")


class InitialWeights(SelfTeacher):
    """The student as it was when training began: a frozen copy, in eval mode.

    What a fine-tuned or pruned model could do is not forgotten. Its checksum is in the student's state_dict while the
    callback is installed: a resumed run must begin with the same weights, before the checkpoint is loaded.

    Args:
        weight: relative to the other teachers.

    Source:
        Li and Hoiem 2016, "Learning without Forgetting".
    """


class AveragedWeights(SelfTeacher):
    """The exponential moving average of the student's weights, in eval mode: a teacher that is a little ahead.

    The average is in the student's state_dict while the callback is installed (float32), so that a run resumes; buffers
    are the student's own.

    Args:
        weight: relative to the other teachers.
        decay: 0 <= d < 1, for each optimizer step.

    Math:
        a <- d a + (1 - d) w after each optimizer step, beginning with the student's weights.

    Source:
        Tarvainen and Valpola 2017, "Mean teachers are better role models", equation 2.
    """

    decay: float = 0.999

    def check(self) -> None:
        """Refuse a decay outside of [0, 1)."""
        super().check()
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"AveragedWeights: decay must be in [0, 1), not {self.decay}")


class DeeperLayers(SelfTeacher):
    """The student's deeper layers teach its earlier ones, in the same forward: for losses on features alone.

    Both layers of a pair are the student's: ``Hint(layers={"layer2": "layer4"})``. Nothing flows back into the deeper
    one.

    Args:
        weight: relative to the other teachers.

    Source:
        Zhang et al. 2019, "Be Your Own Teacher", the loss of hints (its third).
    """


def source_of(teacher: SelfTeacher) -> Source:
    """Return what answers for a self-teacher."""
    if isinstance(teacher, InitialWeights):
        return _Initial(teacher.weight)
    if isinstance(teacher, AveragedWeights):
        return _Averaged(teacher)
    if isinstance(teacher, DeeperLayers):
        return _Deeper(teacher.weight)
    raise ConfigError(f"no self-teacher is made like {type(teacher).__name__}")


class _CopySource(Source):
    """Asks a copy of the student that is made when the callback is installed."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._runner: ModelSource | None = None

    @property
    def runner(self) -> ModelSource:
        """What runs the copy."""
        if self._runner is None:
            raise CallbackError("a self-teacher was asked before its callback was installed")
        return self._runner

    @property
    def model(self) -> nn.Module | None:
        return self.runner.model

    def tap(self, taps: Iterable[Tap]) -> None:
        self.runner.tap(taps)

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        return self.runner.ask(call, batch, own)

    def remove(self) -> None:
        if self._runner is not None:
            self._runner.remove()
        self._runner = None


def _copied(student: nn.Module) -> nn.Module:
    if any(map(is_sharded, student.parameters())):
        raise CallbackError(
            "a self-teacher is a copy of the student, whose weights are in parts on several ranks already: make the "
            "session first, Session(model, callbacks), then fully_shard, then session.bind(optimizer)"
        )
    return copy.deepcopy(student).requires_grad_(False)


class _Initial(_CopySource):
    def install(self, student: nn.Module) -> None:
        self._runner = ModelSource(Teacher(_copied(student)))
        self._runner.install(student)
        weights = [pair for pair in self._runner.model.named_parameters() if not is_owned(pair[0])]
        self._sum = torch.tensor(list(bytes.fromhex(fingerprint_of(weights))), dtype=torch.uint8)
        self._brought = nn.Module()
        self._brought.register_buffer("initial", self._sum.clone())

    def brings(self) -> nn.Module:
        return self._brought

    def begin(self, student: nn.Module, progress: Progress) -> None:
        if not torch.equal(self._brought.get_buffer("initial").cpu(), self._sum):
            raise CallbackError(
                "InitialWeights: the run that is resumed began with other weights: build the model with those, install "
                "the callback, then load the checkpoint"
            )


class _Averaged(_CopySource):
    def __init__(self, options: AveragedWeights) -> None:
        super().__init__(options.weight)
        self._decay = options.decay
        self._behind: bool | None = None

    def install(self, student: nn.Module) -> None:
        self._brought = nn.Module()
        self._names: dict[str, str] = {}
        for fqn, parameter in student.named_parameters():
            if not is_owned(fqn) and parameter.is_floating_point():
                self._names[fqn] = fqn.replace(".", "__")
                self._brought.register_buffer(self._names[fqn], parameter.detach().float().clone())
        self._brought.register_buffer("torchopt_behind", torch.zeros((), dtype=torch.bool))
        self._runner = _AveragedModel(_copied(student), self._averages)
        self._runner.install(student)

    def brings(self) -> nn.Module:
        return self._brought

    def begin(self, student: nn.Module, progress: Progress) -> None:
        self._behind = None  # as the checkpoint says, where there is one: its last step may have been a skipped one

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        if progress.stepped:
            self._note(True)

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        if self._behind is None:
            self._behind = bool(self._brought.get_buffer("torchopt_behind"))
        if self._behind:  # only now, when every callback is done with the weights of the step
            self._follow(call.model)
        self._take_buffers(call.model)
        return super().ask(call, batch, own)

    @torch.no_grad()
    def _follow(self, student: nn.Module) -> None:
        parameters = dict(student.named_parameters())
        for fqn, average in self._averages().items():
            average.lerp_(whole(parameters[fqn]).to(average.dtype), 1.0 - self._decay)
        self._note(False)

    def _note(self, behind: bool) -> None:
        """Note whether the weights have moved since the average followed them, in checkpoints too."""
        self._behind = behind
        self._brought.get_buffer("torchopt_behind").fill_(behind)

    def _averages(self) -> dict[str, torch.Tensor]:
        return {fqn: self._brought.get_buffer(name) for fqn, name in self._names.items()}

    @torch.no_grad()
    def _take_buffers(self, student: nn.Module) -> None:
        ours = dict(student.named_buffers())
        for fqn, buffer in self.runner.model.named_buffers():
            if fqn in ours:
                buffer.copy_(whole(ours[fqn]))


class _AveragedModel(ModelSource):
    """Runs a copy of the student with other weights in the place of its own."""

    def __init__(self, shell: nn.Module, averages: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__(Teacher(shell))
        self._averages = averages

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = dict(self.model.named_parameters())
        weights = {fqn: average.to(own[fqn].dtype) for fqn, average in self._averages().items()}
        return functional_call(self.model, weights, args, kwargs)


class _Deeper(Source):
    has_logits: ClassVar[bool] = False
    own_layers: ClassVar[bool] = True

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._student: nn.Module | None = None

    @property
    def model(self) -> nn.Module | None:
        return self._student

    def install(self, student: nn.Module) -> None:
        self._student = student

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        def nothing(name: str) -> torch.Tensor:
            raise CallbackError(f"DeeperLayers has no {name}: take losses on features")

        def tokens(path: str) -> torch.Tensor | None:
            return token_mask(call.model, call.args, call.kwargs, path)

        return Answer(nothing, own, tokens)

    def remove(self) -> None:
        self._student = None
