"""A deployed model: a file that runs, reports on itself, and can be verified and timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from torchopt_passes.deploy.base import Runner, find_target, load_file, target_types
from torchopt_passes.deploy.benchmark import Benchmark, benchmark
from torchopt_passes.deploy.calls import named_inputs
from torchopt_passes.deploy.metadata import Metadata, problems
from torchopt_passes.deploy.size import compressed_size
from torchopt_passes.deploy.verify import Verification, compare_with_source
from torchopt_passes.errors import ConfigError, ExportError, VerificationError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.verify import Inputs

__all__ = ["Artifact", "open_artifact"]


class Artifact:
    """A model in a file, ready to run; made by `export` and `open_artifact`.

    Call it with tensors by position, or by the names of the source's ``forward`` (a whole batch dict too: inputs that
    were dropped at export, such as ``labels``, are ignored). It returns a tensor when it has one output, else a dict
    of tensors by name.

    Args:
        path: of the file.
        metadata: what the file says about itself.
        runner: the loaded file.

    Raises (on a call):
        ConfigError: an input is missing, unknown, or of the wrong shape or dtype; names it and what is wanted.
    """

    def __init__(self, path: Path, metadata: Metadata, runner: Runner) -> None:
        self.path = path
        self.metadata = metadata
        self._runner = runner

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        """Run the model (see the class)."""
        results = self.run(self._ordered(args, kwargs))
        if len(results) == 1:
            return results[0]
        return {spec.name: value for spec, value in zip(self.metadata.outputs, results, strict=True)}

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run on tensors in the order of ``metadata.inputs``, unchecked; returns the outputs in order."""
        return self._runner(inputs)

    @property
    def size(self) -> int:
        """Bytes on disk, weights that lie in a file beside it included."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and the one beside it that holds its weights, where there is one: they are moved together."""
        name = self.metadata.facts.get("external data")  # an ONNX file names it, an OpenVINO file does not
        beside = [self.path.with_name(name)] if name else []
        beside += [self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else []
        return (self.path, *beside)

    def report(self) -> dict[str, Any]:
        """Return what is known of the artefact, for tables: size, precision, layers, inputs, verification, versions."""
        metadata = self.metadata
        return {
            "path": str(self.path),
            "target": metadata.target,
            "precision": metadata.precision,
            "device": metadata.device,
            "bytes": self.size,
            "bytes compressed": sum(map(compressed_size, self.files)),
            "inputs": ", ".join(map(str, metadata.inputs)),
            "outputs": ", ".join(map(str, metadata.outputs)),
            "dropped": ", ".join((*metadata.dropped_inputs, *metadata.dropped_outputs)),
            **metadata.layers,
            **metadata.facts,
            **{f"verified {name}": value for name, value in metadata.verification.items()},
            **{f"version {name}": value for name, value in metadata.versions.items()},
            "plan": metadata.plan,
            "note": metadata.note,
        }

    def benchmark(self, inputs: Any = None, *, runs: int = 50, warmup: int = 5) -> Benchmark:
        """Time the artefact alone (`torchopt_passes.benchmark` compares several).

        Args:
            inputs: as for a call; by default made up after ``metadata.inputs``, with batch 1.
            runs: timed calls.
            warmup: calls before that.
        """
        given = tuple(self.metadata.made_up()) if inputs is None else inputs
        return benchmark({self.path.name: self}, given, runs=runs, warmup=warmup)

    def verify(self, module: nn.Module, inputs: Any, *, tolerance: float | None = None) -> Verification:
        """Compare with the model it came from on one call.

        Args:
            module: the source; run in eval mode, and untouched.
            inputs: a call of the source: a tensor, a tuple, a dict, or ``(args, kwargs)``.
            tolerance: the largest error allowed (see `Verification`).

        Raises:
            VerificationError: the error is larger; gives the figures.
        """
        call = as_call(inputs)
        found = self.run(self._ordered((), named_inputs(module, call)))
        result = self.compare([found], module, [call], tolerance=tolerance)
        if not result.passed:
            raise VerificationError(f"{self.path.name} is not what {type(module).__name__} computes: {result}")
        return result

    def compare(
        self,
        found: Sequence[Sequence[torch.Tensor]],
        module: nn.Module,
        calls: Sequence[Inputs],
        *,
        tolerance: float | None = None,
    ) -> Verification:
        """Compare outputs of several calls, in the order of ``metadata.outputs``, with the module's (see `verify`)."""
        return compare_with_source(
            *(found, module, calls, [spec.name for spec in self.metadata.outputs]),
            precision=self.metadata.precision,
            int32_biases=target_types()[self.metadata.target].int32_biases,
            tolerance=tolerance,
        )

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.metadata.inputs))
        outputs = ", ".join(map(str, self.metadata.outputs))
        kind = f"{self.metadata.target} {self.metadata.precision}"
        return f"Artifact({str(self.path)!r}, {kind}, {self.size} bytes: {inputs} -> {outputs})"

    def _ordered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        given = self.named(args, kwargs)
        tensors = [given[spec.name] for spec in self.metadata.inputs]
        if wrong := problems(self.metadata.inputs, tensors):
            raise ConfigError(f"{self.path.name}: {'; '.join(wrong)}")
        return tensors

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the inputs of a call by name, without those that were dropped at export; sizes are unchecked.

        Raises:
            ConfigError: an input is missing, unknown or given twice.
        """
        if len(args) == 1 and isinstance(args[0], Mapping):
            args, kwargs = (), {**cast("Mapping[str, Any]", args[0]), **kwargs}
        specs = self.metadata.inputs
        names = [spec.name for spec in specs]
        if len(args) > len(specs):
            raise ConfigError(f"{self.path.name} takes {len(specs)} inputs {names}, not {len(args)}")
        given = dict(zip(names, args, strict=False))
        twice = sorted(set(given) & set(kwargs))
        unknown = sorted(set(kwargs) - set(names) - set(self.metadata.dropped_inputs))
        given |= kwargs
        missing = [name for name in names if not isinstance(given.get(name), torch.Tensor)]
        for problem, wrong in (("given twice", twice), ("unknown", unknown), ("missing or no tensor", missing)):
            if wrong:
                raise ConfigError(f"{self.path.name}: {problem}: {wrong}; it takes {', '.join(map(str, specs))}")
        return {name: given[name] for name in names}


def open_artifact(path: str | Path) -> Artifact:
    """Open a file that `export` wrote, ready to run.

    Files of ``onnx``, ``tensorrt``, ``openvino`` and ``litert`` are data, and an ``executorch`` program is interpreted.
    A ``.pt2`` file of ``inductor`` is machine code: open only what you trust, as with any program; checksums tell
    damage, not malice. Nothing is unpickled from any.

    Args:
        path: of the file; it may have been moved or renamed.

    Raises:
        ExportError: there is no such file, it is damaged or not one of ours, or its runtime cannot open it.
        ConfigError: the suffix belongs to no target, or it is a folder (`open_buckets`).
        MissingExtraError: its runtime is not installed.

    Example:
        >>> open_artifact("model.onnx")
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.ExportError: no file 'model.onnx'
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder: open_buckets opens what export_buckets wrote")
    target = find_target(path)
    if not path.is_file():
        raise ExportError(f"no file {str(path)!r}")
    target.require()
    metadata = target.read_metadata(path)
    written_for = target_types().get(metadata.target)  # several targets may write one kind of file
    if written_for is None:
        raise ExportError(f"{path.name} was written for target {metadata.target!r}, which is not known here")
    written_for.require()
    return Artifact(path, metadata, load_file(written_for, path, metadata))


def verified(metadata: Metadata, result: Verification) -> Metadata:
    """Return the metadata with the figures of a verification."""
    figures = {name: value for name, value in vars(result).items() if value == value and abs(value) != float("inf")}
    return replace(metadata, verification=figures)
