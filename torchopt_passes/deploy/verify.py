"""The comparison of an artefact with the model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchopt_passes.deploy.calls import run_source
from torchopt_passes.deploy.noise import relative_norm, rounding_noise
from torchopt_passes.errors import VerificationError
from torchopt_passes.graph.verify import Inputs, relative_error, sqnr

__all__ = [
    "DEFAULT_TOLERANCE",
    "Verification",
    "beyond_noise",
    "compare",
    "compare_with_source",
]

DEFAULT_TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 0.05, "float16": 0.01, "int8": 0.03}
_MOST_NOISE = 0.5  # a model that moves by more under the rounding of float32 cannot be compared with anything
_MOST_DB = 300.0  # shown for equal outputs: beyond what float64 can tell


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far an artefact's outputs are from the source's, over all calls that were compared.

    Args:
        error: what the tolerance bounds. For float, max|a - b| / max|b|. For int8, where a rounding that falls the
            other way moves a value by a whole step, ``||a - b|| / ||b||``. The largest over outputs and calls.
        tolerance: the largest error allowed.
        sqnr: signal-to-noise ratio 10 log10(sum b^2 / sum (a - b)^2) in dB, the smallest over outputs and calls.
        agreement: share of rows whose largest entry (last dim) is the same, 0..1, the smallest over outputs and calls.
        calls: how many calls were compared.
    """

    error: float
    tolerance: float
    sqnr: float
    agreement: float
    calls: int

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"error {self.error:.1e} (allowed {self.tolerance:.1e}), SQNR {self.sqnr:.1f} dB, "
            f"agreement {self.agreement:.1%}, {self.calls} calls"
        )


def compare(
    actual: Sequence[Sequence[torch.Tensor]],
    expected: Sequence[Sequence[torch.Tensor]],
    *,
    precision: str,
    tolerance: float | None = None,
) -> Verification:
    """Compare the outputs of several calls, each a sequence of tensors.

    Args:
        actual: of the artefact.
        expected: of the source.
        precision: of the artefact; picks the measure and the default tolerance.
        tolerance: the largest error allowed; by default 1e-4 for float32, 0.03 (30 dB) for int8.

    Example:
        >>> compare([[torch.ones(2)]], [[torch.ones(2)]], precision="float32").passed
        True
    """
    pairs = [(a, b) for call in zip(actual, expected, strict=True) for a, b in zip(*call, strict=True)]
    measure = relative_norm if precision == "int8" else relative_error
    ratios = [_MOST_DB if a.shape == b.shape and torch.equal(a, b) else _sqnr(a, b) for a, b in pairs]
    return Verification(
        error=max((measure(a, b) for a, b in pairs), default=0.0),
        tolerance=DEFAULT_TOLERANCE.get(precision, 1e-4) if tolerance is None else tolerance,
        sqnr=min(ratios, default=_MOST_DB),
        agreement=min((_agreement(a, b) for a, b in pairs), default=1.0),
        calls=len(expected),
    )


def compare_with_source(
    actual: Sequence[Sequence[torch.Tensor]],
    source: nn.Module,
    calls: Sequence[Inputs],
    names: Sequence[str],
    *,
    precision: str,
    int32_biases: bool = False,
    tolerance: float | None = None,
) -> Verification:
    """Compare the outputs of several calls with the source's; int8 is allowed what the source's own roundings move it.

    Args:
        actual: the outputs of each call, in the order of `names`.
        source: the module; run in eval mode, and untouched.
        calls: of the source.
        names: of the outputs.
        precision: of `actual` (see `compare`).
        int32_biases: whether `actual` comes from a runtime that rounds biases (see `rounding_noise`).
        tolerance: the largest error allowed; the default of the precision when None, raised by `rounding_noise`.

    Raises:
        VerificationError: the source does not give one of the outputs.
    """
    expected: list[list[torch.Tensor]] = []
    for call in calls:
        results = run_source(source, call)
        if missing := [name for name in names if name not in results]:
            raise VerificationError(f"{type(source).__name__} does not give the outputs {missing}")
        expected.append([results[name] for name in names])
    result = compare(actual, expected, precision=precision, tolerance=tolerance)
    if not result.passed and tolerance is None and precision == "int8":
        return beyond_noise(result, rounding_noise(source, calls, names, int32_biases=int32_biases))
    return result


def beyond_noise(result: Verification, noise: float) -> Verification:
    """Judge an int8 comparison that failed by the model's own `rounding_noise`: 1.5 times that is allowed."""
    return replace(result, tolerance=max(result.tolerance, 1.5 * noise)) if noise < _MOST_NOISE else result


def _sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return -_MOST_DB
    value = sqnr(actual, expected)
    return max(-_MOST_DB, min(_MOST_DB, value)) if value == value else -_MOST_DB  # NaN is unequal to itself


def _agreement(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return 0.0
    if actual.ndim == 0 or actual.numel() == 0:
        return 1.0
    return float((actual.argmax(-1) == expected.argmax(-1)).double().mean())
