"""What a captured graph keeps of Transformers in its files: the configuration, and the names of output classes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from typing import Any

from torchopt_passes.errors import CaptureError

__all__ = ["config_from_data", "config_to_data", "know_output_classes"]


def config_to_data(config: Any) -> dict[str, Any] | None:
    """Return a Transformers configuration as data; None for anything else."""
    if not type(config).__module__.startswith("transformers."):
        return None
    return config.to_dict()


def config_from_data(data: dict[str, Any] | None) -> Any:
    """Return the configuration of the data; None where there is none, or Transformers is not installed."""
    if data is None or importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoConfig

    data = dict(data)
    return AutoConfig.for_model(data.pop("model_type"), **data)


def know_output_classes(structure: str) -> None:
    """Import the Transformers modules whose output classes a saved structure names; no other module is imported.

    Raises:
        CaptureError: a class is of another package that is not imported here.
    """
    for name in re.findall(r'"type": "([\w.]+)"', structure):
        module = name.rpartition(".")[0]
        if module in sys.modules or module.split(".")[0] in ("builtins", "collections"):
            continue
        if not module.startswith("transformers."):
            raise CaptureError(f"the model returns a {name}: import {module} before loading")
        importlib.import_module(module)
