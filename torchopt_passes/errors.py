"""The one small tree of errors; every error of the package is a `TorchOptError`.

```
TorchOptError
├── CaptureError          a model cannot be captured as a graph
│   └── InputError        a captured graph is called with inputs it was not captured for (also a TypeError)
├── ConfigError           a bad option, pattern or recipe (also a ValueError)
├── PlanError             a plan file or edit that cannot be trusted or does not fit the model
├── PassError             a pass failed; the module is as it was before
│   └── ProofError        the rewritten module is not what the pass promised; rolled back
├── CallbackError         a training callback is used where it cannot work
├── ExportError           an export failed; no file was left behind
│   └── VerificationError the exported artefact differs from the model it came from
└── MissingExtraError     an optional dependency is not installed (also an ImportError)
```
"""

from __future__ import annotations

__all__ = [
    "CallbackError",
    "CaptureError",
    "ConfigError",
    "ExportError",
    "InputError",
    "MissingExtraError",
    "PassError",
    "PlanError",
    "ProofError",
    "TorchOptError",
    "VerificationError",
]


class TorchOptError(Exception):
    """Base of every error raised by torchopt_passes."""


class CaptureError(TorchOptError):
    """A model cannot be captured; the message names the user's file and line, and a way out."""


class InputError(CaptureError, TypeError):
    """A captured graph is called with inputs that it was not captured for."""


class ConfigError(TorchOptError, ValueError):
    """An option, pattern or recipe is wrong; raised when it is given, not when it is used."""


class PlanError(TorchOptError):
    """A plan is corrupted, hostile, or does not fit the module; nothing was changed."""


class PassError(TorchOptError):
    """A pass failed; the module it was given is as it was before."""


class ProofError(PassError):
    """The result of a pass is not what it promised; rolled back, with the first node that differs."""


class CallbackError(TorchOptError):
    """A training callback is used where it cannot do its work."""


class ExportError(TorchOptError):
    """An export failed; no file was left behind."""


class VerificationError(ExportError):
    """An exported artefact does not compute what the model it came from computes."""


class MissingExtraError(TorchOptError, ImportError):
    """An optional dependency is missing.

    Args:
        package: the import name that is missing, such as ``"onnxruntime"``.
        extra: the extra of torchopt_passes that installs it, such as ``"onnx"``.

    Example:
        >>> raise MissingExtraError("onnxruntime", "onnx")
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.MissingExtraError: 'onnxruntime' is not installed: pip install 'torchopt_passes[onnx]'
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed: pip install 'torchopt_passes[{extra}]'")
        self.package = package
        self.extra = extra
