"""Sequences of any length on files of a few fixed ones: a call is padded to the smallest that fits, and cut back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchopt_passes.deploy.artifact import Artifact, open_artifact
from torchopt_passes.deploy.calls import batch_size, named_inputs, resize_batch
from torchopt_passes.deploy.verify import Verification
from torchopt_passes.errors import ConfigError, ExportError, VerificationError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.record import Record

__all__ = ["MANIFEST", "Buckets", "Padding", "cut", "length_of", "open_buckets", "padded", "write_manifest"]

MANIFEST = "buckets.json"
_FORMAT = 1


class Padding(Record):
    """How a call is padded, and which of what comes back is padding.

    Args:
        values: what dim 1 of each input is filled up with, by name.
        sequences: the dims of each output, by name, that are as long as the inputs.
        batches: the dims of each output, by name, that are as large as the batch.
    """

    values: dict[str, int | float]
    sequences: dict[str, tuple[int, ...]]
    batches: dict[str, tuple[int, ...]]


class Buckets:
    """A model in files of several sequence lengths; made by `export_buckets` and `open_buckets`.

    Call it as an `Artifact`, with sequences of any length up to the longest. The call is padded to the smallest bucket
    that holds it, runs there, and comes back at its own length.

    Args:
        artifacts: one for each bucket; dim 1 of their padded inputs is fixed, the batch fixed or open.
        padding: of the calls.
        verification: figures of the comparison with the source, unpadded.

    Attributes:
        sizes: the batch (0: open) and the length of each of `artifacts`.

    Raises (on a call):
        ConfigError: an input is missing, unknown, longer than every bucket or of the wrong dtype; names it.
    """

    def __init__(
        self, artifacts: Sequence[Artifact], padding: Padding, verification: Mapping[str, float] | None = None
    ) -> None:
        self.artifacts = tuple(sorted(artifacts, key=lambda artifact: _size_of(artifact, padding)[::-1]))
        self.sizes = tuple(_size_of(artifact, padding) for artifact in self.artifacts)
        self.padding = padding
        self.verification = dict(verification or {})

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        """Run the model (see the class)."""
        results = self._run(self.artifacts[0].named(args, kwargs))
        return next(iter(results.values())) if len(results) == 1 else results

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the folder."""
        manifest = self.artifacts[0].path.with_name(MANIFEST)
        return (manifest, *(file for artifact in self.artifacts for file in artifact.files))

    @property
    def size(self) -> int:
        """Bytes on disk: each bucket has its own copy of the weights."""
        return sum(file.stat().st_size for file in self.files)

    def report(self) -> list[dict[str, Any]]:
        """Return what is known of each bucket: its length (tokens), its batch, and `Artifact.report`."""
        rows: list[dict[str, Any]] = []
        for artifact, (batch, length) in zip(self.artifacts, self.sizes, strict=True):
            rows.append({"length": length, "batch": batch or "open", **artifact.report()})
        return rows

    def verify(self, module: nn.Module, *calls: Any, tolerance: float | None = None) -> Verification:
        """Compare with the model it came from, which is not padded.

        Args:
            module: the source; run in eval mode, and untouched.
            *calls: calls of the source, each a tensor, a tuple, a dict, or ``(args, kwargs)``.
            tolerance: the largest error allowed (see `Verification`).

        Raises:
            VerificationError: the error is larger; gives the figures.
        """
        given = [as_call(call) for call in calls]
        names = [spec.name for spec in self.artifacts[0].metadata.outputs]
        results = [self._run(self.artifacts[0].named((), named_inputs(module, call))) for call in given]
        found = [[result[name] for name in names] for result in results]
        result = self.artifacts[0].compare(found, module, given, tolerance=tolerance)
        if not result.passed:
            raise VerificationError(f"the buckets are not what {type(module).__name__} computes unpadded: {result}")
        return result

    def __repr__(self) -> str:
        shown = ", ".join(f"{batch or 'batch'} x {length}" for batch, length in self.sizes)
        return f"Buckets({str(self.artifacts[0].path.parent)!r}, {self.size} bytes: {shown})"

    def _run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        length = length_of(inputs, self.padding.values)
        rows = batch_size(((), inputs)) or 1
        artifact, batch, longest = self._bucket(rows, length)
        result = artifact(**padded(inputs, self.padding, longest, batch or rows))
        results = result if isinstance(result, dict) else {artifact.metadata.outputs[0].name: result}
        return cut(results, self.padding, length, rows)

    def _bucket(self, rows: int, length: int) -> tuple[Artifact, int, int]:
        for artifact, (batch, longest) in zip(self.artifacts, self.sizes, strict=True):
            if length <= longest and (not batch or rows <= batch):
                return artifact, batch, longest
        most, longest = (max(column) for column in zip(*self.sizes, strict=True))
        if length > longest:
            names = " and ".join(self.padding.values)
            raise ConfigError(
                f"{names}: {length} long, and the longest bucket is {longest}: cut them (of a tokenizer: "
                f"truncation=True, max_length={longest}), or export a longer bucket"
            )
        raise ConfigError(f"a batch of {rows}: the largest bucket takes {most}: split it, or export batches={rows}")


