"""A progress bar for what takes a while: quiet unless a person watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar on standard error when that is a terminal.

    Args:
        items: what to iterate over.
        description: what is going on.
        total: how many items there are; by default their length, where they have one.

    Example:
        >>> list(track([1, 2], "Counting"))
        [1, 2]
    """
    import sys

    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
    yield from bar(items, description=description, total=total, console=Console(stderr=True), transient=True)
