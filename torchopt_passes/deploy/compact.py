"""save_compact and load_compact: weights in files as small as what they hold, and back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import nn

from torchopt_passes.deploy.compact_file import Compression, read_manifest, read_tensors, write_tensors
from torchopt_passes.deploy.files import staged
from torchopt_passes.errors import ConfigError, ExportError, VerificationError
from torchopt_passes.graph.captured import CapturedModule
from torchopt_passes.graph.saving import captured_from_data, captured_to_data

__all__ = ["CompactReport", "CompactTensor", "compact_report", "load_compact", "read_compact", "save_compact"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_STATE, _INPUT, _GRAPH = "state/", "input/", "graph"


@dataclass(frozen=True, kw_only=True)
class CompactTensor:
    """How one tensor lies in a compact file.

    Args:
        name: of the tensor.
        dtype: such as ``"float32"``.
        shape: its sizes.
        layout: ``"dense"``, ``"bitmask"`` or ``"gaps"`` for the zeros, then ``"16 levels"`` where values repeat.
        dense: bytes of the tensor in memory.
        plain: bytes of its runs before compression.
        stored: bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    dense: int
    plain: int
    stored: int


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What a compact file saves.

    Args:
        path: of the file.
        tensors: one for each tensor; one that stands under several names, once.
        size: bytes on disk.
    """

    path: Path
    tensors: tuple[CompactTensor, ...]
    size: int

    @property
    def dense(self) -> int:
        """Bytes of all tensors in memory: the size of a plain safetensors file, but for its header."""
        return sum(tensor.dense for tensor in self.tensors)

    @property
    def plain(self) -> int:
        """Bytes before compression: what leaving out zeros and repeated values saves by itself."""
        return sum(tensor.plain for tensor in self.tensors)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each tensor, for tables and JSON."""
        return [asdict(tensor) for tensor in self.tensors]

    def __str__(self) -> str:
        ratio = self.dense / max(self.size, 1)
        return f"{self.path.name}: {self.size} bytes, {self.dense} dense ({ratio:.2f}x), {self.plain} uncompressed"


def save_compact(
    source: nn.Module | Mapping[str, torch.Tensor], path: str | Path, *, compression: Compression = "zlib"
) -> CompactReport:
    """Write a model's weights to one file in which zeros and repeated values take no room.

    Each tensor is written in the smallest of these forms, chosen by counting bytes: as it is; its non-zeros with a
    bitmask, or with the gaps between them where they are few; and either of them with the values as packed indices into
    a table, where there are 256 different ones at most (clustered weights, small integers). The file is read back and
    compared bit for bit before it is put in place.

    Args:
        source: a captured graph, which is saved whole and loads without the model's code; any other module, or a state
            dict of tensors, of which the state dict is saved.
        path: the file; it is replaced when it exists.
        compression: of what is left: ``"zlib"``, of the standard library; ``"zstd"``, about as small and faster, with
            the extra ``zstd``; ``"none"``.

    Returns:
        Sizes, by tensor and of the file.

    Raises:
        ExportError: a tensor cannot be written (a subclass, sparse, on the meta device), the folder is not there or the
            disk full; nothing was left behind.
        MissingExtraError: zstd is not installed.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(1000, 100)
        >>> _ = layer.weight.data.masked_fill_(layer.weight.abs() < 0.03, 0)  # 95 % are below
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_compact(layer, f"{folder}/model.compact")
        ...     again = load_compact(f"{folder}/model.compact", nn.Linear(1000, 100))
        >>> report.tensors[0].layout, report.dense // report.size >= 15, torch.equal(again.weight, layer.weight)
        ('gaps', True, True)
    """
    path = Path(path)
    facts: dict[str, str] = {"kind": "state"}
    if isinstance(source, CapturedModule):
        facts["kind"] = "captured"
        data, state, inputs = captured_to_data(source)
        try:
            text = np.frombuffer(json.dumps(data, allow_nan=False).encode(), dtype=np.uint8).copy()
        except (TypeError, ValueError) as error:
            raise ExportError(f"the graph holds a value that is no data: {error}") from error
        tensors = {_STATE + name: tensor for name, tensor in state.items()}
        tensors |= {_INPUT + name: tensor for name, tensor in inputs.items()}
        tensors[_GRAPH] = torch.from_numpy(text)
    else:
        found = source.state_dict() if isinstance(source, nn.Module) else source
        tensors = dict(found)
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - extra state
                raise ExportError(f"{name} is a {type(value).__name__}, not a tensor: leave it out of the state dict")
    with staged(path) as place:
        write_tensors(tensors, place, compression, **facts)
        again, _ = read_tensors(place)
        for name, tensor in tensors.items():
            if not _same_bits(tensor, again[name]):
                raise VerificationError(f"{path.name}: {name} was not read back as it was written")
    return compact_report(path)


