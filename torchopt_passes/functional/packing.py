"""Small integers packed into bytes: 1 to 8 bits each, exact, in tensor operations alone (they export and compile)."""

from __future__ import annotations

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["pack", "packed_size", "unpack"]


def pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers into bytes.

    A width is cut into parts of 4, 2 and 1 bits (3 = 2 + 1), and each part is a run of bytes of its own: byte i of a
    part of p bits and m bytes holds the integers i, i + m, i + 2m, ... So both ways are a few operations on runs of
    memory, without a loop over integers, and only the last byte of a part is filled up.

    Args:
        indices: any shape and integer dtype, values 0 to 2^bits - 1.
        bits: 1 to 8.

    Returns:
        uint8, shape [`packed_size`].

    Raises:
        ConfigError: `bits` is out of range, or a value does not fit.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 15]), bits=4)
        tensor([ 49, 242], dtype=torch.uint8)
    """
    parts = _parts(bits)
    flat = indices.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ConfigError(f"indices from {int(flat.min())} to {int(flat.max())} do not fit into {bits} bits")
    flat = flat.to(torch.uint8)
    packed: list[torch.Tensor] = []
    for shift, width in parts:
        part = _field(flat, shift, width)
        per_byte = 8 // width
        size = -(-part.numel() // per_byte)
        runs = torch.nn.functional.pad(part, (0, size * per_byte - part.numel())).view(per_byte, size)
        byte = runs[0]
        for position in range(1, per_byte):
            byte = byte | (runs[position] << (position * width))
        packed.append(byte)
    return torch.cat(packed)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the integers that `pack` packed.

    Args:
        packed: uint8, what `pack` gave.
        bits: 1 to 8, as packed.
        count: how many there are.

    Returns:
        int32, shape [count]: what lookups take, and ONNX has no shifts of bytes.

    Example:
        >>> unpack(pack(torch.tensor([5, 0, 7, 2, 6]), bits=3), bits=3, count=5)
        tensor([5, 0, 7, 2, 6], dtype=torch.int32)
    """
    found: torch.Tensor | None = None
    start = 0
    for shift, width in _parts(bits):
        per_byte = 8 // width
        size = -(-count // per_byte)
        run = (packed if bits in (1, 2, 4, 8) else packed[start : start + size]).to(torch.int32)
        start += size
        if per_byte > 1:
            run = torch.cat([_field(run, i * width, width) for i in range(per_byte)])
            run = run if run.numel() == count else run[:count]
        run = torch.bitwise_left_shift(run, shift) if shift else run
        found = run if found is None else torch.bitwise_or(found, run)
    return packed.to(torch.int32) if found is None else found


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `count` integers take.

    Example:
        >>> packed_size(1000, bits=4), packed_size(1000, bits=3)
        (500, 375)
    """
    return sum(-(-count // (8 // width)) for _, width in _parts(bits))


def _field(values: torch.Tensor, shift: int, width: int) -> torch.Tensor:
    """Return `width` bits of each byte, from bit `shift` on."""
    moved = torch.bitwise_right_shift(values, shift) if shift else values
    return moved if shift + width == 8 else torch.bitwise_and(moved, 2**width - 1)


def _parts(bits: int) -> list[tuple[int, int]]:
    """Return the (lowest bit, width) of each part."""
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits must be 1 to 8, not {bits}")
    parts: list[tuple[int, int]] = []
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            parts.append((shift, width))
            shift += width
    return parts
