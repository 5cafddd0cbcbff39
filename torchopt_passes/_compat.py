"""The one place for private APIs of torch, torchao and transformers; tests/test_compat.py tells when they move."""

from __future__ import annotations

__all__: list[str] = []
