"""load_pruned: a pruned Transformers model from the folder that its own ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from torchopt_passes.errors import MissingExtraError, PlanError
from torchopt_passes.graph._transformers import config_from_data, finish_loading, load_model
from torchopt_passes.graph.pruning.narrow_attention import narrow, without_nested_tensors
from torchopt_passes.graph.pruning.pruned_record import KEY, PrunedRecord
from torchopt_passes.graph.pruning.resize_attribute import read_size, write_size
from torchopt_passes.graph.tensors import find_owner, get_tensor

__all__ = ["load_pruned"]

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def load_pruned(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a Transformers model that a plan was applied to, from what its ``save_pretrained`` wrote.

    The model is built from the configuration it was made with; then its tensors and sizes are made those of the
    record in ``config.json``. Nothing in the folder is executed or unpickled.

    Args:
        path: the folder: ``config.json`` and ``model.safetensors`` (or its shards and their index).
        device: where the tensors go.

    Returns:
        The model in eval mode, as ``from_pretrained`` gives it; it can be pruned, trained and saved again.

    Raises:
        PlanError: the folder holds no pruned model, or its record does not fit the model or the tensors.
    """
    folder = Path(path)
    data = _read_json(folder / _CONFIG)
    record = PrunedRecord.parse(data.pop(KEY, None), f"{folder / _CONFIG}")
    if data.get("architectures") != [record.model]:
        raise PlanError(
            f"{folder} holds a {data.get('architectures')}, but {record.model} was pruned: apply the plan to the whole "
            "model and save that"
        )
    tensors = _tensors(folder)
    try:
        model = _build(data, record, tensors)
        _cut_buffers(model, record)
        _set_attributes(model, record)
        finish_loading(model, folder)
        return model.to(device).eval()
    except (PlanError, MissingExtraError):
        raise
    except Exception as error:  # whatever Transformers makes of a stranger's configuration
        raise PlanError(f"{folder} holds no pruned model that can be read: {error}") from error


def _build(data: dict[str, Any], record: PrunedRecord, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return the model as it was made, with its tensors and its configuration as they are now."""
    now: dict[str, Any] = {}
    for target, value in record.config.items():
        place, name = _config_place(data, target)
        now[target], place[name] = place[name], value
    config: Any = config_from_data(_without_code(data))
    model = load_model(record.model, config, tensors, _dtype(tensors), lambda fresh: _resize(fresh, record))
    setattr(model.config, KEY, record.to_data())
    for target, value in now.items():
        write_size(model, f"config.{target}", tuple(value) if isinstance(value, list) else value)
    return model


def _without_code(data: Any) -> Any:
    """Leave out what names code to run: classes in the folder, attention kernels on the hub, quantizers."""
    if not isinstance(data, dict):
        return data
    left_out = ("auto_map", "quantization_config")
    return {
        key: _without_code(value)
        for key, value in cast("dict[str, Any]", data).items()
        if key not in left_out and "attn_implementation" not in key
    }


def _config_place(data: dict[str, Any], target: str) -> tuple[dict[str, Any], str]:
    *parts, name = target.split(".")
    place: Any = data
    for part in parts:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or name not in place:
        raise PlanError(f"the record tells of {target!r}, which is not in the configuration")
    return cast("dict[str, Any]", place), name


def _resize(model: nn.Module, record: PrunedRecord) -> None:
    """Give the tensors their new shapes; values come later.

    Raises:
        PlanError: the record names what the model does not have, or makes something larger.
    """
    for fqn, shape in record.sizes.items():
        tensor = get_tensor(model, fqn)
        old = tuple(tensor.shape)
        if len(shape) != len(old) or any(new > size for new, size in zip(shape, old, strict=True)):
            raise PlanError(f"the record says that {fqn} has shape {shape}, but it is made with {old}")
        tensor.data = tensor.data.new_empty(shape)


def _cut_buffers(model: nn.Module, record: PrunedRecord) -> None:
    """Cut the buffers that are in no file."""
    for fqn, dims in record.buffers.items():
        owner, name = find_owner(model, fqn)
        buffer = get_tensor(model, fqn)
        if name not in owner._non_persistent_buffers_set or any(dim >= buffer.ndim for dim in dims):
            raise PlanError(f"the record cuts {fqn}, which is no buffer of that kind")
        for dim, kept in dims.items():
            if kept[-1] >= buffer.shape[dim]:
                raise PlanError(f"the record keeps index {kept[-1]} of dimension {dim} of {fqn}, which it has not")
            buffer = buffer.index_select(dim, torch.tensor(kept, device=buffer.device))
        owner._buffers[name] = buffer


def _set_attributes(model: nn.Module, record: PrunedRecord) -> None:
    for target in record.attributes:
        path, _, name = target.rpartition(".")
        owner = dict(model.named_modules(remove_duplicate=False)).get(path)
        if owner is None:
            raise PlanError(f"the record tells of {target!r}, which {type(model).__name__} has not")
        if name == "value_dim" and isinstance(owner, nn.MultiheadAttention):
            narrow(owner)
    without_nested_tensors(model)
    for target, value in record.attributes.items():
        now = read_size(model, target)
        lengths = [len(size) if isinstance(size, tuple) else 0 for size in (now, value)]
        if lengths[0] != lengths[1]:
            raise PlanError(f"the record sets {target} to {value}, but it is made as {now}")
        write_size(model, target, value)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the folder's files by the names that they have there."""
    if (folder / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    else:
        index = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise PlanError(f"{folder / _INDEX} has no 'weight_map'")
        files = sorted({str(file) for file in cast("dict[str, Any]", index).values()})
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise PlanError(f"the index names {file!r}: shards lie beside it as NAME.safetensors")
        if not (folder / file).is_file():
            raise PlanError(f"{file!r} is missing in {folder}")
        try:
            found |= load_file(folder / file)
        except (SafetensorError, OSError) as error:
            raise PlanError(f"{folder / file} cannot be read: {error}") from error
    return found


def _dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype of the most numbers."""
    totals: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel()
    return max(totals, key=lambda dtype: totals[dtype], default=torch.float32)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"{file} is no JSON object")
    return cast("dict[str, Any]", data)
