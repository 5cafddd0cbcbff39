"""Every test is seeded, single-threaded (two cores, many workers) and away from any model hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """A capture leaves some 10,000 objects in torch's cache of shapes, and every collection walks over all of them."""
    yield
    FakeTensorMode.cache_clear()


def pytest_collection_finish() -> None:
    """What was imported is no garbage: the collection at the end of each training looks at new objects alone."""
    gc.collect()
    gc.freeze()
