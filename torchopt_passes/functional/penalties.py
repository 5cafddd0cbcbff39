"""Penalties on weights, and the steps that make them exactly zero.

A penalty p(w) is added to a loss by its gradient, or by its proximal step w <- argmin_v (v - w)^2 / 2 + t p(v) after an
optimizer step, with t the learning rate times its strength: that one reaches zero exactly.
"""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["block_shrinkage", "inverse_variance", "restricted_isometry", "soft_orthogonality", "soft_threshold"]


def soft_threshold(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the proximal step of t |w|: every entry t nearer to zero, and exactly zero within t of it.

    Args:
        weight: any shape.
        threshold: t >= 0, learning rate times strength.

    Math:
        sign(w) max(|w| - t, 0).

    Source:
        Parikh and Boyd 2014, "Proximal Algorithms", section 6.5.2, equation 6.9.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2., 0., -1.])
    """
    _check(threshold)
    return weight - weight.clamp(-threshold, threshold)


def block_shrinkage(norms: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Return the factor by which the proximal step of t ||w_g||_2 multiplies each block of weights.

    Args:
        norms: ||w_g||_2 of each block, >= 0.
        thresholds: t of each block, >= 0, shape of `norms` or broadcast to it.

    Returns:
        In [0, 1], shape of `norms`; exactly 0 where the norm is within t.

    Math:
        max(1 - t / ||w_g||_2, 0).

    Source:
        Parikh and Boyd 2014, "Proximal Algorithms", section 6.5.1 (block soft thresholding); Yuan and Lin 2006, "Model
        selection and estimation in regression with grouped variables", equation 2.4.

    Example:
        >>> block_shrinkage(torch.tensor([4.0, 1.0, 0.0]), torch.tensor(1.0))
        tensor([0.7500, 0.0000, 0.0000])
    """
    kept = norms > thresholds
    return torch.where(kept, 1.0 - thresholds / torch.where(kept, norms, 1.0), 0.0)


def inverse_variance(norms: torch.Tensor) -> torch.Tensor:
    """Return 1 / var of the norms of blocks: small where few blocks carry the weight and most have none.

    Args:
        norms: (n,), n > 1.

    Returns:
        Scalar; at most 1e8, where the norms are equal.

    Math:
        1 / (var + 1e-8), var = sum_g (||w_g||_2 - mean)^2 / (n - 1).

    Source:
        Torfi et al. 2018, "Attention-Based Guided Structured Sparsity of Deep Neural Networks", section 2.2; as in
        Distiller's ``GroupVarianceRegularizer``.

    Example:
        >>> inverse_variance(torch.tensor([0.0, 2.0]))
        tensor(0.5000)
    """
    if norms.numel() < 2:
        raise ConfigError(f"the variance of norms needs at least 2 blocks, not {norms.numel()}")
    return 1.0 / (norms.var() + 1e-8)


def soft_orthogonality(rows: torch.Tensor) -> torch.Tensor:
    """Return ||G - I||_F^2, the distance of the smaller side's Gram matrix G from the identity.

    Args:
        rows: (n, m), a weight with its output dimension first, flattened.

    Returns:
        Scalar, >= 0, and 0 where the rows (or the columns, if there are fewer) are orthonormal.

    Math:
        ||W W^T - I||_F^2 for n <= m, else ||W^T W - I||_F^2: both differ by the constant |n - m|.

    Source:
        Bansal et al. 2018, "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", equation 1.

    Example:
        >>> soft_orthogonality(torch.eye(2, 3)), soft_orthogonality(torch.full((1, 1), 3.0))
        (tensor(0.), tensor(64.))
    """
    return _defect(rows).square().sum()


def restricted_isometry(rows: torch.Tensor, steps: int = 2) -> torch.Tensor:
    """Return the spectral norm of G - I (SRIP), by power iteration from a fixed vector.

    Args:
        rows: (n, m), a weight with its output dimension first, flattened.
        steps: iterations, >= 1; 2 as in the paper.

    Returns:
        Scalar, >= 0; from below, exact as `steps` grows.

    Math:
        u = (G - I) v, v <- (G - I) u, sigma = ||v|| / ||u||; G as in `soft_orthogonality`.

    Source:
        Bansal et al. 2018, equations 7 and 8.

    Example:
        >>> round(float(restricted_isometry(torch.diag(torch.tensor([2.0, 1.0])), 20)), 4)
        3.0
    """
    if steps < 1:
        raise ConfigError(f"power iteration takes at least 1 step, not {steps}")
    defect = _defect(rows)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(defect), generator=generator).to(defect)
    tiny = torch.finfo(defect.dtype).tiny
    u = v
    for _ in range(steps):
        u = defect @ (v / v.norm().clamp(min=tiny))
        v = defect @ u
    return v.norm() / u.norm().clamp(min=tiny)


def _defect(rows: torch.Tensor) -> torch.Tensor:
    smaller = rows if rows.shape[0] <= rows.shape[1] else rows.T
    return smaller @ smaller.T - torch.eye(len(smaller), dtype=rows.dtype, device=rows.device)


def _check(threshold: float) -> None:
    if not threshold >= 0:
        raise ConfigError(f"a threshold must be >= 0, not {threshold}")
