"""Early exits: where a sample may leave a network, by how sure its heads are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["confidence", "evenly_spaced", "first_confident"]


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Return the probability of the class that a head holds likeliest, for each sample.

    Args:
        logits: (samples, classes).

    Returns:
        (samples,), in [1 / classes, 1], float32 at least.

    Math:
        max_c softmax(z)_c.

    Source:
        Kaya et al. 2019, "Shallow-Deep Networks", section 4.1; an alternative to the entropy of Teerapittayanon et al.
        2016, "BranchyNet", section 2.4.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).amax(-1)


def first_confident(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return at which exit each sample leaves: the first that is sure enough, or the end.

    Args:
        confidences: (exits, samples), in the order of the network.
        threshold: least confidence to leave with; above 1, nobody leaves early.

    Returns:
        int64 (samples,): 0 for the first exit; the number of exits for the end of the network.

    Example:
        >>> first_confident(torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.8, 0.4]]), 0.7)
        tensor([0, 1, 2])
    """
    sure = torch.cat([confidences >= threshold, confidences.new_ones(1, confidences.shape[1], dtype=torch.bool)])
    return sure.int().argmax(0)


def evenly_spaced(shares: Sequence[float], count: int) -> list[int]:
    """Return the numbers of the places that divide a network's work most evenly.

    Args:
        shares: of the work that is done at each place, ascending, in (0, 1).
        count: how many to choose, >= 1.

    Returns:
        Ascending: for each of 1 / (count + 1), 2 / (count + 1), ... the nearest place that is still free.

    Raises:
        ConfigError: there are too few.

    Example:
        >>> evenly_spaced([0.1, 0.3, 0.55, 0.9], 2)
        [1, 2]
    """
    if not 1 <= count <= len(shares):
        raise ConfigError(f"there are {len(shares)} places for exits, not {count}")
    free = dict(enumerate(shares))
    chosen: list[int] = []
    for number in range(1, count + 1):
        nearest = min(free, key=lambda place: abs(free[place] - number / (count + 1)))
        chosen.append(nearest)
        del free[nearest]
    return sorted(chosen)
