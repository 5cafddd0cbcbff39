"""What a captured graph keeps of model libraries in its files: the configuration, and the names of output classes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

from torchopt_passes._compat import know_namedtuple
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
    """Import the modules of Transformers and torchvision whose output classes a saved structure names, and no others.

    Raises:
        CaptureError: a class is of another package that is not imported here.
    """
    for name in _classes(json.loads(structure)[1]):
        module, _, kind = name.rpartition(".")
        if module.split(".")[0] in ("builtins", "collections"):
            continue
        if module not in sys.modules:
            if not module.startswith(("transformers.", "torchvision.")):
                raise CaptureError(f"the model returns a {name}: import {module} before loading")
            importlib.import_module(module)
        found = getattr(sys.modules[module], kind, None)
        if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
            know_namedtuple(found)


def _classes(node: dict[str, Any]) -> Iterator[str]:
    """Yield the class names in a structure; a named tuple's is its context."""
    if node["type"] == "collections.namedtuple":
        yield node["context"]
    elif node["type"] is not None:
        yield node["type"]
    for child in node["children_spec"]:
        yield from _classes(child)
