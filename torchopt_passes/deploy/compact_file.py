"""The file of compact tensors: a ``.safetensors`` file of byte runs, each compressed, and a manifest with checksums.

Any reader of safetensors opens it. The header's ``torchopt_passes.compact`` is the manifest, JSON: for each tensor its
`functional.compact.Layout` and, for each run of bytes, the name of the safetensors entry, its size, its compression and
the SHA-256 of what it expands to; the header's ``sha256`` is that of the manifest. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from torchopt_passes.errors import ConfigError, ExportError, MissingExtraError
from torchopt_passes.functional.compact import Bytes, Layout, compact, expand

__all__ = ["Compression", "read_manifest", "read_tensors", "write_tensors"]

Compression = Literal["none", "zlib", "zstd"]
"""How byte runs are compressed; one that does not shrink is kept as it is."""

_KEY, _SUM, _FORMAT = "torchopt_passes.compact", "sha256", 1
_ZLIB_LEVEL, _ZSTD_LEVEL = 6, 12


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, compression: Compression, **facts: Any
) -> dict[str, Any]:
    """Write tensors to a file, each in its fewest bytes; one that is given under several names is written once.

    Args:
        tensors: by name.
        path: the file, replaced when it exists.
        compression: of the byte runs.
        facts: more of the manifest, JSON.

    Returns:
        The manifest.

    Raises:
        ExportError: a tensor cannot be written; names it.
        MissingExtraError: zstd, without the package.
    """
    entries: dict[str, Bytes] = {}
    written: dict[str, Any] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        if (same := first.setdefault(_identity(tensor), name)) != name:
            written[name] = {"same_as": same}
            continue
        try:
            layout, parts = compact(tensor)
        except ConfigError as error:
            raise ExportError(f"{name} cannot be written: {error}") from error
        runs: dict[str, Any] = {}
        for part, raw in parts.items():
            entry = f"{len(written)}.{part}"
            stored, how = _compress(_planes(raw, _width(layout, part)), compression)
            entries[entry] = np.frombuffer(stored, dtype=np.uint8)
            runs[part] = {"entry": entry, "bytes": len(raw), "compression": how, "sha256": _sha256(raw)}
        written[name] = {**_layout_to_data(layout), "parts": runs}
    manifest = {"format": _FORMAT, "tensors": written, **facts}
    text = json.dumps(manifest, allow_nan=False)
    save_file(entries, path, {_KEY: text, _SUM: _sha256(text.encode()), "format": "pt"})
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a file, with the bytes that each run takes in it (``stored``).

    Raises:
        ExportError: there is no such file, or it is damaged, or not one of ours.
    """
    return _open(path)[0]


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a file, bit for bit what was written, and the manifest.

    What was one tensor under several names is one again.

    Raises:
        ExportError: there is no such file, or it is damaged; names the tensor.
        MissingExtraError: it is compressed by zstd, and the package is not there.
    """
    manifest, entries = _open(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, item in manifest["tensors"].items():
        try:
            if "same_as" in item:
                tensors[name] = tensors[item["same_as"]]
                continue
            layout = _layout_from_data(item)
            parts = {
                part: _planes_back(_expand_run(run, entries[run["entry"]]), _width(layout, part))
                for part, run in item["parts"].items()
            }
            for part, raw in parts.items():
                if _sha256(raw) != item["parts"][part]["sha256"]:
                    raise ConfigError(f"the checksum of its {part} differs")
            tensors[name] = expand(layout, parts)
        except MissingExtraError:
            raise
        except Exception as error:  # whatever a damaged file makes go wrong
            raise ExportError(f"{path.name} is damaged at {name!r}: {error}") from error
    return tensors, manifest


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Bytes]]:
    from safetensors import safe_open

    if not path.is_file():
        raise ExportError(f"no file {str(path)!r}")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path.name} is damaged, or no compact file: {error}") from error
    if _KEY not in header:
        raise ExportError(f"{path.name} is a plain safetensors file, not one that save_compact wrote")
    if header.get(_SUM) != _sha256(header[_KEY].encode()):
        raise ExportError(f"{path.name} is damaged: the checksum of its manifest differs")
    try:
        manifest: dict[str, Any] = json.loads(header[_KEY])
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']} is of another version of torchopt_passes")
        runs = [run for item in manifest["tensors"].values() for run in item.get("parts", {}).values()]
        for run in runs:
            run["stored"] = int(entries[run["entry"]].nbytes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"the manifest of {path.name} cannot be read: {error!r}") from error
    return manifest, entries


def _identity(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _layout_to_data(layout: Layout) -> dict[str, Any]:
    return {**vars(layout), "shape": list(layout.shape), "dtype": str(layout.dtype).removeprefix("torch.")}


def _layout_from_data(item: Mapping[str, Any]) -> Layout:
    dtype = getattr(torch, str(item["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"no dtype {item['dtype']!r}")
    numbers = {name: int(item[name]) for name in ("kept", "levels")}
    return Layout(shape=tuple(map(int, item["shape"])), dtype=dtype, zeros=item["zeros"], **numbers)


def _width(layout: Layout, part: str) -> int:
    """Return how many bytes a value of a run has, whose first, second, ... bytes are written together."""
    return layout.dtype.itemsize if part == "levels" or (part == "values" and not layout.levels) else 1


def _planes(raw: Bytes, width: int) -> Bytes:
    """Return the first bytes of all values, then the second ones: sign and exponent compress, the mantissa does not."""
    return np.ascontiguousarray(raw.reshape(-1, width).T).reshape(-1)


def _planes_back(planes: Bytes, width: int) -> Bytes:
    return np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)


def _sha256(data: Bytes | bytes) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def _compress(raw: Bytes, compression: Compression) -> tuple[bytes, Compression]:
    data = raw.tobytes()
    if compression == "zlib":
        packed = zlib.compress(data, _ZLIB_LEVEL)
    elif compression == "zstd":
        packed = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
    elif compression == "none":
        packed = data
    else:
        raise ConfigError(f'compression must be "none", "zlib" or "zstd", not {compression!r}')
    return (packed, compression) if len(packed) < len(data) else (data, "none")


def _expand_run(run: Mapping[str, Any], stored: Bytes) -> Bytes:
    """Return the bytes of a run; no more than the manifest says, whatever the compressed bytes would grow to."""
    size, data = int(run["bytes"]), stored.tobytes()
    if run["compression"] == "zlib":
        data = zlib.decompressobj().decompress(data, size + 1)
    elif run["compression"] == "zstd":
        zstandard = _zstandard()
        if zstandard.frame_content_size(data) != size:
            raise ConfigError(f"its zstd frame is not of {size} bytes")
        data = zstandard.ZstdDecompressor().decompress(data)
    elif run["compression"] != "none":
        raise ConfigError(f"compressed by {run['compression']!r}, which is not known here")
    if len(data) != size:
        raise ConfigError(f"{len(data)} bytes, {size} are wanted")
    return np.frombuffer(data, dtype=np.uint8)


def _zstandard() -> Any:
    try:
        import zstandard  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingExtraError("zstandard", "zstd") from error
    return zstandard
