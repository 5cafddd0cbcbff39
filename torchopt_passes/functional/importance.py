"""Importance of channels: how much a model would lose with them, from weights, gradients or activations.

The indices of one dimension of a tensor are scored as the rows of a matrix (`functional.units.channel_rows`). Scores
are float64, on the device of what they are made of; the lowest leaves first.
"""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.units import channel_rows

__all__ = [
    "active_share",
    "bn_scale",
    "fpgm",
    "lamp",
    "lp_norm",
    "mean_activation",
    "mean_square",
    "random_scores",
    "squared_gradient",
    "taylor_terms",
    "wanda",
]


def lp_norm(rows: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    """Return ``(sum_k |w_k|^p)^(1/p)`` of each row; the largest ``|w_k|`` for p = inf.

    Args:
        rows: (n, m).
        p: > 0; 1 and 2 are the usual ones.

    Returns:
        (n,), >= 0.

    Source:
        p = 1: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1; any p: He et al. 2018, "Soft
        Filter Pruning", section 3.2, equation 2.

    Example:
        >>> lp_norm(torch.tensor([[3.0, -4.0], [0.0, 2.0]]))
        tensor([5., 2.], dtype=torch.float64)
    """
    if not p > 0:
        raise ConfigError(f"the p of an L-p norm must be > 0, not {p}")
    wide = _wide(rows)
    if p == 2 and rows.dtype != torch.float64:  # several times faster along strided rows; no float32 can overflow
        return wide.square_().sum(1).sqrt()
    return torch.linalg.vector_norm(wide, ord=p, dim=1)


def random_scores(n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return n scores drawn uniformly from [0, 1) on the CPU: the baseline that every criterion has to beat.

    Example:
        >>> random_scores(2, torch.Generator().manual_seed(0)).shape
        torch.Size([2])
    """
    return torch.rand(n, generator=generator, dtype=torch.float64)


def bn_scale(gamma: torch.Tensor) -> torch.Tensor:
    """Return ``|gamma_c|``, the scale that a batch norm gives each channel.

    Args:
        gamma: (channels,), the batch norm's weight.

    Source:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3.

    Example:
        >>> bn_scale(torch.tensor([-0.5, 0.25]))
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    return _wide(gamma).abs()


def taylor_terms(rows: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return ``sum_k w_k g_k`` of each row, with its sign: terms add up over a unit before the absolute value is taken.

    The first-order change of the loss when a set S of weights becomes zero is ``-sum_S w g``; the importance of S is
    its square, or its absolute value, which ranks alike.

    Args:
        rows: (n, m), weights.
        gradients: (n, m), of the loss.

    Returns:
        (n,), any sign.

    Source:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1, equation 8.

    Example:
        >>> taylor_terms(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])).abs()
        tensor([1.], dtype=torch.float64)
    """
    return (_wide(rows) * _wide(gradients)).sum(1)


def squared_gradient(rows: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return ``1/2 sum_k w_k^2 g_k^2`` of each row; its mean over batches is the saliency with a Fisher diagonal.

    The second-order change of the loss when a weight becomes zero is ``1/2 h w^2``; the diagonal h of the Hessian is
    taken as the empirical Fisher information E[g^2]. It is exact for batches of one sample: in larger ones g is a
    mean already.

    Args:
        rows: (n, m), weights.
        gradients: (n, m), of the loss on one batch.

    Returns:
        (n,), >= 0.

    Source:
        LeCun et al. 1990, "Optimal Brain Damage", section 2 (s = h w^2 / 2); Theis et al. 2018, "Faster gaze
        prediction with dense networks and Fisher pruning", section 2 (h = E[g^2]); twice it is Molchanov et al. 2019,
        section 3.1, equation 9.

    Example:
        >>> squared_gradient(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -1.0]]))
        tensor([4.], dtype=torch.float64)
    """
    return (_wide(rows) * _wide(gradients)).square().sum(1) / 2


def fpgm(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of the Euclidean distances of each row to all others: what lies near the geometric median goes.

    Args:
        rows: (n, m), the filters of one tensor. Work grows as n^2 m, memory as n.

    Returns:
        (n,), >= 0.

    Source:
        He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
        section 3.3.

    Example:
        >>> fpgm(torch.tensor([[0.0], [1.0], [5.0]]))
        tensor([6., 5., 9.], dtype=torch.float64)
    """
    wide = _wide(rows)
    wide = wide - wide.mean(0)  # distances stay, and rounding shrinks: cdist multiplies large matrices out
    step = max(1, 2**22 // max(1, len(wide)))
    parts: list[torch.Tensor] = []
    for start in range(0, len(wide), step):
        distances = torch.cdist(wide[start : start + step], wide)
        distances.diagonal(start).zero_()  # a row's distance to itself
        parts.append(distances.sum(1))
    return torch.cat(parts)


def lamp(squares: torch.Tensor) -> torch.Tensor:
    """Return the share that each squared magnitude has of itself and all that would still be there when it goes.

    Args:
        squares: (n,), squared magnitudes ``w^2 >= 0`` of one layer, or of the channels of one group.

    Returns:
        (n,), in [0, 1]: the largest is 1; 0 where all is zero. Among equal ones the first has the lowest.

    Math:
        w_u^2 / sum_{v >= u} w_v^2, in ascending order of magnitude.

    Source:
        Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", section 2.

    Example:
        >>> lamp(torch.tensor([3.0, 1.0, 4.0]))
        tensor([0.4286, 0.1250, 1.0000], dtype=torch.float64)
    """
    order = squares.argsort(stable=True)
    ascending = _wide(squares)[order]
    surviving = ascending.flip(0).cumsum(0).flip(0)
    shares = torch.where(surviving > 0, ascending / surviving, 0.0)
    return torch.empty_like(shares).scatter_(0, order, shares)


def active_share(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the share of each channel's values that are not zero: 1 - APoZ (average percentage of zeros).

    Args:
        values: activations, behind the ReLU.
        dim: dimension of the channels; the mean is over all others.

    Returns:
        (channels,), in [0, 1].

    Source:
        Hu et al. 2016, "Network Trimming", section 3.1, equation 1.

    Example:
        >>> active_share(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 1)
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return _wide(channel_rows(values, dim) != 0).mean(1)


def mean_activation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the mean ``|a|`` of each channel; behind a ReLU this is the mean activation of the source.

    Args:
        values: activations.
        dim: dimension of the channels; the mean is over all others.

    Returns:
        (channels,), >= 0. Without a ReLU a mean with signs would call a strong channel around zero unimportant.

    Source:
        Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.2.

    Example:
        >>> mean_activation(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), 1)
        tensor([2., 0.], dtype=torch.float64)
    """
    return _wide(channel_rows(values, dim)).abs().mean(1)


def mean_square(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the mean ``a^2`` of each channel; the norm of `wanda` is the root of it times the number of positions.

    Args:
        values: activations.
        dim: dimension of the channels; the mean is over all others.

    Example:
        >>> mean_square(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), 1)
        tensor([5., 0.], dtype=torch.float64)
    """
    return _wide(channel_rows(values, dim)).square().mean(1)


def wanda(rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return ``sum_i |W_ij| ||X_j||_2`` for each input channel j: weight times activation, summed over the outputs.

    Args:
        rows: (n, m), the weights that read each input channel.
        norms: (n,) or (n, groups), 2-norm of each input channel over all samples and positions. In a grouped
            convolution a row reads one channel for each group, with the next m / groups of its weights.

    Returns:
        (n,), >= 0.

    Source:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", section 3, equation 1
        (of single weights; here summed over a channel).

    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])), wanda(torch.ones(1, 2), torch.tensor([[3.0, 4.0]]))
        (tensor([9.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """
    norms = _wide(norms).reshape(len(rows), -1)
    return (_wide(rows).abs().reshape(len(rows), norms.shape[1], -1).sum(2) * norms).sum(1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64)
