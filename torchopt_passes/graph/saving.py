"""save_captured and load_captured: a captured graph in a folder of JSON and safetensors, with no code and no pickle."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from torchopt_passes._compat import call_structure, load_structure, save_structure, set_call_structure
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph._transformers import config_from_data, config_to_data, know_output_classes
from torchopt_passes.graph.captured import CapturedModule, build_captured
from torchopt_passes.graph.graph_json import graph_from_data, graph_to_data
from torchopt_passes.graph.guards import Guard
from torchopt_passes.graph.signature import CallSignature
from torchopt_passes.graph.values import fill_values

__all__ = ["captured_from_data", "captured_to_data", "load_captured", "save_captured"]

_GRAPH, _STATE, _INPUTS = "graph.json", "model.safetensors", "example_inputs.safetensors"
_FORMAT = "torchopt_passes captured graph, 1"


def save_captured(graph_module: CapturedModule, folder: str | Path) -> Path:
    """Write a captured graph, rewritten or not, so that another process loads it without the model's code.

    The folder gets ``graph.json`` (operators by name, structure, names), ``model.safetensors`` (every tensor once, ties
    by name) and ``example_inputs.safetensors``. It appears whole or not at all.

    Args:
        graph_module: a captured graph without fake-quantizers.
        folder: where to; an earlier capture there is replaced, anything else is refused.

    Returns:
        The folder.

    Raises:
        CaptureError: the graph calls submodules, or the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _GRAPH).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CaptureError(f"{folder} is there already and holds no captured graph; nothing was written")
    data, tensors, inputs = captured_to_data(graph_module)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        new = Path(made) / "new"
        new.mkdir()
        try:
            (new / _GRAPH).write_text(json.dumps(data, indent=1), encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise CaptureError(f"the graph holds a value that is no data: {error}; nothing was written") from error
        save_file(tensors, new / _STATE)
        save_file(inputs, new / _INPUTS)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def load_captured(folder: str | Path, *, device: torch.device | str = "cpu") -> CapturedModule:
    """Load a captured graph that `save_captured` wrote; nothing in the folder is executed or unpickled.

    Args:
        folder: the folder.
        device: where the tensors go.

    Returns:
        The graph, in the mode it was saved in. It trains and is rewritten as before; only `release` cannot give a
        source module, which is not saved.

    Raises:
        CaptureError: the folder is corrupted, or names what is no tensor operator.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / _GRAPH).read_text(encoding="utf-8"))
        tensors = load_file(folder / _STATE, device=str(device))
        inputs = load_file(folder / _INPUTS, device=str(device))
    except (OSError, ValueError, SafetensorError) as error:
        raise CaptureError(f"{folder} holds no captured graph that can be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CaptureError(f"{folder / _GRAPH} is no captured graph of this version")
    try:
        return captured_from_data(data, tensors, inputs)
    except CaptureError:
        raise
    except Exception as error:  # whatever a corrupted file makes go wrong
        raise CaptureError(f"{folder} is corrupted: {type(error).__name__}: {error}") from error


def captured_to_data(
    graph_module: CapturedModule,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a captured graph as JSON data, its tensors (every one once) and its example inputs.

    Raises:
        CaptureError: the graph calls submodules.
    """
    tensors, state = _state_to_data(graph_module)
    leaves, structure = pytree.tree_flatten(graph_module.meta["example_inputs"])
    names, in_spec, out_spec = call_structure(graph_module.graph)
    signature: CallSignature = graph_module.meta["signature"]
    facts = graph_module.meta["facts"]
    data = {
        "format": _FORMAT,
        "name": type(graph_module).__name__,
        "training": graph_module.training,
        "nodes": graph_to_data(graph_module.graph),
        "call": {"names": names, "inputs": save_structure(in_spec), "outputs": save_structure(out_spec)},
        "signature": {
            "name": signature.name,
            "order": signature.order,
            "positional": signature.positional,
            "keyword": signature.keyword,
            "constants": signature.constants,
            "optional": signature.optional,
        },
        "guards": [guard.code for guard in graph_module.meta["guards"]],
        "dynamic_dims": graph_module.meta["dynamic_dims"],
        "facts": {k: v for k, v in facts.items() if isinstance(v, str)},
        "config": config_to_data(facts.get("config")),
        "state": state,
        "example_inputs": {
            "structure": save_structure(structure),
            "leaves": [None if isinstance(leaf, torch.Tensor) else [leaf] for leaf in leaves],
        },
    }
    inputs = {str(i): t.contiguous() for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
    return data, tensors, inputs


def captured_from_data(
    data: dict[str, Any], tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> CapturedModule:
    """Return the captured graph that `captured_to_data` took apart; damaged data raises whatever it makes go wrong."""
    call, example, written = data["call"], data["example_inputs"], data["signature"]
    know_output_classes(call["outputs"])
    graph = graph_from_data(data["nodes"])
    set_call_structure(graph, call["names"], load_structure(call["inputs"]), load_structure(call["outputs"]))
    leaves = [inputs[str(i)] if leaf is None else leaf[0] for i, leaf in enumerate(example["leaves"])]
    tuples = {key: tuple(written[key]) for key in ("order", "positional", "keyword")}
    facts = dict(data["facts"])
    config = config_from_data(data["config"])
    meta = {
        "example_inputs": pytree.tree_unflatten(leaves, load_structure(example["structure"])),
        "signature": CallSignature(**(written | tuples)),
        "dynamic_dims": {name: tuple(dims) for name, dims in data["dynamic_dims"].items()},
        "guards": tuple(Guard(code) for code in data["guards"]),
        "facts": facts if config is None else facts | {"config": config},
    }
    root = _state_from_data(data["state"], tensors)
    root.train(bool(data["training"]))
    module = build_captured(root, graph, str(data["name"]), meta)
    fill_values(module)
    return module


def _state_to_data(module: nn.Module) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return every tensor once, and one entry for each of its names, in the order of the module tree."""
    tensors: dict[str, torch.Tensor] = {}
    first: dict[torch.Tensor, str] = {}
    entries: list[dict[str, Any]] = []
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        entries.append({"module": path})
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is None:
                continue
            key = first.setdefault(tensor, prefix + name)
            tensors[key] = tensor.detach().contiguous()
            kind = "parameter" if name in child._parameters else "buffer"
            entry = {kind: prefix + name, "tensor": key, "requires_grad": tensor.requires_grad}
            entries.append(entry | {"persistent": name not in child._non_persistent_buffers_set})
    storages = {key: value.untyped_storage().data_ptr() for key, value in tensors.items()}
    shared = {key for key, pointer in storages.items() if list(storages.values()).count(pointer) > 1}
    return {key: value.clone() if key in shared else value for key, value in tensors.items()}, entries


def _state_from_data(entries: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> nn.Module:
    root = nn.Module()
    parameters: dict[str, nn.Parameter] = {}
    for entry in entries:
        fqn = entry.get("parameter") or entry.get("buffer") or entry["module"]
        path, _, name = fqn.rpartition(".")
        owner = root.get_submodule(path)
        if "module" in entry:
            if fqn:
                owner.add_module(name, nn.Module())
        elif "parameter" in entry:
            key = entry["tensor"]
            if key not in parameters:
                parameters[key] = nn.Parameter(tensors[key], requires_grad=entry["requires_grad"])
            owner.register_parameter(name, parameters[key])
        else:
            owner.register_buffer(name, tensors[entry["tensor"]], persistent=entry["persistent"])
    return root
