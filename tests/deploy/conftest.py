"""Artefacts are written once for all tests: compiling takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.deploy.sources import get
from torchopt_passes.deploy import Artifact, export

Exported = Callable[[str, str], Artifact]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function (source, suffix) -> its artefact, written once."""
    folder = tmp_path_factory.mktemp("artifacts")
    made: dict[tuple[str, str], Artifact] = {}

    def make(name: str, suffix: str) -> Artifact:
        if (name, suffix) not in made:
            torch.set_num_threads(1)
            module, inputs = get(name)
            made[name, suffix] = export(module, Path(folder) / f"{name}{suffix}", example_inputs=inputs)
        return made[name, suffix]

    return make
