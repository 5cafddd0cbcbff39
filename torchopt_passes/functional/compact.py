"""Tensors without what repeats in them: positions and values of the non-zeros, levels and packed indices, bit for bit.

Four runs of bytes stand for a tensor of n values, each left out where it says nothing:

- ``positions``, where the non-zeros are. ``bitmask``: one bit a value, lowest bit of each byte first. ``gaps``: for
  each non-zero the number of zeros before it since the last one, in bytes that add up; 255 goes on into the next byte.
- ``signs``, one bit a zero, where some are -0.0 (``mask * weight`` leaves them).
- ``levels``, the different values there are, where they are 256 at most.
- ``values``: those of the non-zeros, or the packed indices of their levels (`functional.packing`).

Values are in the machine's little-endian bytes, in the order of memory of a contiguous tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.packing import pack, packed_size, unpack

__all__ = ["Layout", "compact", "expand"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGNED_ZERO = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_LEVELS = 256
_SAMPLE = 4096

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor is laid out in runs of bytes.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        zeros: how the positions of non-zeros are given; ``"none"`` where the values of all are.
        kept: how many values are given.
        levels: how many different ones they are; 0 where they are given one by one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: Literal["none", "bitmask", "gaps"] = "none"
    kept: int
    levels: int = 0

    @property
    def bits(self) -> int:
        """Bits of the index of a level."""
        return max(1, (self.levels - 1).bit_length())


def compact(tensor: torch.Tensor) -> tuple[Layout, dict[str, Bytes]]:
    """Return the layout in which a tensor takes the fewest bytes, and the bytes.

    Args:
        tensor: dense, of any dtype of up to 8 bytes, on any device.

    Returns:
        The layout, and the runs of bytes by name (see the module).

    Raises:
        ConfigError: the tensor is sparse, quantized, complex128, without values, or a subclass.

    Math:
        positions + kept * b bytes, or positions + levels * b + ceil(kept * ceil(log2 levels) / 8), for b bytes a value;
        positions are ceil(n / 8) for a bitmask, and one byte a non-zero and one for every 255 zeros in a row for gaps.

    Source:
        Han et al. 2016, "Deep Compression", section 2 (gaps) and 3 (shared weights), without its Huffman code, which a
        general compressor replaces.

    Example:
        >>> x = torch.linspace(-1.0, 1.0, 4000)
        >>> layout, parts = compact(x * (x.abs() > 0.5))
        >>> layout.zeros, {name: len(part) for name, part in parts.items() if name != "signs"}
        ('bitmask', {'positions': 500, 'values': 8000})
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise ConfigError(f"a {type(tensor).__name__} of layout {tensor.layout} is no dense tensor")
    if tensor.is_meta or tensor.is_quantized or tensor.element_size() not in _INTEGERS:
        raise ConfigError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be written")
    size = tensor.element_size()
    bits = tensor.detach().cpu().contiguous().view(-1).view(_INTEGERS[size])
    zero = bits == 0
    signed = bits == _negative_zero(size) if tensor.dtype in _SIGNED_ZERO else torch.zeros_like(zero)
    kept = bits[~(zero | signed)]
    found = _levels(kept)
    every = found if len(kept) == len(bits) else _levels(bits)
    negative = int(packed_size(len(bits) - len(kept), 1)) if bool(signed.any()) else 0
    positions = _gaps(~(zero | signed))
    costs: dict[tuple[Literal["none", "bitmask", "gaps"], bool], float] = {
        ("none", False): len(bits) * size,
        ("none", True): _cost(every, len(bits), size),
        ("bitmask", False): packed_size(len(bits), 1) + negative + len(kept) * size,
        ("bitmask", True): packed_size(len(bits), 1) + negative + _cost(found, len(kept), size),
        ("gaps", False): len(positions) + negative + len(kept) * size,
        ("gaps", True): len(positions) + negative + _cost(found, len(kept), size),
    }
    zeros, shared = min(costs, key=lambda choice: costs[choice])
    given, levels = (bits, every) if zeros == "none" else (kept, found)
    parts: dict[str, Bytes] = {}
    if zeros == "bitmask":
        parts["positions"] = np.packbits((~(zero | signed)).numpy(), bitorder="little")
    elif zeros == "gaps":
        parts["positions"] = positions
    if zeros != "none" and negative:
        parts["signs"] = np.packbits(signed[zero | signed].numpy(), bitorder="little")
    if shared and levels is not None:
        parts["levels"] = _bytes(levels)
        given = torch.searchsorted(levels, given)
    layout = Layout(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        zeros=zeros,
        kept=len(given),
        levels=len(levels) if shared and levels is not None else 0,
    )
    parts["values"] = pack(given, layout.bits).numpy() if layout.levels else _bytes(given)
    return layout, parts


