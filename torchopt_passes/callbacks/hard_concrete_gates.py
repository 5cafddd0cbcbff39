"""HardConcreteGates: gates that are exactly open or exactly closed, by a factor or to a given sparsity."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from torchopt_passes.callbacks.gates import GateModule, Gates, gate_key, named_parameters
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.draws import uniform
from torchopt_passes.functional.hard_concrete import (
    check_stretch,
    gate_at_test,
    log_alpha_of,
    open_probability,
    sample_gate,
)
from torchopt_passes.functional.schedules import Ramp, linear

__all__ = ["HardConcreteGates"]


class _Lagrangian(GateModule):
    """Gates by name, and the two multipliers."""

    def __init__(self, log_alphas: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.log_alpha = named_parameters(log_alphas)
        # with a quadratic term from the start the sparsity follows its target; with 0, as in FLOP, it swings around it
        self.multipliers = nn.Buffer(torch.tensor([0.0, 10.0]))


@dataclass(kw_only=True, eq=False)
class HardConcreteGates(Gates):
    """Hard concrete gates with an expected-L0 penalty, and a Lagrangian that brings the sparsity to a target.

    Args:
        strength: factor of the expected number of open weights, > 0; or
        sparsity: the share that is closed at the end, in (0, 1): exactly one of the two.
        start: with `sparsity`, when the target begins to rise from 0, as a share of training (float) or completed steps
            (int).
        end: when it is reached, likewise; what remains is for recovery.
        ascent: with `sparsity`, step size of the multipliers.
        closed: probability with which a gate's concrete variable is below 1/2 at first, in (0, 1). Up to 0.083 the
            gates are exactly open at first when there is no noise: the model begins as it came.
        beta: temperature of the gates, > 0.
        gamma: < 0, and
        zeta: > 1: the interval that the concrete distribution is stretched to.
    """

    strength: float | None = None
    sparsity: float | None = None
    start: When = 0.0
    end: When = 0.5
    ascent: float = 0.3
    closed: float = 0.05
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    _ramp: Ramp | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        if (self.strength is None) == (self.sparsity is None):
            raise ConfigError(f"{type(self).__name__} takes exactly one of strength= and sparsity=")
        if self.strength is not None and not self.strength > 0:
            raise ConfigError(f"strength must be > 0, not {self.strength}")
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be in (0, 1), not {self.sparsity}")
        if not self.ascent > 0:
            raise ConfigError(f"ascent must be > 0, not {self.ascent}")
        check_when(self.start, "start")
        check_when(self.end, "end")
        check_stretch(self.beta, self.gamma, self.zeta)
        log_alpha_of(self.closed)

    @abstractmethod
    def expected_sparsity(self) -> torch.Tensor:
        """Return the expected share that is closed, a scalar with a gradient."""

    @abstractmethod
    def _expected_norm(self) -> torch.Tensor:
        """Return the expected number of weights whose gate is open, a scalar with a gradient."""

    def begin(self, progress: Progress) -> None:
        """Place the target on the steps of this run."""
        super().begin(progress)
        if self.sparsity is not None:
            start, end = progress.steps(self.start), progress.steps(self.end)
            if progress.total_steps is not None and end > progress.total_steps:
                raise CallbackError(f"the target is reached at step {end}, but training ends at {progress.total_steps}")
            if self._settle_at is not None and self._settle_at < end:
                raise CallbackError(f"the gates are held from step {self._settle_at} on, before the target is reached")
            self._ramp = Ramp(initial=0.0, final=self.sparsity, start=start, end=end, shape=linear)

    @property
    def target(self) -> float:
        """The sparsity that the Lagrangian asks for now; 0 without one."""
        return self._ramp.at(self._step) if self._ramp is not None else 0.0

    def penalty(self) -> torch.Tensor:
        """Return the penalty as the gates are now."""
        if self.strength is not None:
            return self.strength * self._expected_norm()
        short = self.target - self.expected_sparsity()
        one, two = self._multipliers.to(short.device)
        return one * short + two * short.square()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Let the multipliers ascend where the gates have moved, and draw for the next step."""
        if self._ramp is not None and not self.settled and progress.stepped:
            short = self.target - self.expected_sparsity()
            self._multipliers.add_(self.ascent * torch.stack([short, short.square()]).to(self._multipliers))
        super().after_step(progress)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return ``expected_sparsity``, ``l0_penalty``, and with a Lagrangian ``target_sparsity``."""
        if self._module is None:
            return {}
        found = {"expected_sparsity": float(self.expected_sparsity()), "l0_penalty": float(self.penalty())}
        return found | ({"target_sparsity": self.target} if self._ramp is not None else {})

    def remove(self) -> None:
        """Let the gates go."""
        super().remove()
        self._ramp = None

    @property
    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """The names of what is gated, in order."""

    @property
    def _log_alphas(self) -> list[torch.Tensor]:
        """The gates, in the order of `_names`."""
        if not isinstance(self._module, _Lagrangian):
            return []
        return [self._module.log_alpha[gate_key(name)] for name in self._names]

    @property
    def _multipliers(self) -> torch.Tensor:
        if not isinstance(self._module, _Lagrangian):
            raise CallbackError(f"{type(self).__name__} is not installed")
        return self._module.multipliers

    def _make(self, shapes: Mapping[str, torch.Size]) -> nn.Module:
        """Return the gates, all alike at first."""
        first = log_alpha_of(self.closed)
        return _Lagrangian({name: torch.full(shape, first) for name, shape in shapes.items()})

    def _draw(self, log_alpha: torch.Tensor, name: str) -> torch.Tensor:
        """Return the noisy gates of this step."""
        noise = uniform(log_alpha.shape, self._seed(name), log_alpha.device)
        return sample_gate(log_alpha.float(), noise, self.beta, self.gamma, self.zeta)

    def _open(self, log_alpha: torch.Tensor) -> torch.Tensor:
        """Return the probabilities that gates are open."""
        return open_probability(log_alpha.float(), self.beta, self.gamma, self.zeta)

    def _at_test(self, log_alpha: torch.Tensor) -> torch.Tensor:
        """Return the gates without noise."""
        return gate_at_test(log_alpha.detach().float(), self.gamma, self.zeta)
