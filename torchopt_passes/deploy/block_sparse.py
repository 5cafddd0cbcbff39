"""Linear layers that multiply only the blocks of their weight that are not zero: dense products, or torch's BSR."""

from __future__ import annotations

import warnings
from typing import Self

import torch
from torch import nn

from torchopt_passes.errors import ConfigError

__all__ = ["BlockSparseLinear", "BsrLinear", "block_sparsity"]


class BlockSparseLinear(nn.Module):
    """A linear layer whose weight is kept as its non-zero blocks of R x C.

    Each row of blocks is one dense product with the input features that it reads, which are gathered as whole rows of
    the transposed input. So the work shrinks with the blocks, and runs in the machine's own dense kernels; large blocks
    (64 x 64) are needed to make up for the gathering.

    Args:
        values: the blocks of each row of blocks side by side, (R, kept of the row * C), flat, one row after the other.
        columns: the block column of each kept block, int64, in that order.
        kept: how many blocks each row of blocks keeps.
        block: R and C.
        in_features: of the input.
        bias: (out,), or None.

    Math:
        y = x W^T + b with W of the kept blocks and zero elsewhere: exact but for the order of summation.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> _ = linear.weight.data[:, 2:].zero_()
        >>> layer = BlockSparseLinear.of(linear, (2, 2))
        >>> layer.values.numel(), torch.allclose(layer(torch.ones(3, 4)), linear(torch.ones(3, 4)))
        (4, True)
    """

    columns: torch.Tensor

    def __init__(
        self,
        values: torch.Tensor,
        columns: torch.Tensor,
        kept: tuple[int, ...],
        *,
        block: tuple[int, int],
        in_features: int,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("columns", columns)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.kept, self.block, self.in_features = kept, block, in_features
        self.out_features = len(kept) * block[0]

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, block: tuple[int, int]) -> Self:
        """Return the layer that computes what a linear computes.

        Args:
            linear: with zeros in blocks.
            block: R and C, which divide the weight (out, in).

        Raises:
            ConfigError: the blocks do not tile the weight.
        """
        tiles = _tiles(linear.weight.detach(), block)
        found = (tiles != 0).any(dim=(1, 3))
        bias = linear._parameters["bias"]
        rows = [tile[:, keep].reshape(-1) for tile, keep in zip(tiles, found, strict=True)]
        return cls(
            torch.cat(rows),
            found.nonzero()[:, 1].contiguous(),
            tuple(int(count) for count in found.sum(1)),
            block=block,
            in_features=linear.in_features,
            bias=None if bias is None else bias.detach().clone(),
        ).train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., out) of (..., in)."""
        rows, width = self.block
        flat = input.reshape(-1, self.in_features)
        tokens = flat.shape[0]
        gatherable = flat.t().reshape(self.in_features // width, width * tokens)
        weights = self.values.split([rows * width * kept for kept in self.kept])
        parts = [
            weight.view(rows, kept * width) @ gatherable.index_select(0, columns).view(kept * width, tokens)
            for kept, weight, columns in zip(self.kept, weights, self.columns.split(list(self.kept)), strict=True)
        ]
        output = torch.cat(parts).t().reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Describe it."""
        share = 1 - sum(self.kept) * self.block[0] * self.block[1] / max(self.in_features * self.out_features, 1)
        return f"in={self.in_features}, out={self.out_features}, block={self.block}, zero blocks={share:.0%}"


class BsrLinear(nn.Module):
    """A linear layer whose weight is kept in torch's block-sparse-row format, multiplied by MKL: for CPUs, inference.

    Args:
        values: the non-zero blocks, (kept, B, B).
        columns: the block column of each, int64.
        starts: where each row of blocks starts among them, int64 (rows of blocks + 1,).
        shape: of the weight.
        bias: (out,), or None.

    Example:
        >>> linear = nn.Linear(4, 4)
        >>> _ = linear.weight.data[:, 2:].zero_()
        >>> layer = BsrLinear.of(linear, 2)
        >>> x = torch.ones(3, 4)
        >>> len(layer.values), torch.allclose(layer(x), linear(x))
        (2, True)
    """

    columns: torch.Tensor
    starts: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        values: torch.Tensor,
        columns: torch.Tensor,
        starts: torch.Tensor,
        *,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("columns", columns)
        self.register_buffer("starts", starts)
        self.register_buffer("bias", values.new_zeros(shape[0]) if bias is None else bias)
        self.shape = shape

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, block: int) -> Self:
        """Return the layer that computes what a linear computes.

        Args:
            linear: with zeros in blocks.
            block: rows and columns of a block, which divides the weight; MKL takes square ones alone.

        Raises:
            ConfigError: the blocks do not tile the weight.
        """
        tiles = _tiles(linear.weight.detach(), (block, block)).transpose(1, 2)
        found = (tiles != 0).any(dim=3).any(dim=2)
        bias = linear._parameters["bias"]
        return cls(
            tiles[found].contiguous(),
            found.nonzero()[:, 1].contiguous(),
            torch.cat([found.new_zeros(1, dtype=torch.int64), found.sum(1).cumsum(0)]),
            shape=(linear.out_features, linear.in_features),
            bias=None if bias is None else bias.detach().clone(),
        ).train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., out) of (..., in)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta", category=UserWarning)
            weight = torch.sparse_bsr_tensor(self.starts, self.columns, self.values, self.shape, check_invariants=False)
        flat = input.reshape(-1, self.shape[1])
        output = torch.addmm(self.bias[:, None].expand(-1, len(flat)), weight, flat.t()).t()
        return output.reshape(*input.shape[:-1], self.shape[0])


def block_sparsity(weight: torch.Tensor, block: tuple[int, int]) -> float:
    """Return the share of R x C blocks that are zero.

    Raises:
        ConfigError: the blocks do not tile the weight.

    Example:
        >>> block_sparsity(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), (1, 1))
        0.75
    """
    return float((_tiles(weight.detach(), block) == 0).all(dim=3).all(dim=1).double().mean())


def _tiles(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return (rows of blocks, R, columns of blocks, C)."""
    rows, columns = block
    if weight.ndim != 2 or min(block) < 1 or weight.shape[0] % rows or weight.shape[1] % columns:
        raise ConfigError(f"{rows}x{columns} blocks do not tile a weight of shape {tuple(weight.shape)}")
    return weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
