"""Search: which layer gets which bits, by measured sensitivity, exact choice under a budget, and a guarded metric."""

from __future__ import annotations

from torchopt_passes.search.accuracy_guard import GuardResult, GuardStep, keep_accuracy
from torchopt_passes.search.mixed_precision import BitChoice, LayerBits, choose_bits
from torchopt_passes.search.sensitivity import Sensitivity, SensitivityRow, measure_sensitivity

__all__ = [
    "BitChoice",
    "GuardResult",
    "GuardStep",
    "LayerBits",
    "Sensitivity",
    "SensitivityRow",
    "choose_bits",
    "keep_accuracy",
    "measure_sensitivity",
]
