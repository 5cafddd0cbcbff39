"""Names of examples: what a cache finds a teacher's answer by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.errors import CallbackError

__all__ = ["KEY_BYTES", "example_keys", "key_columns"]

KEY_BYTES = 16

_MASKS = {"attention_mask": 0, "decoder_attention_mask": 0}
_NEVER = ("labels", "num_items_in_batch", "return_loss")


def key_columns(batch: Mapping[str, Any], *, with_labels: bool) -> tuple[str, ...]:
    """Return the columns of a batch that the teacher's answer depends on, sorted.

    Args:
        batch: name -> value.
        with_labels: whether it depends on the labels too, as that of an encoder-decoder, which reads them.
    """
    tensors = [name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim > 0]
    left_out = {*_NEVER, *_MASKS} - ({"labels"} if with_labels else set())
    return tuple(sorted(name for name in tensors if name not in left_out))


def example_keys(batch: Mapping[str, Any], columns: Sequence[str], index: str = "") -> list[bytes]:
    """Return 16 bytes for each example: its number where the batch has it, else a hash of what the teacher reads.

    Padding is left out, so that the same sentence has the same key in any batch: tokens whose attention mask is 0, and
    labels of -100.

    Args:
        batch: name -> tensor with one row for each example.
        columns: of `key_columns`.
        index: the column of the examples' numbers; empty for a hash.

    Raises:
        CallbackError: a column is missing.

    Example:
        >>> short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0]])
        >>> one = example_keys({"input_ids": short, "attention_mask": torch.ones(1, 2)}, ["input_ids"])
        >>> one == example_keys({"input_ids": padded, "attention_mask": torch.tensor([[1, 1, 0]])}, ["input_ids"])
        True
    """
    missing = [name for name in ((index,) if index else columns) if name not in batch]
    if missing:
        raise CallbackError(
            f"the cache finds examples by {missing}, but the batch has {sorted(batch)} (in the Trainer, set "
            "remove_unused_columns=False)"
        )
    if index:
        return [int(number).to_bytes(KEY_BYTES, "big", signed=True) for number in batch[index].tolist()]
    rows = {name: _rows(batch, name) for name in columns}
    return [_hash({name: found[place] for name, found in rows.items()}) for place in range(len(rows[columns[0]]))]


def _rows(batch: Mapping[str, Any], name: str) -> list[torch.Tensor]:
    column = batch[name].detach().cpu()
    if name == "labels":
        return [row[row != IGNORE_INDEX] for row in column]
    mask = batch.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == column.shape:
        return [row[kept] for row, kept in zip(column, mask.detach().cpu() != 0, strict=True)]
    return list(column)


def _hash(row: Mapping[str, torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name, value in row.items():
        plain = value.to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
        digest.update(f"{name} {tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
