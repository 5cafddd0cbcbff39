"""GPTQ: round a weight matrix column by column, each column's error made up for by the columns still to come."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["Rounder", "add_hessian", "gptq", "output_error"]

Rounder = Callable[[torch.Tensor], torch.Tensor]
"""Takes columns, shape [rows, k], to the nearest values of their grid: a uniform grid or a codebook."""


def add_hessian(hessian: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Add the samples of one batch to the Hessian of a layer's squared output error, in place.

    Formula: H <- H + 2 X^T X (for inputs as rows). Batches stream: memory does not grow with their number.

    Args:
        hessian: shape [in, in], float32.
        inputs: shape [samples, in].

    Returns:
        `hessian`.

    Source:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        section 3.

    Example:
        >>> add_hessian(torch.zeros(2, 2), torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.],
                [4., 8.]])
    """
    rows = inputs.to(hessian.dtype)
    return hessian.addmm_(rows.T, rows, alpha=2.0)


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return the squared output error of a weight: ||D X||^2 = tr(D H D^T) / 2 with D = W - Q and H = 2 X X^T.

    Args:
        difference: shape [out, in].
        hessian: shape [in, in].

    Example:
        >>> output_error(torch.tensor([[1.0, -0.5]]), torch.tensor([[2.0, 4.0], [4.0, 8.0]]))
        0.0
    """
    return float(((difference @ hessian.to(difference.dtype)) * difference).sum()) / 2


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fit: Callable[[torch.Tensor, torch.Tensor], Rounder],
    *,
    group_size: int | None = None,
    act_order: bool = False,
    damping: float = 0.01,
    fixed: torch.Tensor | None = None,
    block_size: int = 128,
) -> torch.Tensor:
    """Round a weight so that its output, not its entries, stays near: all rows at once, column after column.

    Formula, for column j in order, with U the upper Cholesky factor of (H + d I)^-1:
        q_j = round(w_j),  e = (w_j - q_j) / U_jj,  w_k <- w_k - e U_jk for every k > j

    A column that no input ever reaches (H_jj = 0) is rounded to nearest.

    Args:
        weight: shape [out, in]; left alone.
        hessian: H = 2 X X^T, shape [in, in]; see `add_hessian`.
        fit: makes the grid of a group from its columns, shape [out, group], and their indices, shape [group]. It is
            called when its group is reached, on columns that earlier errors have moved already; with `act_order`,
            where a group's columns are not rounded one after another, before anything is rounded.
        group_size: columns that share a grid; None for one grid.
        act_order: round the columns with the largest H_jj first.
        damping: d, as a share of the mean of H's diagonal.
        fixed: bool, shape [out, in]: entries that keep the value they have in `weight` (pruned zeros, outliers); what
            earlier errors moved them by is made up for by the columns behind. None for none.
        block_size: columns whose errors are gathered before the columns behind them are updated.

    Returns:
        The rounded weight, shape [out, in], in the dtype of `weight`.

    Raises:
        ConfigError: the shapes do not fit, or the Hessian is not finite.

    Source:
        Frantar et al. 2022, "GPTQ", algorithm 1 and section 3.3; act-order from the authors' code.

    Example:
        >>> w = torch.tensor([[0.4, 0.4]])
        >>> gptq(w, torch.ones(2, 2), lambda columns, index: torch.round, damping=1e-6)
        tensor([[0., 1.]])
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ConfigError(f"gptq: a weight of shape {tuple(weight.shape)} needs a Hessian of {columns} x {columns}")
    if not bool(torch.isfinite(hessian).all()):
        raise ConfigError("gptq: the Hessian is not finite: NaN or infinity in the calibration data")
    group = columns if group_size is None else group_size
    work, diagonal = weight.detach().float().clone(), hessian.diagonal().float().clone()
    if fixed is not None and fixed.shape != weight.shape:
        raise ConfigError(f"gptq: fixed has shape {tuple(fixed.shape)}, the weight {tuple(weight.shape)}")
    grids: dict[int, Rounder] = {}
    if act_order:
        for start in range(0, columns, group):
            index = torch.arange(start, min(start + group, columns), device=work.device)
            grids[start // group] = fit(work[:, index], index)
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=work.device)
    )
    upper = _inverse_factor(hessian.float()[order][:, order], damping)
    work = work[:, order]
    kept = None if fixed is None else (fixed[:, order], work.clone())
    rounded = torch.empty_like(work)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        errors = work.new_empty(rows, last - first)
        for j in range(first, last):
            number = int(order[j]) // group
            if number not in grids:
                stop = min(j + group, columns)
                # columns of the group past this block still lack the errors that this block has gathered
                ahead = work[:, j:stop].clone()
                if stop > last:
                    ahead[:, last - j :] -= errors[:, : j - first] @ upper[first:j, last:stop]
                grids[number] = fit(ahead, torch.arange(j, stop, device=work.device))
            column = work[:, j : j + 1]
            rounded[:, j : j + 1] = grids[number](column)
            if kept is not None:
                rounded[:, j] = torch.where(kept[0][:, j], kept[1][:, j], rounded[:, j])
            error = (column - rounded[:, j : j + 1]) / upper[j, j]
            work[:, j:last] -= error @ upper[j : j + 1, j:last]
            errors[:, j - first] = error[:, 0]
        work[:, last:] -= errors @ upper[first:last, last:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result.to(weight.dtype)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return U, upper triangular, with U^T U = (H + d I)^-1; d grows tenfold until the factorization succeeds."""
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    share = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    for attempt in range(5):
        damped = (
            hessian
            + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            * share
            * max(damping, 1e-8)
            * 10.0**attempt
        )
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float()
    raise ConfigError(f"gptq: the Hessian is not positive definite with damping {damping}: give more data or damping")
