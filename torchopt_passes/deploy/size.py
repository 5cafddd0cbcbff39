"""Sizes on disk, raw and compressed."""

from __future__ import annotations

import zlib
from pathlib import Path

__all__ = ["compressed_size"]


def compressed_size(path: str | Path, *, level: int = 9) -> int:
    """Return the bytes a file takes once compressed by zlib: what is sent over a network, or what sparsity saves.

    Args:
        path: the file.
        level: 1 (fast) to 9 (small).

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(bytes(100_000)); file.flush()
        ...     compressed_size(file.name) < 200
        True
    """
    compressor = zlib.compressobj(level)
    total = 0
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            total += len(compressor.compress(block))
    return total + len(compressor.flush())
