"""Hard concrete gates: numbers in [0, 1] that are exactly 0 or 1 with a probability that gradients can move.

A gate is open (not exactly 0) with probability p(log_alpha); the expected number of open gates, the L0 norm of what
they multiply, is a sum of such probabilities. Defaults are the paper's: beta = 2/3, gamma = -0.1, zeta = 1.1.
"""

from __future__ import annotations

import math

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["check_stretch", "closing_point", "gate_at_test", "log_alpha_of", "open_probability", "sample_gate"]


def check_stretch(beta: float, gamma: float, zeta: float) -> None:
    """Refuse a temperature or a stretch with which no gate would ever be exactly 0 or 1.

    Raises:
        ConfigError: names the option.
    """
    if not beta > 0:
        raise ConfigError(f"the temperature beta of hard concrete gates must be > 0, not {beta}")
    if not gamma < 0 or not zeta > 1:
        raise ConfigError(f"hard concrete gates need gamma < 0 and zeta > 1, not gamma={gamma}, zeta={zeta}")


def sample_gate(
    log_alpha: torch.Tensor, uniform: torch.Tensor, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
) -> torch.Tensor:
    """Return gates for given noise; their gradient reaches `log_alpha` where they are neither 0 nor 1.

    Args:
        log_alpha: location of each gate, any shape.
        uniform: noise in (0, 1), of that shape.
        beta: temperature, > 0.
        gamma: < 0, how far the concrete distribution is stretched below 0.
        zeta: > 1, how far above 1.

    Returns:
        In [0, 1].

    Math:
        s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = min(1, max(0, s (zeta - gamma) + gamma)).

    Source:
        Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", equations 10 and 11.

    Example:
        >>> sample_gate(torch.tensor([0.0, -9.0, 9.0]), torch.full((3,), 0.5))
        tensor([0.5000, 0.0000, 1.0000])
    """
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / beta)
    return (s * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def open_probability(
    log_alpha: torch.Tensor, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
) -> torch.Tensor:
    """Return the probability that each gate is not exactly 0; the sum is the expected L0 norm.

    Args:
        log_alpha: location of each gate, any shape.
        beta: temperature, > 0.
        gamma: < 0.
        zeta: > 1.

    Math:
        sigmoid(log_alpha - beta log(-gamma / zeta)).

    Source:
        Louizos et al. 2018, equation 12.

    Example:
        >>> round(float(open_probability(torch.tensor(0.0))), 4)
        0.8318
    """
    return torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta))


def gate_at_test(log_alpha: torch.Tensor, gamma: float = -0.1, zeta: float = 1.1) -> torch.Tensor:
    """Return the gates without noise, as they are when the model is used.

    Args:
        log_alpha: location of each gate, any shape.
        gamma: < 0.
        zeta: > 1.

    Returns:
        In [0, 1].

    Math:
        min(1, max(0, sigmoid(log_alpha) (zeta - gamma) + gamma)).

    Source:
        Louizos et al. 2018, equation 13.

    Example:
        >>> gate_at_test(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(log_alpha) * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def closing_point(gamma: float = -0.1, zeta: float = 1.1) -> float:
    """Return the largest log_alpha at which `gate_at_test` is 0.

    Math:
        log(-gamma / zeta), where sigmoid(log_alpha) (zeta - gamma) + gamma = 0.

    Example:
        >>> round(closing_point(), 4)
        -2.3979
    """
    return math.log(-gamma / zeta)


def log_alpha_of(closed: float) -> float:
    """Return the log_alpha of a concrete variable that is below 1/2 with the given probability.

    Args:
        closed: in (0, 1); the paper's initial dropout rate.

    Math:
        log(1 - c) - log c.

    Example:
        >>> log_alpha_of(0.5)
        0.0
    """
    if not 0.0 < closed < 1.0:
        raise ConfigError(f"the initial rate of closed gates must be in (0, 1), not {closed}")
    return math.log(1.0 - closed) - math.log(closed)
