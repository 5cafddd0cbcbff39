"""AddEarlyExits: easy samples need not go through the whole network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.distill.taps import Tap, Taps
from torchopt_passes.callbacks.early_exit_model import EarlyExitModel
from torchopt_passes.callbacks.exit_places import ExitHead, Place, choose_places
from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.callbacks.lifecycle import LossTerm
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.callbacks.unit_removal import inputs_of
from torchopt_passes.errors import CallbackError, ConfigError

__all__ = ["AddEarlyExits"]


class _Exits(nn.Module):
    """The heads; an ``nn.Sequential``, which calls all that it holds, passes through it."""

    def __init__(self, heads: list[ExitHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(kw_only=True, eq=False)
class AddEarlyExits(Callback):
    """Train classifiers on layers inside a classifier, so that it can stop where it is sure.

    Each exit is a linear head on the mean over positions of what a module returns; it learns from the labels alone,
    with the rest of the model. The heads are part of the model while it is trained (``torchopt_exits``). When training
    ends the model is as it came, only trained, and `model` is the model with its exits, for inference: see
    `EarlyExitModel`.

    Args:
        at: paths of the modules that exits branch off, in any order; empty for
        count: exits that divide the multiply-accumulates of the model most evenly.
        weights: of the losses of the exits, in the order of the model, each > 0, their sum below 1; None shares 0.5
            evenly. The model's own loss has the rest.
        threshold: confidence that a sample leaves with, at least; it can be changed later, ``exits.model.threshold``.
        logits: name of the model's output.
        seed: of the heads' first weights.
        example_inputs: a batch, ``(args, kwargs)`` or in another form of a call: how the model is called.

    Math:
        L = (1 - sum_i w_i) L_model + sum_i w_i CE(y, head_i(h_i)), means over the labels that are not -100; at
        inference the first exit i with max softmax(head_i(h_i)) >= threshold answers.

    Source:
        Teerapittayanon et al. 2016, "BranchyNet", section 2; the weights as in Distiller's early exit; confidence: Kaya
        et al. 2019, "Shallow-Deep Networks", section 4.1.

    Raises:
        ConfigError: the model is no classifier of whole samples, or a module cannot carry an exit.

    Example:
        ```python
        exits = top.AddEarlyExits(count=2, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[exits]).train()
        Trainer(exits.model, args, eval_dataset=test).evaluate()
        exits.model.average_depth                                              # 0.46: less than half of the work
        ```
    """

    changes_loss: ClassVar[bool] = True

    at: tuple[str, ...] = ()
    count: int = 2
    weights: tuple[float, ...] | None = None
    threshold: float = 0.9
    logits: str = "logits"
    seed: int = 0
    example_inputs: Any = None

    model: EarlyExitModel | None = field(default=None, init=False, repr=False)
    """The model with its exits; made when training has ended."""
    places: tuple[Place, ...] = field(default=(), init=False, repr=False)
    """Where the exits branch off; filled when the callback is installed."""
    _module: _Exits | None = field(default=None, init=False, repr=False)
    _taps: Taps | None = field(default=None, init=False, repr=False)
    _sums: list[torch.Tensor] = field(default_factory=list[torch.Tensor], init=False, repr=False)
    _calls: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong for any model."""
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, not {self.count}")
        if len(set(self.at)) != len(self.at):
            raise ConfigError(f"at names a module twice: {list(self.at)}")
        if not 0.0 < self.threshold <= 1.0:
            raise ConfigError(f"threshold must be in (0, 1], not {self.threshold}")
        number = len(self.at) or self.count
        if self.weights is not None:
            if len(self.weights) != number:
                raise ConfigError(f"weights has {len(self.weights)} numbers for {number} exits")
            if not all(weight > 0 for weight in self.weights) or not sum(self.weights) < 1.0:
                raise ConfigError(f"weights must be > 0, their sum below 1, not {list(self.weights)}")

    def install(self, student: Student) -> None:
        """Find the places, and bring the heads."""
        inputs = inputs_of(student.model, self.example_inputs)
        with student.aside():
            self.places, classes = choose_places(student.model, self.at, self.count, inputs, self.logits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._module = _Exits([ExitHead(place.width, classes) for place in self.places])
        student.own("exits", self._module, self)
        self._taps = Taps(student.model, [Tap(place.path) for place in self.places], "student")
        self._sums, self._calls, self.model = [], 0, None

    def take_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Record what the layers compute in a training forward."""
        if model.training and self._taps is not None:
            self._taps.open()
        return kwargs

    def loss_term(self, call: StudentCall) -> LossTerm:
        """Return the weighted losses of the exits, which stand in for their share of the model's loss."""
        if self._taps is None or self._module is None:
            raise CallbackError("AddEarlyExits is not installed")
        if call.labels is None:
            raise CallbackError("AddEarlyExits needs the labels in the forward of the model: pass labels=")
        features, mask = self._taps.take(), call.kwargs.get("attention_mask")
        losses: list[torch.Tensor] = []
        for place, head in zip(self.places, self._module.heads, strict=True):
            logits: torch.Tensor = head(features[Tap(place.path)], mask)
            if logits.shape[:1] != call.labels.shape:
                raise CallbackError(f"exits need one class label a sample, not labels of {tuple(call.labels.shape)}")
            total = cross_entropy(logits.float(), call.labels, ignore_index=IGNORE_INDEX, reduction="sum")
            losses.append(total / call.labels.ne(IGNORE_INDEX).sum().clamp(min=1))
        self._sums = [s + loss.detach() for s, loss in zip(self._sums or [0.0] * len(losses), losses, strict=True)]
        self._calls += 1
        weights = self.weights or (0.5 / len(losses),) * len(losses)
        value = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
        return LossTerm(value, replaces=sum(weights))

    def metrics(self) -> dict[str, float]:
        """Return ``exit_<number>_loss`` of each exit: means over the forwards since the last call."""
        sums, calls, self._sums, self._calls = self._sums, self._calls, [], 0
        return {f"exit_{number}_loss": float(total) / calls for number, total in enumerate(sums)} if calls else {}

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make the model with its exits."""
        if self.student is not None and self._module is not None:
            heads = list(self._module.heads)
            self.model = EarlyExitModel(
                self.student.model, self.places, heads, threshold=self.threshold, logits=self.logits
            )

    def remove(self) -> None:
        """Leave the layers alone; the student drops the heads."""
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._module = None
        self._sums, self._calls = [], 0
