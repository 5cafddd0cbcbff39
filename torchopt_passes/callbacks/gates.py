"""Gates: what callbacks that train gates on weights, or on units, have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.penalty import add_gradients
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.draws import seed_of

__all__ = ["GateModule", "Gates", "gate_key", "get_rank", "named_parameters"]


class GateModule(nn.Module):
    """Holds gates in the model; an ``nn.Sequential``, which calls all that it holds, passes through it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x


@dataclass(kw_only=True, eq=False)
class Gates(Callback):
    """Gates that multiply weights for the duration of each forward, and a penalty that closes them.

    In training mode the gates are noisy, in eval mode they are what they will be when training has ended; so an
    evaluation on the way shows what would come of it. The noise is drawn for each optimizer step, from the seed, the
    completed step and the name of what is gated: it is the same in all micro-batches, on all ranks, and in a resumed
    run. The penalty's gradient is added once before each optimizer step (see `Penalty`). Towards the end the gates are
    held: statistics of batch norms are otherwise those of a noisy model, which is not the one that remains.

    The gates are parameters of the model while it is trained (``torchopt_<name>``), without weight decay: they are in
    checkpoints, and gone in the end.

    Args:
        lr: learning rate of the gates; None for that of the model. Gates want a larger one than most models.
        seed: of the noise.
        settle: from when on the gates are held, without noise and penalty, as a share of training (float), completed
            steps (int) or `Epochs`: weights and batch-norm statistics adapt to what will remain. None for never.
    """

    module_name: ClassVar[str] = "gates"
    """Name of the gates in the model, after ``torchopt_``."""

    lr: float | None = 0.05
    seed: int = 0
    settle: When | None = 0.8

    _settle_at: int | None = field(default=None, init=False, repr=False)
    _module: nn.Module | None = field(default=None, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)
    _still: tuple[tuple[int, ...], list[torch.Tensor]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"lr must be > 0, or None for that of the model, not {self.lr}")
        if self.settle is not None:
            check_when(self.settle, "settle")

    @abstractmethod
    def penalty(self) -> torch.Tensor:
        """Return the penalty as the gates are now: a scalar with a gradient."""

    @abstractmethod
    def _noisy(self) -> Mapping[str, torch.Tensor]:
        """Return the weights with the noisy gates of this step."""

    @abstractmethod
    def _multiplied(self, gates: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the weights with given gates."""

    @abstractmethod
    def _make_gates_at_test(self) -> list[torch.Tensor]:
        """Return the gates without noise, closed ones exactly 0."""

    @torch.no_grad()
    def gates_at_test(self) -> list[torch.Tensor]:
        """Return the gates without noise, as an evaluation after this step has them; closed ones are exactly 0."""
        key = (self._step, *(parameter._version for parameter in self._parameters()))
        if self._still is None or self._still[0] != key:
            self._still = key, self._make_gates_at_test()
        return self._still[1]

    @property
    def settled(self) -> bool:
        """Whether the gates are held by now."""
        return self._settle_at is not None and self._step >= self._settle_at

    def stand_ins(self, training: bool) -> Mapping[str, torch.Tensor]:
        """Return the gated weights."""
        if training and not self.settled:
            return self._noisy()
        gates = self.gates_at_test()
        if training:  # held gates take part without moving: DistributedDataParallel waits for their gradients
            nothing = torch.stack([0.0 * parameter.sum() for parameter in self._parameters()]).sum()
            gates = [gate + nothing.to(gate.device) for gate in gates]
        return self._multiplied(gates)

    def before_step(self, progress: Progress) -> None:
        """Add the gradient of the penalty to those of the gates; keep held ones where they are."""
        if self.settled:
            for parameter in self._parameters():
                parameter.grad = None  # not zero, with which momentum would move them on
            return
        with torch.enable_grad():
            add_gradients(self.penalty(), list(self._parameters()))

    def begin(self, progress: Progress) -> None:
        """Draw for the first step."""
        self._step = progress.step
        self._settle_at = None if self.settle is None else progress.steps(self.settle)

    def after_step(self, progress: Progress) -> None:
        """Draw for the next step."""
        self._step = progress.step
        if self.student is not None:
            self.student.lift()

    def remove(self) -> None:
        """Let the gates go; the student drops them."""
        self._module = self._still = self._settle_at = None

    def _bring(self, student: Student, module: nn.Module) -> None:
        """Make the gates part of the model."""
        options = {"weight_decay": 0.0} | ({"lr": self.lr} if self.lr is not None else {})
        module.optimizer_options = options  # pyright: ignore[reportArgumentType]
        student.own(self.module_name, module, self)
        self._module = module

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters() if self._module is not None else iter(())

    def _seed(self, name: str) -> int:
        """Return the seed of this step's noise for what is gated under a name."""
        return seed_of(self.seed, self._step, name)


def named_parameters(first: Mapping[str, torch.Tensor]) -> nn.ParameterDict:
    """Return parameters under the names of what they gate (`gate_key`); their order is not that of `first`."""
    return nn.ParameterDict({gate_key(name): nn.Parameter(value) for name, value in first.items()})


def gate_key(name: str) -> str:
    """Return the key of a weight's or a group's gates: its name, with ``-`` for dots, which a key cannot have."""
    return name.replace(".", "-")


def get_rank() -> int:
    """Return the number of this process among those that train together; 0 for one alone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
