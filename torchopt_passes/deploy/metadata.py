"""What an artefact says about itself: inputs, outputs, precision, versions, plan, verification. JSON, strict."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch

from torchopt_passes.errors import ConfigError, ExportError
from torchopt_passes.graph.record import Record

__all__ = ["KEY", "Metadata", "TensorSpec", "library_versions", "problems"]

KEY = "torchopt_passes"
_FORMAT = 1


class TensorSpec(Record):
    """One input or output of an artefact.

    Args:
        name: its name.
        dtype: such as ``"float32"``.
        shape: its sizes; a string names a dynamic one, and equal names are equal sizes.
        example: the sizes it was exported with.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"

    def problem(self, tensor: torch.Tensor) -> str:
        """Return what is wrong with a tensor for this place, or ``""``.

        Example:
            >>> spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3), example=(2, 3))
            >>> spec.problem(torch.ones(5, 3)), spec.problem(torch.ones(5, 4))
            ('', 'x: float32 (batch, 3) is wanted, not float32 (5, 4)')
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes = tuple(tensor.shape)
        fits = len(sizes) == len(self.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(self.shape, sizes, strict=False)
        )
        if fits and dtype == self.dtype:
            return ""
        return f"{self} is wanted, not {dtype} ({', '.join(map(str, sizes))})"


def problems(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return what is wrong with the inputs of a call: shapes, dtypes, and open sizes of one name that differ.

    Example:
        >>> x, y = (TensorSpec(name=name, dtype="float32", shape=("batch",), example=(2,)) for name in "xy")
        >>> problems([x, y], [torch.ones(2), torch.ones(3)])
        ['batch is 2 in x, 3 in y']
    """
    found = [why for spec, tensor in zip(specs, tensors, strict=True) if (why := spec.problem(tensor))]
    sizes: dict[str, dict[int, str]] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        for want, size in zip(spec.shape, tensor.shape, strict=False):
            if isinstance(want, str):
                sizes.setdefault(want, {}).setdefault(int(size), spec.name)
    for name, seen in sizes.items():
        if len(seen) > 1 and not found:
            found.append(f"{name} is " + ", ".join(f"{size} in {where}" for size, where in seen.items()))
    return found


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Everything an artefact carries about itself.

    Args:
        target: the target's name.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``.
        device: where it runs: ``"cpu"`` or ``"cuda"``.
        inputs: in order.
        outputs: in order.
        dropped_inputs: inputs of the source that only dropped outputs read, such as ``labels``: accepted, and ignored.
        dropped_outputs: outputs of the source that were left out, such as ``loss``.
        layers: how many convolutions, linears and matmuls run quantized and in float, by kind.
        facts: what the target found out while writing, by name.
        verification: the figures of the comparison with the source.
        versions: of Python, torch and the libraries that wrote it.
        plan: SHA-256 of the plan that made the model, or ``""``.
        note: the user's own words, say on preprocessing.
    """

    target: str
    precision: str
    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dropped_inputs: tuple[str, ...] = ()
    dropped_outputs: tuple[str, ...] = ()
    layers: dict[str, int] = field(default_factory=dict[str, int])
    facts: dict[str, str] = field(default_factory=dict[str, str])
    verification: dict[str, float | str] = field(default_factory=dict[str, "float | str"])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    plan: str = ""
    note: str = ""

    def made_up(self, batch: int = 1) -> list[torch.Tensor]:
        """Return inputs to time it with: normal floats, ones for integers, the example's sizes but for an open batch.

        Args:
            batch: size of the batch.

        Raises:
            ConfigError: its batch is fixed at another size.
        """
        generator = torch.Generator().manual_seed(0)
        found: list[torch.Tensor] = []
        for spec in self.inputs:
            if spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] != batch:
                raise ConfigError(f"{spec} has a fixed batch: it cannot run {batch}")
            sizes = [batch if size == "batch" else known for size, known in zip(spec.shape, spec.example, strict=True)]
            dtype = cast("torch.dtype", getattr(torch, spec.dtype))
            made = torch.randn(sizes, generator=generator) if dtype.is_floating_point else torch.ones(sizes)
            found.append(made.to(dtype))
        return found

    def to_json(self) -> str:
        """Return the metadata as JSON."""
        data = dict(vars(self))
        for name in ("inputs", "outputs"):
            data[name] = [spec.to_dict() for spec in data[name]]
        return json.dumps({"format": _FORMAT, **data}, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Metadata:
        """Read what `to_json` wrote.

        Raises:
            ExportError: it is not JSON, of another format, or a field is missing or unknown.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError("written by another version of torchopt_passes")
            for name in ("inputs", "outputs"):
                data[name] = tuple(TensorSpec.from_dict(spec) for spec in data[name])
            for name in ("dropped_inputs", "dropped_outputs"):
                data[name] = tuple(str(item) for item in data[name])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ExportError(f"the artefact's metadata cannot be read: {error!r}") from error


def library_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, torch, torchopt_passes and `packages` by name; what is not installed is left out.

    Example:
        >>> library_versions()["torch"] == torch.__version__
        True
    """
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for package in ("torchopt_passes", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
