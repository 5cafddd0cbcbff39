"""Module sizes: after tensors were cut, the layers that hold them are told (``out_features``, ``groups``, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.narrow_attention import fit_attention, without_nested_tensors
from torchopt_passes.graph.pruning.slicing import Removal, blocks_of

__all__ = ["SizeChange", "fit_sizes"]

SizeChange = tuple[str, str, int | tuple[int, ...]]
"""Dotted path of a module, name of its attribute, new value."""

Cuts = dict[str, Removal]
"""Name of a tensor in its module -> what left it."""

_BY_WEIGHT: dict[str, int] = {
    "out_features": 0,
    "in_features": 1,
    "in1_features": 1,
    "in2_features": 2,
    "num_features": 0,
    "num_parameters": 0,
    "num_embeddings": 0,
    "embedding_dim": 1,
}
"""Attributes of torch.nn's layers, and of their imitations elsewhere, by the dimension of ``weight`` that they tell."""

_BY_WEIGHT_TRANSPOSED = {"nx": 0, "nf": 1}
"""The same for Transformers' ``Conv1D``, whose weight has shape (in, out)."""


def fit_sizes(module: nn.Module, removals: Mapping[int, Removal]) -> list[SizeChange]:
    """Set the size attributes of every layer that holds a cut tensor.

    Args:
        module: the whole model, after its tensors were cut.
        removals: id of a tensor object -> what left it.

    Returns:
        What was set.

    Raises:
        PlanError: a layer cannot compute with its new shapes, such as groups of unequal sizes.
    """
    changes: list[SizeChange] = []
    for path, layer in module.named_modules():
        cuts = _cuts(layer, removals)
        attention = isinstance(layer, nn.MultiheadAttention)
        if attention:
            cuts |= {f"out_proj.{name}": cut for name, cut in _cuts(layer.out_proj, removals).items()}
        if not cuts:
            continue
        before = dict(vars(layer))
        try:
            found = fit_attention(layer, cuts) if attention else _fit(layer, cuts)
        except PlanError as error:
            raise PlanError(f"{path} ({type(layer).__name__}): {error}") from error
        for name, value in found.items():
            if before.get(name) != value:
                setattr(layer, name, value)
                changes.append((path, name, value))
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()
    without_nested_tensors(module)
    return changes


def _cuts(layer: nn.Module, removals: Mapping[int, Removal]) -> Cuts:
    """Return what left the tensors of a layer by their names in it, those behind a parametrization included."""
    held: dict[str, torch.Tensor | None] = {**layer._parameters, **layer._buffers}
    cuts = {name: removals[id(t)] for name, t in held.items() if t is not None and id(t) in removals}
    if parametrize.is_parametrized(layer):
        lists: Any = layer.parametrizations
        for name, behind in lists.items():
            shape = tuple(getattr(layer, name).shape)
            inside = [removals[id(t)] for t in behind.parameters() if id(t) in removals]
            inside = [removal for removal in inside if removal.new_shape == shape]
            if inside:
                cuts[name] = inside[0]
    return cuts


def _fit(layer: nn.Module, cuts: Cuts) -> dict[str, Any]:
    for kinds, fit in _LAYERS:
        if isinstance(layer, kinds):
            return fit(layer, cuts)
    return _by_weight(layer, cuts)


def _by_weight(layer: nn.Module, cuts: Cuts) -> dict[str, Any]:
    """Return the sizes of a layer of any class whose attributes told the shape of its weight before."""
    removal = cuts.get("weight") or cuts.get("running_mean")
    if removal is None:
        return {}
    table = _BY_WEIGHT_TRANSPOSED if hasattr(layer, "nf") else _BY_WEIGHT
    before, after = removal.shape, removal.new_shape
    return {
        name: after[dim]
        for name, dim in table.items()
        if dim < len(before) and type(getattr(layer, name, None)) is int and getattr(layer, name) == before[dim]
    }


