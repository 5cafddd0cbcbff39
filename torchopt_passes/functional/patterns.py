"""Keep-masks with a pattern: N of every M weights, or whole blocks.

As in `functional.masks`, bool tensors are True for what is kept, and of equal scores the first in memory goes first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.masks import keep_largest

__all__ = [
    "block_mask",
    "block_scores",
    "keep_blocks",
    "keep_n_of_m",
    "n_m_mask",
    "parse_pattern",
    "spread_blocks",
]


def parse_pattern(pattern: str) -> tuple[Literal["", "n:m", "block", "dim"], tuple[int, ...]]:
    """Return what a pattern text means and its numbers.

    Raises:
        ConfigError: the text is no pattern.

    Example:
        >>> parse_pattern("2:4"), parse_pattern("block 4x1"), parse_pattern("dim -1")
        (('n:m', (2, 4)), ('block', (4, 1)), ('dim', (-1,)))
    """
    if not pattern:
        return "", ()
    if match := re.fullmatch(r"(\d+):(\d+)", pattern):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return "n:m", (n, m)
    if match := re.fullmatch(r"block (\d+)x(\d+)", pattern):
        rows, columns = int(match[1]), int(match[2])
        if rows > 0 and columns > 0:
            return "block", (rows, columns)
    if match := re.fullmatch(r"dim (-?\d+)", pattern):
        return "dim", (int(match[1]),)
    raise ConfigError(f'pattern must be "N:M" with 0 < N < M, "block RxC" or "dim D", not {pattern!r}')


def n_m_mask(weight: torch.Tensor, n: int, m: int, dim: int = 1) -> torch.Tensor:
    """Return the mask that keeps the `n` largest ``|w|`` of every `m` consecutive weights along `dim`.

    Args:
        weight: at least `dim` + 1 dimensions, size along `dim` a multiple of `m`.
        n: weights kept of each group, 0 < n < m.
        m: size of a group.
        dim: dimension the groups lie along; the input dimension is what sparse tensor cores want.

    Returns:
        bool, shape of `weight`.

    Raises:
        ConfigError: `n`, `m` or `dim` do not fit the tensor.

    Source:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3.

    Example:
        >>> n_m_mask(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    return keep_n_of_m(weight.detach().abs(), n, m, dim)


def keep_n_of_m(scores: torch.Tensor, n: int, m: int, dim: int = 1) -> torch.Tensor:
    """Return the mask that keeps the `n` highest scores of every `m` consecutive ones along `dim`; see `n_m_mask`.

    Args:
        scores: importance of each weight, any sign; of equal ones the first goes first.
        n: weights kept of each group, 0 < n < m.
        m: size of a group.
        dim: dimension the groups lie along.

    Returns:
        bool, shape of `scores`.

    Raises:
        ConfigError: `n`, `m` or `dim` do not fit the tensor.

    Example:
        >>> keep_n_of_m(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False, False,  True,  True]])
    """
    if not 0 < n < m:
        raise ConfigError(f"N:M needs 0 < N < M, not {n}:{m}")
    if not -scores.ndim <= dim < scores.ndim:
        raise ConfigError(f"{n}:{m} along dimension {dim} does not fit a tensor of shape {tuple(scores.shape)}")
    if scores.shape[dim] % m:
        raise ConfigError(f"dimension {dim} of shape {tuple(scores.shape)} is not divisible by {m} for {n}:{m}")
    last = scores.detach().movedim(dim, -1)
    groups = last.reshape(-1, m)
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], value=False)
    return mask.view(last.shape).movedim(-1, dim).contiguous()


def block_mask(weight: torch.Tensor, block: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Return the mask that removes whole blocks of the matrix ``(out, in * kernel)``, by mean ``|w|``.

    Args:
        weight: at least 2 dimensions; those after the first count as one.
        block: rows and columns of a block; both must divide the matrix.
        sparsity: share of the blocks to remove, 0 <= sparsity <= 1.

    Returns:
        bool, shape of `weight`.

    Raises:
        ConfigError: the tensor is no matrix, or the blocks do not tile it.

    Example:
        >>> block_mask(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), (1, 2), 0.5)
        tensor([[False, False,  True,  True]])
    """
    return keep_blocks(weight.detach().abs(), block, sparsity)


def keep_blocks(scores: torch.Tensor, block: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Return the mask that removes the blocks with the lowest mean score; see `block_mask`.

    Args:
        scores: importance of each weight, any sign; at least 2 dimensions, those after the first count as one.
        block: rows and columns of a block; both must divide the matrix.
        sparsity: share of the blocks to remove, 0 <= sparsity <= 1.

    Returns:
        bool, shape of `scores`.

    Raises:
        ConfigError: the tensor is no matrix, or the blocks do not tile it.

    Example:
        >>> keep_blocks(torch.tensor([[1.0, 1.0, -5.0, -5.0]]), (1, 2), 0.5)
        tensor([[ True,  True, False, False]])
    """
    return spread_blocks(keep_largest(block_scores(scores, block), sparsity), scores.shape, block)


def block_scores(scores: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return the mean score of each block, (rows / r, columns / c), float32 or wider; see `keep_blocks`.

    Example:
        >>> block_scores(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), (1, 2))
        tensor([[2., 5.]])
    """
    rows, columns = block
    if rows < 1 or columns < 1:
        raise ConfigError(f"a block needs at least one row and column, not {rows}x{columns}")
    if scores.ndim < 2:
        raise ConfigError(f"blocks need a matrix, not a tensor of shape {tuple(scores.shape)}")
    matrix = scores.detach().flatten(1)
    if matrix.shape[0] % rows or matrix.shape[1] % columns:
        raise ConfigError(f"{rows}x{columns} blocks do not tile the matrix {tuple(matrix.shape)}")
    tiles = matrix.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return tiles.to(torch.promote_types(tiles.dtype, torch.float32)).mean(dim=(1, 3))


def spread_blocks(kept: torch.Tensor, shape: Sequence[int], block: tuple[int, int]) -> torch.Tensor:
    """Return the mask of single weights for a mask of blocks, (rows / r, columns / c) -> `shape`.

    Example:
        >>> spread_blocks(torch.tensor([[True, False]]), (1, 4), (1, 2))
        tensor([[ True,  True, False, False]])
    """
    rows, columns = block
    tiles = kept[:, None, :, None].expand(kept.shape[0], rows, kept.shape[1], columns)
    return tiles.reshape(tuple(shape))
