"""Codebooks: the few levels that a tensor's values are snapped to, and logarithmic grids as such levels.

Everything works on a matrix (G, n): G groups of n values, each group with levels of its own. `kmeans` finds levels that
fit the values.
"""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError

__all__ = [
    "at_least_float32",
    "borders",
    "fit_log_levels",
    "inertia",
    "largest",
    "log_levels",
    "look_up",
    "nearest",
    "zero_first",
]


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest level of each value; between two, the lower level.

    Args:
        values: (G, n), floating.
        levels: (G, K), K <= 256, in any order.

    Returns:
        (G, n) uint8.

    Example:
        >>> nearest(torch.tensor([[0.2, -0.9, 3.0]]), torch.tensor([[0.0, -1.0, 1.0]]))
        tensor([[0, 1, 2]], dtype=torch.uint8)
    """
    values = at_least_float32(values.detach())
    ascending, order = levels.detach().double().sort(dim=1, stable=True)
    limits = borders(ascending, values.dtype)
    if len(values) == 1:
        slots = torch.bucketize(values, limits[0], out_int32=True)
    else:
        slots = torch.searchsorted(limits, values.contiguous(), out_int32=True)
    if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
        return slots.to(torch.uint8)
    return order.to(torch.uint8).gather(1, slots.long())


def look_up(levels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the levels that indices name; the gradient of a level is the sum over its values.

    Half precision is looked up in float32, so that the sum is one.

    Args:
        levels: (G, K), floating.
        indices: (G, n), integers.

    Returns:
        (G, n), dtype of the levels.

    Example:
        >>> look_up(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8))
        tensor([[1., 0.],
                [3., 3.]])
    """
    groups, size = levels.shape
    positions = indices if indices.dtype is torch.int32 else indices.to(torch.int32)
    if groups > 1:
        positions = positions + size * torch.arange(groups, dtype=torch.int32, device=levels.device).unsqueeze(1)
    table = at_least_float32(levels)
    found = table.reshape(-1).index_select(0, positions.reshape(-1)).view(indices.shape)
    return found if table.dtype is levels.dtype else found.to(levels.dtype)


def inertia(values: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weighted squared error of each group to its nearest levels, shape [G], float64.

    Args:
        values: (G, n), floating.
        levels: (G, K).
        importance: (G, n), or None for 1.

    Example:
        >>> inertia(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([2.], dtype=torch.float64)
    """
    error = (values.double() - look_up(levels, nearest(values, levels)).double()).square()
    return (error if importance is None else error * importance).sum(1)


def zero_first(levels: torch.Tensor) -> torch.Tensor:
    """Return ascending levels of which one is 0 with that one moved to the front.

    Example:
        >>> zero_first(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[ 0., -1.,  2.]])
    """
    zero = (levels < 0).sum(1, keepdim=True)
    if not bool((levels.gather(1, zero.clamp(max=levels.shape[1] - 1)) == 0).all()):
        raise ConfigError("zero_first: a group has no level 0")
    slot = torch.arange(levels.shape[1] - 1, device=levels.device)
    others = levels.gather(1, slot + (slot >= zero))
    return torch.cat([torch.zeros_like(others[:, :1]), others], dim=1)


def largest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return the flat positions of the share of values that are largest in magnitude, ascending, int32.

    Args:
        values: any shape.
        share: 0 to 1; round(share n) positions.

    Example:
        >>> largest(torch.tensor([1.0, -9.0, 2.0, 4.0]), 0.5)
        tensor([1, 3], dtype=torch.int32)
    """
    count = round(share * values.numel())
    found = values.detach().reshape(-1).abs().topk(count, sorted=False).indices
    return found.sort().values.to(torch.int32)


def log_levels(bits: int, top: torch.Tensor, base: float = 2.0) -> torch.Tensor:
    """Return the levels of a logarithmic grid: 0 and +- base^e for the e = top, top - 1, ... that fit into the bits.

    Formula: with n = 2^(b-1) - 1 exponents for each sign, {0} + {+- base^e : top - n < e <= top}.

    Args:
        bits: 2 to 8, the sign's included.
        top: (G,) integers, the largest exponent of each group.
        base: 2 for powers of two (a product is a shift), sqrt(2) for twice as fine a grid.

    Returns:
        (G, 2n + 1) float32, ascending.

    Source:
        Miyashita et al. 2016, "Convolutional neural networks using logarithmic data representation", equations 3 and
        4 (top is their FSR), and section 3.3 for base sqrt(2).

    Example:
        >>> log_levels(3, torch.tensor([0]))
        tensor([[-1.0000, -0.5000, -0.2500,  0.0000,  0.2500,  0.5000,  1.0000]])
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"a logarithmic grid has 2 to 8 bits, not {bits}")
    steps = torch.arange(2 ** (bits - 1) - 1, device=top.device)
    magnitudes = torch.pow(base, (top.unsqueeze(1) - steps).double())
    levels = torch.cat([-magnitudes, torch.zeros_like(magnitudes[:, :1]), magnitudes.flip(1)], dim=1)
    return levels.float()


def fit_log_levels(
    values: torch.Tensor, bits: int, base: float = 2.0, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logarithmic grid of each group with the least weighted squared error.

    The largest exponent is tried from the one above the largest magnitude down to three below; values are snapped to
    the nearest level (the paper rounds the logarithm instead, which costs error).

    Args:
        values: (G, n), floating.
        bits: 2 to 8.
        base: of the grid, see `log_levels`.
        importance: (G, n), or None for 1.

    Returns:
        (G, 2^bits - 1) float32, ascending.
    """
    highest = values.detach().abs().amax(1).double().clamp(min=torch.finfo(torch.float32).tiny * 2**64)
    top = torch.ceil(torch.log(highest) / torch.log(torch.tensor(base, dtype=torch.float64))).long()
    best, least = log_levels(bits, top, base), None
    for lower in range(4):
        levels = log_levels(bits, top - lower, base)
        error = inertia(values, levels, importance)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best = torch.where(better.unsqueeze(1), levels, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def borders(ascending: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the middles between ascending levels, (G, K - 1): the largest values that the lower level takes."""
    return ((ascending[:, :-1] + ascending[:, 1:]) / 2).to(dtype).contiguous()


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, other dtypes as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