def _convolution(layer: Any, cuts: Cuts) -> dict[str, Any]:
    """Weight (out, in / groups, ...): whole groups leave, or as many channels of each group."""
    return _grouped(layer, cuts, "out_channels", "in_channels")


def _transposed_convolution(layer: Any, cuts: Cuts) -> dict[str, Any]:
    """Weight (in, out / groups, ...)."""
    return _grouped(layer, cuts, "in_channels", "out_channels")


def _grouped(layer: Any, cuts: Cuts, whole: str, per_group: str) -> dict[str, Any]:
    removal = cuts.get("weight")
    if removal is None:
        return {}
    groups = len(blocks_of(removal.kept(0), layer.groups, removal.shape[0]))
    rows, columns = removal.new_shape[:2]
    return {"groups": groups, whole: rows, per_group: columns * groups}


def _group_norm(layer: nn.GroupNorm, cuts: Cuts) -> dict[str, Any]:
    removal = cuts.get("weight") or cuts.get("bias")
    if removal is None:
        return {}
    groups = blocks_of(removal.kept(0), layer.num_groups, removal.shape[0])
    return {"num_groups": len(groups), "num_channels": removal.new_shape[0]}


def _shape_norm(layer: Any, cuts: Cuts) -> dict[str, Any]:
    removal = cuts.get("weight") or cuts.get("bias")
    return {} if removal is None else {"normalized_shape": removal.new_shape}


def _embedding(layer: Any, cuts: Cuts) -> dict[str, Any]:
    removal = cuts["weight"]
    sizes: dict[str, Any] = {"num_embeddings": removal.new_shape[0], "embedding_dim": removal.new_shape[1]}
    if layer.padding_idx is not None and 0 in removal.indices and layer.num_embeddings == removal.shape[0]:
        if layer.padding_idx in removal.indices[0]:
            raise PlanError(f"the row of padding_idx={layer.padding_idx} would leave")
        sizes["padding_idx"] = removal.kept(0).index(layer.padding_idx)
    return sizes


def _recurrent(layer: Any, cuts: Cuts) -> dict[str, Any]:
    """Weights weight_ih_l{k}{_reverse} (gates * hidden, in) and weight_hh (gates * hidden, hidden or projection)."""
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    hidden: set[int] = set()
    outputs: set[int] = set()
    inputs: set[tuple[bool, int]] = set()
    for layer_index in range(layer.num_layers):
        for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            weight = getattr(layer, f"weight_ih_l{layer_index}{suffix}")
            hidden.add(weight.shape[0] // gates)
            inputs.add((layer_index == 0, weight.shape[1]))
            outputs.add(getattr(layer, f"weight_hh_l{layer_index}{suffix}").shape[1])
    size, projection = max(hidden), max(outputs)
    width = {size for first, size in inputs if first}
    inner = {size for first, size in inputs if not first}
    directions = 2 if layer.bidirectional else 1
    if len(hidden) > 1 or len(outputs) > 1 or len(width) > 1 or inner - {projection * directions}:
        raise PlanError(f"its layers and directions would be left with unequal hidden sizes {sorted(hidden | outputs)}")
    for name, removal in cuts.items():
        if 0 in removal.indices and name.startswith(("weight_ih", "weight_hh", "bias")):
            blocks = blocks_of(removal.kept(0), gates, removal.shape[0])
            if len(blocks) != gates or len(set(blocks.values())) != 1:
                raise PlanError(f"{name} must lose the same units of each of its {gates} gates")
    sizes = {"hidden_size": size, "input_size": width.pop()}
    return sizes | ({"proj_size": projection} if layer.proj_size else {})


def _cell(layer: Any, cuts: Cuts) -> dict[str, Any]:
    return {"hidden_size": layer.weight_hh.shape[1], "input_size": layer.weight_ih.shape[1]}


_LAYERS: tuple[tuple[Any, Callable[[Any, Cuts], dict[str, Any]]], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_convolution),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _shape_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
)
