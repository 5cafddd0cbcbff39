"""What is kept of model libraries in files: configurations, classes of models, and the names of output classes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchopt_passes._compat import know_namedtuple
from torchopt_passes.errors import CaptureError, MissingExtraError

__all__ = [
    "config_from_data",
    "config_of",
    "config_to_data",
    "finish_loading",
    "know_output_classes",
    "load_model",
    "register_quantization",
]


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


def load_model(
    name: str,
    config: Any,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    resize: Callable[[nn.Module], None],
) -> nn.Module:
    """Return a model of one of Transformers' own classes with the tensors of its ``save_pretrained``.

    Transformers renames, splits and ties tensors between files and models; so it loads them, into a model that was
    resized before.

    Args:
        name: of the class, such as ``"BertForSequenceClassification"``.
        config: its configuration.
        state: the tensors of the files.
        dtype: of its floating parameters.
        resize: makes a fresh model's tensors the shape of those in the files; they have no values yet.

    Raises:
        CaptureError: Transformers is not installed, or has no such model, or the tensors are not all of its own.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "hf")
    import transformers
    from transformers.utils import logging

    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CaptureError(f"transformers {transformers.__version__} has no model class {name!r}")
    if not isinstance(config, kind.config_class or ()):
        raise CaptureError(f"a {type(config).__name__} is no configuration of a {name}")

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        resize(self)

    # the name counts: Transformers looks up by it how tensors are renamed
    resized: Any = type(name, (kind,), {"__init__": initialise, "__module__": kind.__module__})
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, told = resized.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = sorted(f"{what.replace('_', ' ')} {next(iter(found))!r}" for what, found in told.items() if found)
    if wrong:
        raise CaptureError(f"the files do not hold the tensors of the {name}: {', '.join(wrong)}")
    model.__class__ = kind
    return model


def finish_loading(model: Any, folder: Path) -> None:
    """Give a model the folder's name, and the generation settings that lie in it, if any do."""
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a Transformers model; None for any other module."""
    transformers = sys.modules.get("transformers")
    return model.config if transformers is not None and isinstance(model, transformers.PreTrainedModel) else None


def register_quantization(
    method: str, before: Callable[[nn.Module, dict[str, Any]], Any], after: Callable[[nn.Module, Any], None]
) -> None:
    """Teach ``from_pretrained`` a form of quantization, unless it knows it already.

    Args:
        method: ``quant_method`` of the ``quantization_config`` in ``config.json``.
        before: makes the model ready for the tensors of the file, told that configuration.
        after: finishes the loaded model, given what `before` returned.

    Raises:
        MissingExtraError: Transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "hf")
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    def remember(self: Any, **data: Any) -> None:
        self.quant_method, self.data = method, data

    def prepare(self: Any, model: nn.Module, **_: Any) -> None:
        self.prepared = before(model, self.quantization_config.data)

    def finish(self: Any, model: nn.Module, **_: Any) -> nn.Module:
        after(model, self.prepared)
        return model

    def to_dict(self: Any) -> dict[str, Any]:
        return {"quant_method": method, **self.data}

    methods = {"__init__": remember, "to_dict": to_dict}
    register_quantization_config(method)(type("CodedConfig", (QuantizationConfigMixin,), methods))
    steps: dict[str, Any] = {
        "requires_calibration": True,
        "_process_model_before_weight_loading": prepare,
        "_process_model_after_weight_loading": finish,
        "is_serializable": lambda _: True,  # names and tensors of the state dict are all that a file needs
        "is_trainable": property(lambda _: True),
    }
    register_quantizer(method)(type("CodedQuantizer", (HfQuantizer,), steps))
