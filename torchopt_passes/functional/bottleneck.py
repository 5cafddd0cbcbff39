"""The variational information bottleneck on channels: Gaussian gates that pay for the information they let through."""

from __future__ import annotations

import torch

__all__ = ["bottleneck_bound", "noise_to_signal", "sample_bottleneck"]


def sample_bottleneck(mean: torch.Tensor, log_variance: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """Return multiplicative gates for given noise.

    Args:
        mean: mu of each unit, (units,).
        log_variance: log sigma^2, (units,).
        normal: standard normal noise, (units,) or (samples, units).

    Returns:
        Shape of `normal`; gradients reach `mean` and `log_variance`.

    Math:
        z = mu + sigma eps.

    Source:
        Dai et al. 2018, "Compressing Neural Networks using the Variational Information Bottleneck", equation 6.

    Example:
        >>> sample_bottleneck(torch.ones(2), torch.zeros(2), torch.tensor([0.5, -1.0]))
        tensor([1.5000, 0.0000])
    """
    return mean + torch.exp(0.5 * log_variance) * normal


def bottleneck_bound(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the bound on the information that each unit lets through.

    Args:
        mean: mu of each unit, (units,).
        log_variance: log sigma^2, (units,).

    Returns:
        (units,), in nats, >= 0: 0 for a unit whose mean is 0.

    Math:
        log(1 + mu^2 / sigma^2).

    Source:
        Dai et al. 2018, section 2.2 (the objective sums it over units, layer by layer).

    Example:
        >>> bottleneck_bound(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([0.0000, 0.6931])
    """
    return torch.log1p(mean.square() * torch.exp(-log_variance))


def noise_to_signal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return log alpha of each unit: above a threshold it carries noise, not signal, and can leave.

    Args:
        mean: mu of each unit, (units,).
        log_variance: log sigma^2, (units,).

    Returns:
        (units,); infinite for a unit whose mean is 0.

    Math:
        log(sigma^2 / mu^2).

    Source:
        Dai et al. 2018, section 3 (alpha = sigma^2 / mu^2; the reference code removes above log alpha = 0).

    Example:
        >>> noise_to_signal(torch.tensor([1.0, 0.0]), torch.tensor([-9.0, -9.0]))
        tensor([-9., inf])
    """
    return log_variance - mean.square().log()