def open_buckets(folder: str | Path) -> Buckets:
    """Open a folder that `export_buckets` wrote, every file of it; see `open_artifact` for what may be trusted.

    Args:
        folder: it may have been moved or renamed.

    Raises:
        ExportError: there is no such folder, or any of its files is missing, damaged or of another export.
        MissingExtraError: the runtime is not installed.

    Example:
        >>> open_buckets("bert")
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.ExportError: no file 'bert/buckets.json'
    """
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise ExportError(f"no file {str(manifest)!r}")
    try:
        data: dict[str, Any] = json.loads(manifest.read_bytes())
        if data.pop("sha256") != _digest_of(data) or data.pop("format") != _FORMAT:
            raise ValueError("its checksum or version is another")
        padding = Padding.from_dict(data["padding"])
        names, files, figures = [str(name) for name in data["buckets"]], dict(data["files"]), dict(data["verification"])
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ExportError(f"{manifest} is damaged: {error!r}. Copy the folder again, or export it again") from error
    for name in sorted({*names, *files}):
        file = manifest.with_name(Path(name).name)
        if not file.is_file() or _sha256(file) != files.get(name):
            state = "of another export, or damaged" if file.is_file() else "missing"
            raise ExportError(f"{file} is {state}: the files of a folder of buckets belong together")
    return Buckets([open_artifact(manifest.with_name(Path(name).name)) for name in names], padding, figures)


def write_manifest(buckets: Buckets) -> None:
    """Write the manifest beside the files of `buckets`: padding, figures, and SHA-256 of every file and of itself."""
    files = [file for artifact in buckets.artifacts for file in artifact.files]
    data: dict[str, Any] = {
        "format": _FORMAT,
        "buckets": [artifact.path.name for artifact in buckets.artifacts],
        "padding": buckets.padding.to_dict(),
        "files": {file.name: _sha256(file) for file in files},
        "verification": buckets.verification,
    }
    text = json.dumps({**data, "sha256": _digest_of(data)}, allow_nan=False, indent=1)
    files[0].with_name(MANIFEST).write_text(text)


def length_of(inputs: Mapping[str, torch.Tensor], names: Mapping[str, float]) -> int:
    """Return the size of dim 1 that the padded inputs of a call share.

    Raises:
        ConfigError: one has no dim 1, or they differ.
    """
    shapes = {name: tuple(inputs[name].shape) for name in names if name in inputs}
    if short := [name for name, shape in shapes.items() if len(shape) < 2]:
        raise ConfigError(f"{short[0]}: (batch, length, ...) is wanted, not {shapes[short[0]]}")
    lengths = {shape[1] for shape in shapes.values()}
    if len(lengths) != 1:
        raise ConfigError(f"the padded inputs differ in length (dim 1): {shapes}")
    return int(lengths.pop())


def padded(inputs: Mapping[str, torch.Tensor], padding: Padding, length: int, batch: int) -> dict[str, torch.Tensor]:
    """Return inputs filled up to a length, by their padding values, and to a batch, by repeating rows.

    Example:
        >>> padding = Padding(values={"ids": 9}, sequences={}, batches={})
        >>> padded({"ids": torch.tensor([[1, 2]])}, padding, 3, 2)
        {'ids': tensor([[1, 2, 9], [1, 2, 9]])}
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in inputs.items():
        if name in padding.values:
            tail = [0, 0] * (tensor.ndim - 2)
            tensor = nn.functional.pad(tensor, [*tail, 0, length - tensor.shape[1]], value=padding.values[name])
        found[name] = tensor
    call = (), found
    return found if batch_size(call) == batch else resize_batch(call, batch)[1]


def cut(results: Mapping[str, torch.Tensor], padding: Padding, length: int, batch: int) -> dict[str, torch.Tensor]:
    """Return outputs without what belongs to the padding."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in results.items():
        for dims, size in ((padding.sequences, length), (padding.batches, batch)):
            for dim in dims.get(name, ()):
                tensor = tensor.narrow(dim, 0, size)
        found[name] = tensor
    return found


def _size_of(artifact: Artifact, padding: Padding) -> tuple[int, int]:
    """Return the batch (0: open) and the length of a bucket."""
    specs = [spec for spec in artifact.metadata.inputs if spec.name in padding.values]
    lengths = {spec.shape[1] for spec in specs if len(spec.shape) > 1}
    length = lengths.pop() if len(lengths) == 1 else ""
    if isinstance(length, str):
        raise ExportError(f"{artifact.path.name} is no bucket: its inputs are {', '.join(map(str, specs))}")
    batch = specs[0].shape[0]
    return batch if isinstance(batch, int) else 0, length


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