def read_compact(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a compact file; tied tensors are one object, on the CPU.

    Args:
        path: of the file.

    Raises:
        ExportError: there is no such file, or it is damaged; names the tensor.
        MissingExtraError: it was written with zstd, which is not installed.
    """
    tensors, manifest = read_tensors(Path(path))
    if manifest.get("kind") != "captured":
        return tensors
    entries = json.loads(tensors[_GRAPH].numpy().tobytes())["state"]
    names = {entry.get("parameter") or entry.get("buffer"): entry for entry in entries if "module" not in entry}
    return {name: tensors[_STATE + entry["tensor"]] for name, entry in names.items() if entry["persistent"]}


@overload
def load_compact(path: str | Path) -> CapturedModule: ...
@overload
def load_compact(path: str | Path, model: ModuleT) -> ModuleT: ...
def load_compact(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save_compact` wrote, bit for bit; nothing in the file is executed or unpickled.

    Args:
        path: of the file.
        model: takes the weights, in place; None for a file that holds a captured graph.

    Returns:
        The model, or the captured graph in the mode it was saved in.

    Raises:
        ExportError: the file is damaged or holds other tensors than the model; the model is as it was.
        ConfigError: without a model, the file holds weights alone.
        MissingExtraError: it was written with zstd, which is not installed.
    """
    path = Path(path)
    if model is not None:
        _load_into(model, read_compact(path), path.name)
        return model
    tensors, manifest = read_tensors(path)
    if manifest.get("kind") != "captured":
        raise ConfigError(f"{path.name} holds weights alone: load_compact(path, model), or read_compact(path)")
    state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
    inputs = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
    try:
        return captured_from_data(json.loads(tensors[_GRAPH].numpy().tobytes()), state, inputs)
    except Exception as error:  # whatever a file that was made by hand makes go wrong
        raise ExportError(f"{path.name} holds no captured graph that can be read: {error}") from error


def compact_report(path: str | Path) -> CompactReport:
    """Return what a compact file holds, tensor by tensor; the tensors are not expanded.

    Args:
        path: of the file.

    Raises:
        ExportError: there is no such file, or it is damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    tensors = manifest["tensors"]
    captured = manifest.get("kind") == "captured"
    rows = [_row(name.removeprefix(_STATE) if captured else name, item) for name, item in tensors.items()]
    return CompactReport(path=path, tensors=tuple(row for row in rows if row is not None), size=path.stat().st_size)


def _row(name: str, item: Mapping[str, Any]) -> CompactTensor | None:
    if "same_as" in item:
        return None
    dtype: torch.dtype = getattr(torch, item["dtype"])
    shape = tuple(item["shape"])
    layout = "dense" if item["zeros"] == "none" else item["zeros"]
    return CompactTensor(
        name=name,
        dtype=item["dtype"],
        shape=shape,
        layout=f"{layout}, {item['levels']} levels" if item["levels"] else layout,
        dense=int(np.prod(shape, dtype=np.int64)) * dtype.itemsize,
        plain=sum(run["bytes"] for run in item["parts"].values()),
        stored=sum(run["stored"] for run in item["parts"].values()),
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*raw)


def _load_into(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    wanted = model.state_dict()
    kind = type(model).__name__
    if missing := sorted(set(wanted) - set(state)):
        raise ExportError(f"{name} has no {missing[0]!r}, which {kind} has ({len(missing)} names)")
    if unknown := sorted(set(state) - set(wanted)):
        raise ExportError(
            f"{name} has {unknown[0]!r}, which {kind} has not ({len(unknown)} names): a plan that "
            "stores weights another way must be applied to the model first"
        )
    for fqn, tensor in wanted.items():
        if tensor.shape != state[fqn].shape or tensor.dtype != state[fqn].dtype:
            ours, theirs = ((tuple(t.shape), t.dtype) for t in (tensor, state[fqn]))
            raise ExportError(f"{fqn} is {theirs[1]} {theirs[0]} in {name}, {ours[1]} {ours[0]} in {kind}")
    model.load_state_dict(state)