def expand(layout: Layout, parts: Mapping[str, Bytes]) -> torch.Tensor:
    """Return the tensor that `compact` was given, bit for bit.

    Args:
        layout: what `compact` returned.
        parts: what `compact` returned.

    Raises:
        ConfigError: the runs of bytes do not fit the layout, or each other; nothing outside them is read.

    Example:
        >>> x = torch.tensor([0.0, -0.0, 1.5, float("nan")], dtype=torch.bfloat16)
        >>> bool((expand(*compact(x)).view(torch.int16) == x.view(torch.int16)).all())
        True
    """
    count, size = math.prod(layout.shape), layout.dtype.itemsize
    if layout.zeros not in ("none", "bitmask", "gaps"):
        raise ConfigError(f"positions by {layout.zeros!r} are not known")
    names = {"values"} | ({"positions"} if layout.zeros != "none" else set()) | ({"levels"} if layout.levels else set())
    if not names <= set(parts) <= names | ({"signs"} if layout.zeros != "none" else set()):
        raise ConfigError(f"the parts {sorted(parts)} are not those of {layout}")
    if not 0 <= layout.kept <= count or not 0 <= layout.levels <= _MOST_LEVELS or size not in _INTEGERS:
        raise ConfigError(f"{layout} is not possible")
    values = _values(layout, parts, size)
    if layout.zeros == "none":
        if layout.kept != count:
            raise ConfigError(f"{layout.kept} values for a tensor of {count}")
        return values.view(layout.dtype).view(layout.shape)
    mask = _mask(layout, parts["positions"], count)
    bits = torch.zeros(count, dtype=_INTEGERS[size])
    bits[mask] = values
    if "signs" in parts:
        bits[~mask] = torch.from_numpy(_unpackbits(parts["signs"], count - layout.kept)).to(
            bits.dtype
        ) * _negative_zero(size)
    return bits.view(layout.dtype).view(layout.shape)


def _values(layout: Layout, parts: Mapping[str, Bytes], size: int) -> torch.Tensor:
    expected = packed_size(layout.kept, layout.bits) if layout.levels else layout.kept * size
    if len(parts["values"]) != expected:
        raise ConfigError(f"{len(parts['values'])} bytes of values, {expected} are wanted")
    values = _tensor(parts["values"])
    if not layout.levels:
        return values.view(_INTEGERS[size])
    if len(parts["levels"]) != layout.levels * size:
        raise ConfigError(f"{len(parts['levels'])} bytes for {layout.levels} levels")
    index = unpack(values, layout.bits, layout.kept)
    if layout.kept and int(index.max()) >= layout.levels:
        raise ConfigError(f"an index past the {layout.levels} levels")
    return _tensor(parts["levels"]).view(_INTEGERS[size])[index]


def _mask(layout: Layout, positions: Bytes, count: int) -> torch.Tensor:
    if layout.zeros == "bitmask":
        mask = torch.from_numpy(_unpackbits(positions, count)).bool()
    else:
        ends = positions != 255
        where = positions.cumsum(dtype=np.int64)[ends] + np.arange(int(ends.sum()))
        if len(where) and (where[-1] >= count or not ends[-1]):
            raise ConfigError(f"a position past the {count} values")
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.from_numpy(where)] = True
    if int(mask.sum()) != layout.kept:
        raise ConfigError(f"{int(mask.sum())} positions for {layout.kept} values")
    return mask


def _unpackbits(packed: Bytes, count: int) -> Bytes:
    if len(packed) != packed_size(count, 1):
        raise ConfigError(f"{len(packed)} bytes for {count} bits")
    return np.unpackbits(packed, count=count, bitorder="little")


def _gaps(kept: torch.Tensor) -> Bytes:
    where = kept.nonzero().flatten().numpy()
    gaps = np.diff(where, prepend=-1) - 1
    runs = gaps // 255
    out = np.full(len(gaps) + int(runs.sum()), 255, dtype=np.uint8)
    out[np.cumsum(runs + 1) - 1] = gaps % 255
    return out


def _levels(bits: torch.Tensor) -> torch.Tensor | None:
    """Return the different values, ascending, or None when they are too many; a sample tells that soon."""
    step = max(1, len(bits) // _SAMPLE)
    if len(bits) == 0 or len(bits[::step].unique()) > _MOST_LEVELS:
        return None
    found = bits.unique()
    return found if len(found) <= _MOST_LEVELS else None


def _cost(levels: torch.Tensor | None, count: int, size: int) -> float:
    if levels is None:
        return math.inf
    return len(levels) * size + packed_size(count, max(1, (len(levels) - 1).bit_length()))


def _tensor(part: Bytes) -> torch.Tensor:
    return torch.from_numpy(part.copy()) if len(part) else torch.zeros(0, dtype=torch.uint8)  # numpy's stride is 0


def _negative_zero(size: int) -> int:
    return -(1 << (8 * size - 1))


def _bytes(bits: torch.Tensor) -> Bytes:
    return bits.contiguous().view(torch.uint8).numpy()
