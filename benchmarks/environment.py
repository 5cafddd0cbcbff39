"""Where a record was made: versions, cores, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["environment"]


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Return the versions of packages and of Python, the processor, its cores, our threads, and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        **{name: version(name) for name in packages},
    }
