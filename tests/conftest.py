"""Every test is seeded, single-threaded (two cores, many workers) and away from any model hub."""

from __future__ import annotations

import gc
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture go to one worker (``--dist loadgroup``), which makes it once."""
    for item in items:
        info = getattr(item, "_fixtureinfo", None)
        fixtures = {name: found[-1] for name, found in info.name2fixturedefs.items()} if info else {}
        shared = [n for n, f in fixtures.items() if f.scope != "function" and f.func.__module__.startswith("tests.")]
        if shared:
            params = item.callspec.indices if hasattr(item, "callspec") else {}
            names = [f"{fixtures[name].baseid}-{name}{params.get(name, '')}" for name in sorted(shared)]
            item.add_marker(pytest.mark.xdist_group("-".join(names)))


def pytest_collection_finish() -> None:
    """What was imported is no garbage: the collection at the end of each training looks at new objects alone."""
    gc.collect()
    gc.freeze()
