"""TeacherCache: the logits of a teacher on disk, so that it runs once and not in every epoch."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from torchopt_passes.callbacks.distill.example_keys import KEY_BYTES
from torchopt_passes.errors import CallbackError, ConfigError, TorchOptError
from torchopt_passes.graph.record import Record

__all__ = ["MANIFEST", "CacheInfo", "Shard", "TeacherCache", "read_manifest", "sha256_of", "write_manifest"]

MANIFEST = "cache.json"
_FORMAT = "torchopt_passes teacher cache, 1"
_OPEN_FILES = 16


class Shard(NamedTuple):
    """One file of a cache.

    Args:
        file: its name in the folder.
        sha256: of its bytes.
        examples: how many are in it.
        positions: how many they have in all.
    """

    file: str
    sha256: str
    examples: int
    positions: int


class CacheInfo(Record):
    """What a cache holds, and of which teacher.

    Args:
        teacher: name of its class.
        fingerprint: checksum of its weights.
        classes: C, the number of its classes or tokens.
        top_k: how many logits of a position are kept.
        temperatures: those for which the mass of the other classes is kept.
        logits: name of the output.
        index: the column that numbers the examples; empty where they are found by a hash of the inputs.
        columns: what is hashed.
        shards: the files: name, SHA-256, examples, positions.
        tokenizer: checksum of the vocabulary that the inputs are written in; empty where none was given.
    """

    teacher: str
    fingerprint: str
    classes: int
    top_k: int
    temperatures: tuple[float, ...]
    logits: str
    index: str
    columns: tuple[str, ...]
    shards: tuple[tuple[str, str, int, int], ...] = field(default=())
    tokenizer: str = ""

    error_class: ClassVar[type[TorchOptError]] = ConfigError

    def check(self) -> None:
        """Refuse what no writer writes."""
        if not 1 <= self.top_k <= self.classes or not self.temperatures or min(self.temperatures) <= 0.0:
            raise ConfigError(f"a cache of {self.top_k} of {self.classes} classes at {self.temperatures} is none")
        for file, *_ in self.shards:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConfigError(f"the manifest names {file!r}: shards lie beside it as NAME.safetensors")

    @property
    def same_teacher(self) -> dict[str, Any]:
        """All that must be equal for two caches to be one."""
        return {name: value for name, value in self.to_dict().items() if name != "shards"}


class TeacherCache:
    """A folder of a teacher's top-k logits, made by `cache_teacher`: ``Distillation(TeacherCache("folder"))``.

    It holds ``cache.json`` and safetensors files. A position takes 2 bytes for each logit, 2 for its class (4 beyond
    65,536 classes), and 4 for each temperature: 268 bytes for 64 of 50,257 tokens at 3 temperatures. Logits are kept in
    float16, less the largest one of the position; the mass of all other classes is kept for the temperatures that were
    named, so that `SoftTargets` is the divergence of k + 1 outcomes (`functional.top_k.top_k_divergence`). A cache of
    all classes (``top_k`` = C) serves every loss on logits at any temperature.

    Args:
        folder: where it is.

    Raises:
        ConfigError: there is no cache, or its manifest is corrupted. A shard is checked against its checksum when
            it is first read; `verify` checks all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = read_manifest(self.folder)
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        for number in range(len(self.info.shards)):
            self._index(number)

    def __len__(self) -> int:
        """How many examples it holds."""
        return len(self._places)

    @property
    def keys(self) -> frozenset[bytes]:
        """The keys of its examples, see `example_keys`."""
        return frozenset(self._places)

    def __repr__(self) -> str:
        info = self.info
        return f"TeacherCache({str(self.folder)!r}: {len(self)} examples, {info.top_k} of {info.classes} classes)"

    @property
    def positions(self) -> int:
        """How many positions it holds: tokens, or examples."""
        return sum(Shard(*shard).positions for shard in self.info.shards)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum((self.folder / Shard(*shard).file).stat().st_size for shard in self.info.shards)

    def verify(self) -> None:
        """Check every file against its checksum.

        Raises:
            CallbackError: one is corrupted.
        """
        for number in range(len(self.info.shards)):
            self._check(number)

    def lookup(self, keys: Sequence[bytes]) -> list[dict[str, torch.Tensor]]:
        """Return what was kept of examples: ``values`` (P, k), ``indices`` (P, k), ``rest`` (P, temperatures) each.

        Raises:
            CallbackError: an example is not in the cache, or its file is corrupted.
        """
        missing = [key for key in keys if key not in self._places]
        if missing:
            how = f"numbers in {self.info.index!r}" if self.info.index else f"inputs {list(self.info.columns)}"
            raise CallbackError(
                f"{len(missing)} of {len(keys)} examples are not in the cache {self.folder} ({len(self)} examples, "
                f"found by their {how}): it was made of other data, or the data are changed at random in each epoch; "
                "cache_teacher adds what is missing"
            )
        return [self._read(key) for key in keys]

    def _read(self, key: bytes) -> dict[str, torch.Tensor]:
        number, start, stop = self._places[key]
        self._check(number)
        file = self._open(number)
        return {name: file.get_slice(name)[start:stop] for name in ("values", "indices", "rest")}

    def _index(self, number: int) -> None:
        shard = Shard(*self.info.shards[number])
        file = self._open(number)
        keys, ends = file.get_tensor("keys"), file.get_tensor("ends").tolist()
        sizes = [*file.get_slice("values").get_shape(), *file.get_slice("rest").get_shape()]
        expected = [shard.positions, self.info.top_k, shard.positions, len(self.info.temperatures)]
        if keys.shape != (shard.examples, KEY_BYTES) or sizes != expected or ends != sorted(ends):
            raise ConfigError(f"{self.folder / shard.file} is not the file that the manifest tells of")
        start = 0
        for key, stop in zip(keys.numpy(), ends, strict=True):
            self._places.setdefault(key.tobytes(), (number, start, stop))
            start = stop

    def _open(self, number: int) -> Any:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        path = self.folder / Shard(*self.info.shards[number]).file
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; delete it and cache again") from error
        self._files[number] = file
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _check(self, number: int) -> None:
        if number in self._checked:
            return
        shard = Shard(*self.info.shards[number])
        if sha256_of(self.folder / shard.file) != shard.sha256:
            raise CallbackError(
                f"{self.folder / shard.file} is corrupted (checksum): delete it and its line in {MANIFEST}, and run "
                "cache_teacher again"
            )
        self._checked.add(number)


def read_manifest(folder: Path) -> CacheInfo:
    """Return what a folder's manifest says, strictly.

    Raises:
        ConfigError: there is none, or it is corrupted.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(f"there is no teacher cache at {folder}: make one, cache_teacher(teacher, batches, folder)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, Mapping) or cast("Mapping[str, Any]", data).get("format") != _FORMAT:
        raise ConfigError(f"{path} is no manifest of a teacher cache of this version")
    return CacheInfo.from_dict({name: value for name, value in data.items() if name != "format"})


def write_manifest(folder: Path, info: CacheInfo) -> None:
    """Put a manifest in place; it is there whole or not at all."""
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps({"format": _FORMAT, **info.to_dict()}, indent=1, allow_nan=False), encoding="utf-8")
    partial.replace(folder / MANIFEST)


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
