"""The record of what was removed from a Transformers model: it lies in its configuration, so in ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from torchopt_passes.graph.pruning.slicing import Removal
from torchopt_passes.graph.tensors import find_owner

__all__ = ["KEY", "VERSION", "note_attribute", "note_removals"]

KEY = "torchopt_passes"
"""The configuration's attribute that holds the record."""

VERSION = 1

Size = int | tuple[int, ...]


def note_removals(module: nn.Module, removals: Mapping[str, Removal], changes: Iterable[tuple[str, str, Size]]) -> None:
    """Write down the new shapes of tensors and sizes of layers; nothing for what is no Transformers model.

    Args:
        module: the whole model.
        removals: fqn -> what left the tensor. Tensors that are in no state dict need the indices too.
        changes: path of a module, attribute, new value.
    """
    record = _record(module)
    if record is None:
        return
    for fqn, removal in removals.items():
        owner, name = find_owner(module, fqn)
        if name in owner._non_persistent_buffers_set:
            known: dict[str, list[int]] = record["buffers"].setdefault(fqn, {})
            for dim in removal.indices:
                kept, earlier = removal.kept(dim), known.get(str(dim))
                known[str(dim)] = kept if earlier is None else [earlier[index] for index in kept]
        else:
            record["sizes"][fqn] = list(removal.new_shape)
    for path, name, value in changes:
        record["attributes"][f"{path}.{name}" if path else name] = _plain(value)


def note_attribute(module: nn.Module, target: str, old: Size, new: Size) -> None:
    """Write down a size attribute that is about to change; of a configuration's, the value it had at first.

    The model is built again from the configuration that it was made with.
    """
    record = _record(module)
    if record is None:
        return
    path = _in_config(module, target)
    if path is None:
        record["attributes"][target] = _plain(new)
    else:
        record["config"].setdefault(path, _plain(old))


def _record(module: nn.Module) -> dict[str, Any] | None:
    """Return the record of a Transformers model, begun where there is none; it is replaced, not changed in place.

    A failed plan is rolled back by putting the configuration's attributes back.
    """
    config: Any = getattr(module, "config", None)
    if not (hasattr(module, "save_pretrained") and hasattr(config, "to_dict")):
        return None
    known = cast("dict[str, Any]", getattr(config, KEY, None) or {})
    parts = ("sizes", "buffers", "attributes", "config")
    record: dict[str, Any] = {"version": VERSION, "class": type(module).__name__}
    record |= {part: {k: dict(v) if part == "buffers" else v for k, v in known.get(part, {}).items()} for part in parts}
    setattr(config, KEY, record)
    return record


def _in_config(module: nn.Module, target: str) -> str | None:
    """Return the path, in the model's configuration, of what a target names through a module; None for a module's own.

    Example: ``"model.layers.0.config.num_heads"`` is ``"num_heads"``, that of a part's is ``"text_config.num_heads"``.
    """
    path, _, name = target.rpartition(".")
    owner: Any = module
    for part in path.split(".") if path else []:
        owner = getattr(owner, part)
    if isinstance(owner, nn.Module):
        return None
    name = getattr(owner, "attribute_map", {}).get(name, name)
    return next((f"{prefix}{name}" for prefix, config in _configs(module.config, "") if config is owner), name)


def _configs(config: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    yield prefix, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "attribute_map"):
            yield from _configs(value, f"{prefix}{name}.")


def _plain(value: Size) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value
