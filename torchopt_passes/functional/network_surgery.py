"""Masks from two thresholds, between which a weight stays what it was: pruned connections may be spliced again."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["surgery_limits", "surgery_mask"]


def surgery_limits(weight: torch.Tensor, sensitivity: float, low: float, high: float) -> tuple[float, float]:
    """Return the thresholds of a weight: multiples of its mean and spread.

    Args:
        weight: any shape, as it is before it is pruned.
        sensitivity: c; the larger, the sparser.
        low: factor of the lower threshold.
        high: factor of the upper one, >= low.

    Returns:
        ``(a, b)``, a <= b, in the units of the weight.

    Math:
        a = low max(0, mean|w| + c std|w|), b = high max(0, mean|w| + c std|w|), the standard deviation with n - 1.

    Source:
        Guo et al. 2016, "Dynamic Network Surgery for Efficient DNNs", section 3.2: a_k and b_k from the mean and the
        variance of |W_k|; the factors are those of Distiller (splicing_pruner.py, create_mask).

    Example:
        >>> surgery_limits(torch.tensor([1.0, -3.0, 2.0]), 1.0, 0.5, 1.0)
        (1.5, 3.0)
    """
    if not 0.0 < low <= high:
        raise ConfigError(f"thresholds need 0 < low <= high, not {low} and {high}")
    magnitudes = weight.detach().double().abs()
    spread = float(magnitudes.std()) if magnitudes.numel() > 1 else 0.0
    middle = max(0.0, float(magnitudes.mean()) + sensitivity * spread)
    return low * middle, high * middle


def surgery_mask(weight: torch.Tensor, mask: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return the mask that removes what fell below `low`, takes back what rose to `high`, and leaves the rest.

    Args:
        weight: dense: entries that are removed have their value too.
        mask: bool, the mask so far.
        low: a, in the units of the weight.
        high: b >= a.

    Math:
        h(w) = 0 for |w| < a, the mask so far for a <= |w| < b, 1 for b <= |w|.

    Source:
        Guo et al. 2016, "Dynamic Network Surgery for Efficient DNNs", section 3.2, equation 4.

    Example:
        >>> surgery_mask(torch.tensor([0.1, 0.5, 0.5, -0.9]), torch.tensor([True, True, False, False]), 0.4, 0.6)
        tensor([False,  True, False,  True])
    """
    magnitudes = weight.detach().abs()
    return (mask & ~(magnitudes < low)) | (magnitudes >= high)
