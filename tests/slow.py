"""What the default run leaves to `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["all_but_slow"]


def all_but_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Return the parameters of a test, marked slow but for `quick`: what shows nothing new beside these."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
