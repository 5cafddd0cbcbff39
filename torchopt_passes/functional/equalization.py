"""Scales and biases that are moved between layers so that both quantize better, pooled moments, channel splitting."""

from __future__ import annotations

import heapq

import torch

__all__ = [
    "absorbed_bias",
    "activation_scale",
    "carried_bias",
    "equalization_scale",
    "output_scale",
    "pool_moments",
    "smoothing_scale",
    "split_channels",
    "split_outliers",
]


def equalization_scale(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Return the scale of each channel between two layers with which both have the same range.

    Formula, with r1 the range of what makes a channel and r2 of what reads it:
        s = sqrt(r1 r2) / r2, so that r1 / s = r2 s = sqrt(r1 r2)
    A channel that is zero on one side keeps the scale 1.

    Args:
        made: r1, largest absolute weight that makes each channel, shape [C].
        read: r2, largest absolute weight that reads it, shape [C].

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", equation 11.

    Example:
        >>> equalization_scale(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]))
        tensor([2., 1.])
    """
    scale = torch.sqrt(made * read) / read
    return torch.where((made > 0) & (read > 0) & torch.isfinite(scale), scale, 1.0)


def absorbed_bias(beta: torch.Tensor, gamma: torch.Tensor, deviations: float = 3.0) -> torch.Tensor:
    """Return what can be taken off the bias of each channel in front of a ReLU, and added behind it.

    Formula, for values that are normal with the mean beta and the deviation gamma of their batch norm:
        c = max(0, beta - 3 |gamma|), so that relu(x - c) = relu(x) - c for all values above c: 99.865 % of them
    Where that is less than a millionth of beta it is 0.

    Args:
        beta: bias of the batch norm, shape [C].
        gamma: its weight, shape [C].
        deviations: the 3 of the formula.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3.

    Example:
        >>> absorbed_bias(torch.tensor([5.0, 1.0]), torch.tensor([-1.0, 1.0]))
        tensor([2., 0.])
    """
    share = (beta - deviations * gamma.abs()).clamp(min=0.0)
    return torch.where(share > 1e-6 * beta, share, 0.0)


def carried_bias(weight: torch.Tensor, value: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Return what a layer makes of an input that is the same everywhere: W c, shape [out].

    Formula: (W c)_o = sum_ik W_oik c_i over the input channels i of the group of o, and the places k of the kernel.

    Args:
        weight: shape [out, in / groups, *kernel].
        value: c, shape [in].
        groups: of a convolution.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3:
        b' = b + W c.

    Example:
        >>> carried_bias(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([3.0, 1.0]))
        tensor([ 5., -1.])
    """
    per_input = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    own = value.reshape(groups, 1, -1).expand(groups, len(weight) // groups, -1).flatten(0, 1)
    return (per_input * own).sum(1)


def smoothing_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the scale by which each input channel is divided, and its weights multiplied.

    Formula:
        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), at least 1e-5 and at most 1e5
    A channel that is zero on one side keeps the scale 1. Without the limits a channel that is as good as dead (values
    of 1e-30) makes weights that overflow.

    Args:
        activation: max|X_j|, shape [C].
        weight: max|W_j| over all weights that read the channel, shape [C].
        alpha: 0 leaves the difficulty to the activations, 1 moves all of it into the weights.

    Source:
        Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        equation 4; the lower limit is that of the authors' code.

    Example:
        >>> smoothing_scale(torch.tensor([16.0]), torch.tensor([0.25]), 0.5)
        tensor([8.])
    """
    scale = activation.pow(alpha) / weight.pow(1.0 - alpha)
    return torch.where((activation > 0) & (weight > 0) & torch.isfinite(scale), scale.clamp(1e-5, 1e5), 1.0)


def output_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the scale by which each output channel is divided, so that all reach as far.

    Formula:
        s_c = m_c / sqrt(max(m) min(m)), so that the scales lie around 1; m_c = max|Y_c|, at least max(m) / 1024

    Args:
        largest: max|Y_c|, shape [C].

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1: the
        range of each channel as its scale.

    Example:
        >>> output_scale(torch.tensor([1.0, 16.0]))
        tensor([0.2500, 4.0000])
    """
    return activation_scale(largest.clamp(min=float(largest.max()) / 1024), 1.0)


def activation_scale(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the scale by which the weights of salient channels grow before they are rounded.

    Formula:
        s_j = a_j^alpha, divided by sqrt(max(s) min(s)) so that the scales lie around 1; a_j = mean|X_j|

    Args:
        mean: mean|X_j|, shape [C]; zeros count as the smallest positive mean.
        alpha: 0 gives ones.

    Source:
        Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", equations 4 and 5; the division is that of the
        authors' code.

    Example:
        >>> activation_scale(torch.tensor([1.0, 16.0]), 0.5)
        tensor([0.5000, 2.0000])
    """
    positive = mean[mean > 0]
    if not len(positive):
        return torch.ones_like(mean)
    scale = mean.clamp(min=float(positive.min())).pow(alpha)
    return scale / torch.sqrt(scale.max() * scale.min())


def pool_moments(
    one: tuple[int, torch.Tensor, torch.Tensor], other: tuple[int, torch.Tensor, torch.Tensor]
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return count, mean and sum of squared deviations of two samples together.

    Formula, with d = mean_b - mean_a and n = n_a + n_b:
        mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n

    Args:
        one: count, mean [C], sum of squared deviations from the mean [C].
        other: likewise.

    Source:
        Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    (n, mean, squares), (m, other_mean, other_squares) = one, other
    difference, total = other_mean - mean, n + m
    return (
        total,
        mean + difference * (m / total),
        squares + other_squares + difference.square() * (n * m / total),
    )


def split_outliers(size: torch.Tensor, count: int) -> tuple[int, ...]:
    """Return which channel is split at each of `count` steps: the one with the largest weight then, which is halved.

    A channel may be split more than once: then one of its copies is halved again.

    Args:
        size: largest absolute weight of each channel, shape [C].
        count: how many channels are added.

    Source:
        Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting",
        sections 3.2 and 3.4.

    Example:
        >>> split_outliers(torch.tensor([1.0, 8.0, 3.0]), 2)
        (1, 1)
    """
    heap = [(-value, channel, channel) for channel, value in enumerate(size.tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    for step in range(count):
        value, place, channel = heapq.heappop(heap)
        chosen.append(place)
        heapq.heappush(heap, (value / 2, place, channel))
        heapq.heappush(heap, (value / 2, len(size) + step, channel))
    return tuple(chosen)


def split_channels(weight: torch.Tensor, dim: int, chosen: tuple[int, ...]) -> torch.Tensor:
    """Return a weight that reads duplicated channels: each chosen channel is halved and stands once more at the end.

    Formula:
        w x = (w / 2) x + (w / 2) x

    Args:
        weight: any shape.
        dim: its input channels.
        chosen: what `split_outliers` gave; a number past the channels is a copy made at an earlier step.
    """
    parts = list(weight.unbind(dim))
    for place in chosen:
        parts[place] = parts[place] / 2
        parts.append(parts[place])
    return torch.stack(parts, dim)
