"""Statistical dependence between two sets of features of the same samples: HSIC, the Hilbert-Schmidt criterion."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["channel_dependence", "gaussian_kernel", "hsic", "normalized_hsic"]


def gaussian_kernel(features: torch.Tensor) -> torch.Tensor:
    """Return how alike each pair of samples is; the width is the median distance between two samples.

    Args:
        features: (..., n, d), n >= 2 samples.

    Returns:
        (..., n, n), in (0, 1]; all 1 where the samples are equal.

    Math:
        exp(-||x_i - x_j||^2 / (2 s^2)), s^2 the median of ||x_i - x_j||^2 over i < j.

    Source:
        Gretton et al. 2005, "Measuring Statistical Dependence with Hilbert-Schmidt Norms", section 3; the width as in
        Gretton et al. 2007, "A Kernel Statistical Test of Independence", section 4.

    Example:
        >>> gaussian_kernel(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    n = features.shape[-2]
    if n < 2:
        raise ConfigError(f"a kernel compares samples, but the batch has {n}")
    # the plain difference: matrix products lose the distances of samples that are nearly alike
    squares = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    rows, columns = torch.triu_indices(n, n, 1, device=features.device)
    width = squares[..., rows, columns].quantile(0.5, dim=-1)
    width = torch.where(width > 0, width, 1.0)
    return torch.exp(-squares / (2.0 * width[..., None, None]))


def hsic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the dependence that two kernels show: 0 for independent features, as n grows.

    Args:
        one: (..., n, n) kernel.
        other: (..., n, n) kernel of the same samples; broadcast.

    Returns:
        (...), >= 0.

    Math:
        tr(K H L H) / (n - 1)^2, H = I - 1/n.

    Source:
        Gretton et al. 2005, definition 2.

    Example:
        >>> kernel = gaussian_kernel(torch.tensor([[0.0], [1.0]]))
        >>> round(float(hsic(kernel, kernel)), 4)
        0.1548
    """
    n = one.shape[-1]
    return (_centered(one) * _centered(other)).sum((-2, -1)) / (n - 1) ** 2


def normalized_hsic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return HSIC as a share of what either kernel has with itself: comparable between features of any scale and size.

    Args:
        one: (..., n, n) kernel.
        other: (..., n, n) kernel of the same samples; broadcast.

    Returns:
        (...), in [0, 1]; 0 where a kernel is constant.

    Math:
        HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    Source:
        Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3, equation 4.

    Example:
        >>> kernel = gaussian_kernel(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
        >>> round(float(normalized_hsic(kernel, kernel)), 4)
        1.0
    """
    scale = (hsic(one, one) * hsic(other, other)).sqrt()
    return torch.where(scale > 0, hsic(one, other) / torch.where(scale > 0, scale, 1.0), 0.0)


def channel_dependence(values: torch.Tensor, dim: int, other: torch.Tensor) -> torch.Tensor:
    """Return the normalized HSIC between each channel and something else of the same samples, such as the output.

    Args:
        values: activations, samples first.
        dim: dimension of the channels.
        other: (n, n) kernel of the same samples.

    Returns:
        (channels,), float64, in [0, 1]: what is near 0 tells little about the output.

    Source:
        `normalized_hsic`; as a measure of layers in Ma et al. 2020, "The HSIC Bottleneck".

    Example:
        >>> x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> channel_dependence(x, 1, gaussian_kernel(x[:, :1])).argmax()
        tensor(0)
    """
    if values.ndim < 2 or dim % values.ndim == 0 or len(values) != len(other):
        raise ConfigError(f"activations of shape {tuple(values.shape)} are not {len(other)} samples with channels")
    channels = values.detach().to(torch.float64).movedim(dim, 0).reshape(values.shape[dim], len(values), -1)
    step = max(1, 2**22 // max(1, len(other) ** 2))
    parts = [normalized_hsic(gaussian_kernel(part), other.double()) for part in channels.split(step)]
    return torch.cat(parts)


def _centered(kernel: torch.Tensor) -> torch.Tensor:
    return kernel - kernel.mean(-1, keepdim=True) - kernel.mean(-2, keepdim=True) + kernel.mean((-2, -1), keepdim=True)
