"""cache_teacher: run a teacher once over data and keep its largest logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.distill.cache import (
    MANIFEST,
    CacheInfo,
    TeacherCache,
    sha256_of,
    write_manifest,
)
from torchopt_passes.callbacks.distill.example_keys import example_keys, key_columns
from torchopt_passes.callbacks.distill.inputs import to_model, token_mask
from torchopt_passes.callbacks.distill.vocabulary import vocabulary_fingerprint
from torchopt_passes.callbacks.student import unwrap
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.top_k import keep_top_k
from torchopt_passes.graph.fingerprint import fingerprint
from torchopt_passes.graph.verify import in_eval_mode
from torchopt_passes.progress import track

__all__ = ["cache_teacher"]


def cache_teacher(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    top_k: int = 64,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    logits: str = "logits",
    index: str = "",
    shard_positions: int = 65_536,
    tokenizer: Any = None,
) -> TeacherCache:
    """Run a teacher over batches and write its top-k logits to a folder; one that was broken off goes on.

    Examples that are in the folder already are not run again: after a kill, call it again with the same teacher and
    data, and at most the examples of one unfinished shard are computed twice. Padding is not kept.

    Args:
        teacher: runs in eval mode, without gradients, on its own device.
        batches: of keyword inputs, as the student gets them in training: a DataLoader, in any order.
        folder: where to.
        top_k: how many logits of a position to keep; all C for few classes.
        temperatures: for which to keep the mass of the other classes: the loss can have these.
        logits: name of the teacher's output, (B, C) or (B, T, C).
        index: the column that numbers the examples, where inputs are changed at random or expensive to hash; empty to
            find examples by a hash of their inputs.
        shard_positions: positions in one file.
        tokenizer: the teacher's, of which a checksum is kept: ``Distillation(cache, tokenizers=student's)`` then
            refuses another one.

    Returns:
        The cache.

    Raises:
        ConfigError: the folder has the cache of another teacher or with other options; logits of another shape; a
            loader that yields no mappings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        cache = TeacherCache(folder)
        known, before = set(cache.keys), cache.info
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else: give an empty folder")
    else:
        known, before = set[bytes](), None
    writer = _Writer(folder, before, known, shard_positions)
    model = unwrap(teacher)
    weights, config = fingerprint(model), getattr(model, "config", None)
    with in_eval_mode(teacher):
        for batch in track(batches, "Caching the teacher"):
            columns = key_columns(batch, with_labels=bool(getattr(config, "is_encoder_decoder", False)))
            keys = example_keys(batch, columns, index)
            new = [place for place, key in enumerate(keys) if key not in writer.known]
            if new:
                found, valid = _answer(teacher, batch, logits)
                writer.start(
                    CacheInfo(
                        teacher=type(model).__name__,
                        fingerprint=weights,
                        classes=found.shape[-1],
                        top_k=top_k,
                        temperatures=tuple(map(float, temperatures)),
                        logits=logits,
                        index=index,
                        columns=() if index else columns,
                        tokenizer="" if tokenizer is None else vocabulary_fingerprint(tokenizer),
                    )
                )
                for place in new:
                    writer.add(keys[place], found[place] if valid is None else found[place][valid[place]])
    writer.flush()
    return TeacherCache(folder)


class _Writer:
    """Gathers examples and writes a shard whenever there are enough; the manifest follows each shard."""

    def __init__(self, folder: Path, before: CacheInfo | None, known: set[bytes], shard_positions: int) -> None:
        self._folder, self._before, self.known, self._limit = folder, before, known, shard_positions
        self._info: CacheInfo | None = None
        self._keys: list[bytes] = []
        self._kept: list[dict[str, torch.Tensor]] = []

    def start(self, info: CacheInfo) -> None:
        if self._info is not None:
            if info.same_teacher != self._info.same_teacher:
                raise ConfigError(f"batches differ: {_difference(info, self._info)}")
            return
        if self._before is not None and info.same_teacher != self._before.same_teacher:
            raise ConfigError(
                f"{self._folder} has the cache of another teacher or with other options: "
                f"{_difference(info, self._before)}; give another folder"
            )
        self._info = self._before or info

    def add(self, key: bytes, logits: torch.Tensor) -> None:
        if self._info is None or key in self.known:
            return
        kept = [keep_top_k(logits, self._info.top_k, temperature) for temperature in self._info.temperatures]
        self._kept.append(
            {
                "values": kept[0].values.to(torch.float16).cpu(),
                "indices": kept[0].indices.to(torch.uint16 if self._info.classes <= 2**16 else torch.int32).cpu(),
                "rest": torch.stack([one.rest for one in kept], -1).cpu(),
            }
        )
        self._keys.append(key)
        self.known.add(key)
        if sum(len(one["rest"]) for one in self._kept) >= self._limit:
            self.flush()

    def flush(self) -> None:
        if self._info is None or not self._keys:
            return
        tensors = {name: torch.cat([one[name] for one in self._kept]) for name in self._kept[0]}
        lengths = torch.tensor([len(one["rest"]) for one in self._kept])
        tensors["ends"] = lengths.cumsum(0)
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(len(self._keys), -1)
        name = f"logits-{len(self._info.shards):05d}.safetensors"
        partial = self._folder / f".{name}.partial"
        save_file(tensors, partial)
        shard = (name, sha256_of(partial), len(self._keys), int(lengths.sum()))
        partial.replace(self._folder / name)
        self._info = replace(self._info, shards=(*self._info.shards, shard))
        write_manifest(self._folder, self._info)
        self._keys, self._kept = [], []


def _answer(teacher: nn.Module, batch: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits as (B, P, C), and which positions are no padding, bool (B, P)."""
    model = unwrap(teacher)
    takes_labels = outputs.accepts(model, "labels")
    device = next((parameter.device for parameter in model.parameters()), None)
    kwargs = to_model({k: v for k, v in batch.items() if takes_labels or k != "labels"}, device, None)
    kwargs = {k: v for k, v in kwargs.items() if outputs.accepts(model, k)}
    found = outputs.field(teacher(**kwargs), name, "teacher")
    if found.ndim == 2:
        return found.unsqueeze(1), None
    if found.ndim != 3:
        raise ConfigError(f"a cache holds logits (B, C) and (B, T, C), not {tuple(found.shape)}")
    valid = token_mask(model, (), kwargs, "decoder")
    if valid is not None and valid.shape != found.shape[:2]:
        valid = None
    return found, valid


def _difference(one: CacheInfo, other: CacheInfo) -> str:
    ours, theirs = one.same_teacher, other.same_teacher
    return ", ".join(f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name])
