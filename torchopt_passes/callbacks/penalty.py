"""Penalty: what callbacks that make some weights costly have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.record import snake_case

__all__ = ["Form", "Penalty", "add_gradients", "check_form", "learning_rates"]

Form = Literal["proximal", "gradient"]
"""How a penalty acts: by its proximal step after each optimizer step, or by its gradient before it."""


@dataclass(kw_only=True, eq=False)
class Penalty(Callback):
    """A penalty that depends on the weights alone, not on the data.

    Its gradient is added to the gradients once before each optimizer step, after accumulation, the mean over ranks and
    the Trainer's clipping. So it counts once for a step, whatever the number of micro-batches and of labels in them,
    and it works where the loop computes the loss by itself. The loss that the loop logs does not contain it; its value
    is in `metrics`.

    Args:
        strength: factor of the penalty, > 0.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a factor that rewards weights."""
        if not self.strength > 0:
            raise ConfigError(f"strength must be > 0, not {self.strength}")

    @abstractmethod
    def penalty(self) -> torch.Tensor:
        """Return the penalty as the weights are now, `strength` included: a scalar with a gradient."""

    @abstractmethod
    def _penalized(self) -> Sequence[torch.Tensor]:
        """Return the parameters that it depends on."""

    def before_step(self, progress: Progress) -> None:
        """Add the gradient of the penalty to the gradients of the step."""
        with torch.enable_grad():
            add_gradients(self.penalty(), self._penalized())

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the penalty as it is now, under the name of the callback: ``l1_penalty``, ``group_lasso``."""
        if self.student is None or not self._penalized():
            return {}
        return {snake_case(type(self).__name__): float(self.penalty())}


def add_gradients(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Add the gradient of a scalar to ``.grad`` of each parameter that it depends on."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def check_form(form: str) -> None:
    """Refuse a form that there is not.

    Raises:
        ConfigError: names the two.
    """
    if form not in ("proximal", "gradient"):
        raise ConfigError(f'form must be "proximal" or "gradient", not {form!r}')


def learning_rates(optimizer: torch.optim.Optimizer | None, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the learning rate that each weight has now, by the parameter group that holds it.

    Args:
        optimizer: that of the student.
        weights: fqn -> parameter.

    Raises:
        CallbackError: the optimizer does not hold a weight, or there is none.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    missing = next((fqn for fqn, weight in weights.items() if id(weight) not in rates), None)
    if missing is not None:
        raise CallbackError(
            f"a proximal step needs the learning rate of {missing}, which the optimizer does not train: leave it out "
            'with skip=, or take form="gradient"'
        )
    return {fqn: float(rates[id(weight)]) for fqn, weight in weights.items()}
