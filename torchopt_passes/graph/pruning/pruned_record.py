"""The record of what was removed from a Transformers model: it lies in its configuration, so in ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.slicing import Removal
from torchopt_passes.graph.tensors import find_owner

__all__ = ["KEY", "PrunedRecord", "note_attribute", "note_removals"]

KEY = "torchopt_passes"
"""The configuration's attribute that holds the record."""

_VERSION = 1
Size = int | tuple[int, ...]


@dataclass
class PrunedRecord:
    """What was removed from a model since it was made, all removals together.

    Args:
        model: name of its class.
        sizes: fqn of a tensor in the state dict -> its shape.
        buffers: fqn of a buffer that no state dict holds -> dimension -> the indices that stay, ascending.
        attributes: dotted path of a module's attribute -> its value.
        config: dotted path in the configuration -> the value that the model was made with.

    Example:
        >>> record = PrunedRecord("BertModel", sizes={"pooler.dense.bias": (8,)})
        >>> PrunedRecord.parse(record.to_data(), "config.json") == record
        True
    """

    model: str
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    buffers: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict[str, dict[int, tuple[int, ...]]])
    attributes: dict[str, Size] = field(default_factory=dict[str, Size])
    config: dict[str, Size] = field(default_factory=dict[str, Size])

    def to_data(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return {
            "version": _VERSION,
            "class": self.model,
            "sizes": {fqn: list(shape) for fqn, shape in self.sizes.items()},
            "buffers": {
                fqn: {str(dim): list(kept) for dim, kept in dims.items()} for fqn, dims in self.buffers.items()
            },
            "attributes": {target: _plain(value) for target, value in self.attributes.items()},
            "config": {target: _plain(value) for target, value in self.config.items()},
        }

    @classmethod
    def parse(cls, data: Any, where: str) -> PrunedRecord:
        """Read a record strictly; it is a stranger's.

        Raises:
            PlanError: there is none, or it is of another form.
        """
        if data is None:
            raise PlanError(f"{where} tells of no removal: load it with transformers' from_pretrained")
        record = _table(data, where)
        if set(record) != {"version", "class", "sizes", "buffers", "attributes", "config"}:
            raise PlanError(f"{where}: the record has {sorted(record)}")
        if record["version"] != _VERSION or not isinstance(record["class"], str):
            raise PlanError(f"{where}: not a record of version {_VERSION}")
        buffers: dict[str, dict[int, tuple[int, ...]]] = {}
        for fqn, dims in _table(record["buffers"], where).items():
            buffers[fqn] = {}
            for dim, kept in _table(dims, where).items():
                indices = _sizes(kept, f"{where}: {fqn}", smallest=0)
                if not dim.isdecimal() or len(dim) > 2 or list(indices) != sorted(set(indices)):
                    raise PlanError(f"{where}: {fqn} keeps {kept} of dimension {dim!r}")
                buffers[fqn][int(dim)] = indices
        return cls(
            record["class"],
            {fqn: _sizes(shape, f"{where}: {fqn}") for fqn, shape in _table(record["sizes"], where).items()},
            buffers,
            _values(record["attributes"], where),
            _values(record["config"], where),
        )

    @classmethod
    def of(cls, module: nn.Module) -> PrunedRecord | None:
        """Return the record of a Transformers model, an empty one where nothing was removed; None for other models."""
        config: Any = getattr(module, "config", None)
        if not (hasattr(module, "save_pretrained") and hasattr(config, "to_dict")):
            return None
        data = getattr(config, KEY, None)
        return cls(type(module).__name__) if data is None else cls.parse(data, f"{type(module).__name__}.config")


def note_removals(module: nn.Module, removals: Mapping[str, Removal], changes: Iterable[tuple[str, str, Size]]) -> None:
    """Write down the new shapes of tensors and sizes of layers; nothing for what is no Transformers model.

    Args:
        module: the whole model.
        removals: fqn -> what left the tensor. Tensors that are in no state dict need the indices too.
        changes: path of a module, attribute, new value.
    """
    record = PrunedRecord.of(module)
    if record is None:
        return
    for fqn, removal in removals.items():
        owner, name = find_owner(module, fqn)
        if name in owner._non_persistent_buffers_set:
            known = record.buffers.setdefault(fqn, {})
            for dim in removal.indices:
                kept, earlier = removal.kept(dim), known.get(dim)
                known[dim] = tuple(kept if earlier is None else (earlier[index] for index in kept))
        else:
            record.sizes[fqn] = removal.new_shape
    for path, name, value in changes:
        record.attributes[f"{path}.{name}" if path else name] = value
    setattr(module.config, KEY, record.to_data())


def note_attribute(module: nn.Module, target: str, old: Size, new: Size) -> None:
    """Write down a size attribute that is about to change; of a configuration's, the value it had at first.

    The model is built again from the configuration that it was made with.
    """
    record = PrunedRecord.of(module)
    if record is None:
        return
    path = _in_config(module, target)
    if path is None:
        record.attributes[target] = new
    else:
        record.config.setdefault(path, old)
    setattr(module.config, KEY, record.to_data())


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
    for prefix, config in _configs(module.config, ""):
        if config is owner:
            return f"{prefix}{name}"
    raise PlanError(f"{target} is in a configuration that {type(module).__name__}.config does not hold")


def _configs(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    yield prefix, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "attribute_map"):
            yield from _configs(value, f"{prefix}{name}.")


def _plain(value: Size) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value


def _table(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{where}: the record has {data!r} where names belong")
    return cast("dict[str, Any]", data)


def _values(data: Any, where: str) -> dict[str, Size]:
    return {
        target: _sizes(value, where) if isinstance(value, list) else _sizes([value], where)[0]
        for target, value in _table(data, where).items()
        if _is_path(target, where)
    }


def _sizes(data: Any, where: str, smallest: int = 1) -> tuple[int, ...]:
    items: list[Any] = list(cast("list[Any]", data)) if isinstance(data, list | tuple) else []
    if not items or not all(type(item) is int and smallest <= item < 2**40 for item in items):
        raise PlanError(f"{where}: {data!r} are no sizes")
    return tuple(items)


def _is_path(target: str, where: str) -> bool:
    *path, name = target.split(".")
    good = all(part.isidentifier() or part.isdecimal() for part in path) and name.isidentifier()
    if not good or any(part.startswith("_") for part in (*path, name)):
        raise PlanError(f"{where}: {target!r} is no path of an attribute")
    return True
