"""A checksum that tells the weights of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from torchopt_passes._compat import plain_parts
from torchopt_passes.graph.tensors import named_tensors

__all__ = ["fingerprint", "fingerprint_of"]


def fingerprint(module: nn.Module) -> str:
    """Return a checksum of a module's parameters and buffers, names, dtypes and shapes included (SHA-256, hex).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = fingerprint(model)
        >>> before == fingerprint(model), before == fingerprint(nn.Linear(2, 1))
        (True, False)
    """
    return fingerprint_of(named_tensors(module))


def fingerprint_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a checksum of tensors and their names; of quantized ones, of what they are made of."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        for part in plain_parts(tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
