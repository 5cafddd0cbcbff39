"""Grids of groups: scale and zero point for each group of neighbouring weights of a row, and how they are fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["GroupGrid", "fit_least_squares", "fit_range", "group_bounds"]


def group_bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of weight-only grids: all of two's complement, as torchao's tensors.

    Example:
        >>> group_bounds(4), group_bounds(8)
        ((-8, 7), (-128, 127))
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must be 2 to 8, not {bits}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class GroupGrid:
    """The grids of a matrix: w = s (q - z), one scale and zero point for each group of columns of each row.

    Args:
        scale: shape [out, groups], float32, positive.
        zero_point: shape [out, groups], float32: an integer, or any number (`functional.hqq`).
        quant_min: smallest integer.
        quant_max: largest integer.
        group_size: columns in a group.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int
    group_size: int

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest integers, int8, shape [out, in]."""
        groups = weight.float().unflatten(1, (-1, self.group_size))
        integers = torch.round(groups / self.scale.unsqueeze(-1) + self.zero_point.unsqueeze(-1))
        return integers.clamp(self.quant_min, self.quant_max).flatten(1).to(torch.int8)

    def dequantize(self, integers: torch.Tensor) -> torch.Tensor:
        """Return the values of integers, float32, shape [out, in]."""
        groups = integers.unflatten(1, (-1, self.group_size))
        return ((groups - self.zero_point.unsqueeze(-1)) * self.scale.unsqueeze(-1)).flatten(1)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest values of the grid; of a grid with one group, any number of columns will do."""
        if self.scale.shape[1] == 1:
            integers = torch.round(weight / self.scale + self.zero_point).clamp(self.quant_min, self.quant_max)
            return (integers - self.zero_point) * self.scale
        return self.dequantize(self.quantize(weight))

    @classmethod
    def cat(cls, grids: list[GroupGrid]) -> GroupGrid:
        """Return the grids of neighbouring groups as one."""
        scale = torch.cat([grid.scale for grid in grids], 1)
        zero_point = torch.cat([grid.zero_point for grid in grids], 1)
        first = grids[0]
        return cls(scale, zero_point, first.quant_min, first.quant_max, first.group_size)


def fit_range(weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool, clip: float = 1.0) -> GroupGrid:
    """Fit each group's grid to its range: round-to-nearest's grid.

    Formula, with a = clip min(w, 0), b = clip max(w, 0) over the group, n = 2^bits - 1:
        symmetric: s = max(-a, b) / (n / 2), z = 0
        affine:    s = (b - a) / n, z = q_min - round(a / s)

    Args:
        weight: shape [out, in], `in` a multiple of `group_size`.
        bits: 2 to 8.
        group_size: columns in a group.
        symmetric: whether the zero point is 0.
        clip: the share of the range that is kept.

    Example:
        >>> fit_range(torch.tensor([[1.0, -7.5, 2.0, 4.0]]), 4, 2, symmetric=True).scale
        tensor([[1.0000, 0.5333]])
    """
    low, high = _checked(weight, group_size).aminmax(dim=2)
    return _from_range(low.clamp(max=0) * clip, high.clamp(min=0) * clip, bits, group_size, symmetric)


def fit_least_squares(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    importance: torch.Tensor | None = None,
    candidates: int = 24,
    smallest: float = 0.5,
    rounds: int = 4,
) -> GroupGrid:
    """Fit each group's grid to the least squared error: the best of several clipped ranges, then refined.

    Formula: min over s, z of sum_j h_j (w_j - s (q_j - z))^2. Each candidate range is the full one times a share in
    [smallest, 1]; then integers and scale are fitted in turn, s = sum h w (q - z) / sum h (q - z)^2, and kept where
    the error falls.

    Args:
        weight: shape [out, in].
        bits: 2 to 8.
        group_size: columns in a group.
        symmetric: whether the zero point is 0.
        importance: h, shape [in]: the second moment of each input, such as the Hessian's diagonal; None for ones.
        candidates: ranges that are tried.
        smallest: the share of the smallest one.
        rounds: alternations.

    Source:
        Range search: Nagel et al. 2021, "A White Paper on Neural Network Quantization", equation 17; alternation:
        Zhang et al. 2018, "LQ-Nets", section 3.2 (with uniform levels).
    """
    groups = _checked(weight, group_size)
    h = torch.ones(groups.shape[1:]) if importance is None else importance.float().view(groups.shape[1:])
    low, high = groups.aminmax(dim=2)
    low, high = low.clamp(max=0), high.clamp(min=0)
    best = _from_range(low, high, bits, group_size, symmetric)
    error = _error(groups, best, h)
    for share in torch.linspace(smallest, 1.0, candidates)[:-1].tolist():
        grid = _from_range(low * share, high * share, bits, group_size, symmetric)
        best, error = _better(groups, h, best, error, grid)
    for _ in range(rounds):
        shifted = best.quantize(weight).unflatten(1, (-1, group_size)) - best.zero_point.unsqueeze(-1)
        bottom = (h * shifted.square()).sum(-1)
        scale = (h * groups * shifted).sum(-1) / bottom
        scale = torch.where((bottom > 0) & (scale > 0), scale, best.scale)
        grid = GroupGrid(scale, best.zero_point, best.quant_min, best.quant_max, group_size)
        best, error = _better(groups, h, best, error, grid)
    return best


def _better(
    groups: torch.Tensor, h: torch.Tensor, best: GroupGrid, error: torch.Tensor, grid: GroupGrid
) -> tuple[GroupGrid, torch.Tensor]:
    """Take a grid's scale and zero point for the groups where its error is smaller."""
    its = _error(groups, grid, h)
    wins = its < error
    scale = torch.where(wins, grid.scale, best.scale)
    zero_point = torch.where(wins, grid.zero_point, best.zero_point)
    return GroupGrid(scale, zero_point, best.quant_min, best.quant_max, best.group_size), torch.minimum(its, error)


def _error(groups: torch.Tensor, grid: GroupGrid, h: torch.Tensor) -> torch.Tensor:
    scale, zero_point = grid.scale.unsqueeze(-1), grid.zero_point.unsqueeze(-1)
    integers = torch.round(groups / scale + zero_point).clamp(grid.quant_min, grid.quant_max)
    return ((groups - (integers - zero_point) * scale).square() * h).sum(-1)


def _from_range(low: torch.Tensor, high: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> GroupGrid:
    quant_min, quant_max = group_bounds(bits)
    smallest = torch.finfo(torch.float32).tiny * 2**16  # a group of zeros has no range to divide by
    if symmetric:
        scale = (torch.maximum(-low, high) / ((quant_max - quant_min) / 2)).clamp(min=smallest)
        return GroupGrid(scale, torch.zeros_like(scale), quant_min, quant_max, group_size)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=smallest)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return GroupGrid(scale, zero_point, quant_min, quant_max, group_size)


def _checked(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    if weight.ndim != 2 or group_size < 1 or weight.shape[1] % group_size:
        raise ConfigError(f"a weight of shape {tuple(weight.shape)} has no groups of {group_size} columns")
    return weight.float().unflatten(1, (-1, group_size))
