"""How a sparsity over several weights is divided among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchopt_passes.errors import ConfigError

__all__ = ["erdos_renyi", "layer_sparsities", "uniform"]


def uniform(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Return the same sparsity for all weights but the first, which stays dense.

    Args:
        shapes: of the weights, in the order of the model.
        sparsity: s in [0, 1].

    Returns:
        One sparsity for each weight; over all together it is below s.

    Source:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 (1), uniform.

    Example:
        >>> uniform([(8, 3), (8, 8), (2, 8)], 0.9)
        [0.0, 0.9, 0.9]
    """
    return [0.0 if index == 0 else sparsity for index in range(len(shapes))]


def erdos_renyi(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Return sparsities that leave small weights denser and large ones sparser (Erdős-Rényi-Kernel, ERK).

    Args:
        shapes: of the weights, with the kernel's dimensions.
        sparsity: s in [0, 1], over all weights together.

    Returns:
        One sparsity in [0, 1] for each weight.

    Math:
        1 - s_l = min(1, eps * sum(shape_l) / prod(shape_l)), with eps such that sum_l (1 - s_l) n_l = (1 - s) sum_l
        n_l: for a convolution 1 - s_l ~ (n_in + n_out + h + w) / (n_in n_out h w). A weight that would be more than
        dense is dense, and the others take its share.

    Source:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 (1), Erdős-Rényi-Kernel.

    Example:
        >>> [round(s, 6) for s in erdos_renyi([(10, 10), (10, 40)], 0.5)]
        [0.285714, 0.553571]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        thin = [index for index in range(len(shapes)) if index not in dense]
        left = (1.0 - sparsity) * sum(sizes) - sum(sizes[index] for index in dense)
        scale = left / sum(raw[index] * sizes[index] for index in thin) if thin else 0.0
        over = {index for index in thin if scale * raw[index] > 1.0}
        if not over:
            break
        dense |= over
    return [0.0 if index in dense else min(1.0, max(0.0, 1.0 - scale * raw[index])) for index in range(len(shapes))]


def layer_sparsities(scope: str, shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Return the sparsity of each weight for a sparsity of all.

    Args:
        scope: ``"tensor"``, the same for all; ``"uniform"``; ``"erk"``.
        shapes: of the weights, in the order of the model.
        sparsity: in [0, 1].

    Raises:
        ConfigError: another scope.

    Example:
        >>> layer_sparsities("tensor", [(4, 4), (2, 4)], 0.5)
        [0.5, 0.5]
    """
    if scope == "tensor":
        return [sparsity] * len(shapes)
    if scope == "uniform":
        return uniform(shapes, sparsity)
    if scope == "erk":
        return erdos_renyi(shapes, sparsity)
    raise ConfigError(f'no sparsity of single weights for scope {scope!r}: "tensor", "uniform" or "erk"')
