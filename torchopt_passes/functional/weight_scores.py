"""Importance of single weights from their gradients; float32 tensors of the weight's shape, the lowest leaves first."""

from __future__ import annotations

import torch

__all__ = ["movement_gradient", "sensitivity", "soft_movement_gradient", "squared_change"]


def squared_change(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return ``(w g)^2``, the squared first-order change of the loss when a weight becomes zero.

    Args:
        weight: any shape.
        gradient: of the loss by the weight, same shape.

    Source:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1, equation 8.

    Example:
        >>> squared_change(torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 3.0]))
        tensor([1., 9.])
    """
    return (weight.detach().float() * gradient.float()).square()


def sensitivity(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return ``w g``, the derivative of the loss by a factor c = 1 on each weight; its absolute value ranks.

    Args:
        weight: any shape.
        gradient: of the loss by the weight, same shape.

    Math:
        dL(c * w) / dc_j at c = 1 is w_j dL/dw_j; the connection sensitivity is s_j = |w_j g_j| / sum_k |w_k g_k|, whose
        denominator ranks nothing.

    Source:
        Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", section 4.1, equations 5
        and 6.

    Example:
        >>> sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 3.0]))
        tensor([-1., -3.])
    """
    return weight.detach().float() * gradient.float()


def movement_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the straight-through gradient of the scores S of a masked weight W * M(S).

    Args:
        weight: W, dense, any shape.
        gradient: of the loss by the *masked* weight W * M, for all of its entries, same shape.

    Returns:
        dL/dS. Scores that go down it grow for weights that training moves away from zero.

    Math:
        a = (W * M(S)) x, dL/dS_ij = dL/da_i W_ij x_j = (dL/d(W * M))_ij W_ij.

    Source:
        Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4, equation 2.

    Example:
        >>> movement_gradient(torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 3.0]))  # the first one grows
        tensor([-1., -3.])
    """
    return weight.detach().float() * gradient.float()


def soft_movement_gradient(
    scores: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Return the gradient of the scores of one weight under loss and penalty: L + penalty * mean(sigmoid(S)).

    Args:
        scores: S, shape of the weight.
        weight: W, dense.
        gradient: of the loss by the masked weight, for all of its entries.
        penalty: lambda >= 0.

    Math:
        dL/dS + lambda / n * sigma(S) (1 - sigma(S)), n weights.

    Source:
        Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4.2 (soft movement pruning);
        the mean over a matrix is that of the authors' code.

    Example:
        >>> soft_movement_gradient(torch.zeros(2), torch.ones(2), torch.tensor([-0.5, 0.0]), 4.0)
        tensor([0.0000, 0.5000])
    """
    closed = scores.sigmoid()
    return movement_gradient(weight, gradient) + penalty / scores.numel() * closed * (1.0 - closed)
