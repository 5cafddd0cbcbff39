"""Codebooks in Transformers' own files: ``save_pretrained`` says what is stored, ``from_pretrained`` builds it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.packing import packed_size
from torchopt_passes.graph._transformers import config_of, register_quantization
from torchopt_passes.graph.quantization.codebook_weight import (
    CodebookWeight,
    Layout,
    share_codebook,
    store_in_module,
    stored_parameters,
)
from torchopt_passes.graph.tensors import find_owner, get_tensor

__all__ = ["note_codebook", "prepare_codebook", "register_codebooks"]

METHOD = "torchopt_codebook"
"""``quant_method`` of the ``quantization_config`` in ``config.json``."""


def register_codebooks() -> None:
    """Let Transformers' ``from_pretrained`` build models whose weights `ClusterWeights` stored as codebooks.

    Call it once in a process that loads such a model; `ClusterWeights` itself has done so where it was applied to a
    Transformers model. Nothing in the folder is executed.

    Raises:
        MissingExtraError: Transformers is not installed.

    Example:
        ```python
        top.register_codebooks()
        model = AutoModelForCausalLM.from_pretrained("small")
        ```
    """
    register_quantization(METHOD, _empty_codebooks, _tie_all)


def note_codebook(
    module: nn.Module, fqn: str, layout: Layout, *, bits: int, levels: int, keep_zero: bool, outliers: int
) -> None:
    """Write into a Transformers model's configuration how a weight is stored; any other module is left alone.

    Args:
        module: the model.
        fqn: the weight.
        layout: how it lies in groups.
        bits: of an index.
        levels: of the codebook.
        keep_zero: index 0 is zero.
        outliers: how many values are kept as they are.
    """
    config: Any = config_of(module)
    if config is None:
        return
    register_codebooks()
    known: Any = getattr(config, "quantization_config", None)
    if not isinstance(known, dict) or known.get("quant_method") != METHOD:
        config.quantization_config = known = {"quant_method": METHOD, "weights": {}}
    known["weights"][fqn] = {
        "shape": list(layout.shape),
        "channel_dim": layout.channel_dim,
        "group_size": layout.group_size,
        "bits": bits,
        "levels": levels,
        "keep_zero": keep_zero,
        "outliers": outliers,
    }


def _empty_codebooks(model: nn.Module, data: dict[str, Any]) -> dict[str, list[str]]:
    """Put empty codebooks in the place of the weights; returns what other names each has."""
    ties = {fqn: _without_ties(model, fqn) for fqn in data["weights"]}
    for fqn, facts in data["weights"].items():
        prepare_codebook(model, fqn, facts)
    return ties


def _tie_all(model: nn.Module, ties: dict[str, list[str]]) -> None:
    for fqn, others in ties.items():
        _tie(model, fqn, others)


def _without_ties(model: Any, fqn: str) -> list[str]:
    """Take the other names of a weight out of the model, which Transformers would tie or miss; return them."""
    tied: dict[str, str] = model.all_tied_weights_keys
    source = tied.get(fqn, fqn)
    group = [source, *(name for name, first in tied.items() if first == source)]
    others = [name for name in group if name != fqn]
    for name in others:
        owner, attribute = find_owner(model, name)
        owner._parameters[attribute] = None
    for name in group:
        tied.pop(name, None)
    return others


def _tie(model: nn.Module, fqn: str, others: list[str]) -> None:
    """Give the other names of a weight its codebook."""
    first: Any = model.get_submodule(stored_parameters(fqn)[0].removesuffix(".original0"))
    for name in others:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        with torch.no_grad():
            owner._parameters[attribute] = nn.Parameter(first())
        share_codebook(first, owner, attribute)


def prepare_codebook(model: nn.Module, fqn: str, facts: dict[str, Any]) -> None:
    """Put an empty codebook in the place of a weight, under all its names."""
    weight = get_tensor(model, fqn)
    layout = Layout(tuple(facts["shape"]), facts["channel_dim"], facts["group_size"])
    if tuple(weight.shape) != layout.shape:
        raise PlanError(
            f"the configuration stores {fqn} with shape {layout.shape}, the model has {tuple(weight.shape)}"
        )
    if math.prod(layout.shape) < facts["outliers"]:
        raise PlanError(f"the configuration stores {fqn} with more outliers than values")
    bits = facts["bits"]
    indices = torch.zeros(packed_size(layout.groups * layout.size, bits), dtype=torch.uint8, device=weight.device)
    positions = torch.zeros(facts["outliers"], dtype=torch.int32, device=weight.device)
    stored = CodebookWeight(
        indices,
        layout=layout,
        bits=bits,
        levels=facts["levels"],
        keep_zero=facts["keep_zero"],
        outliers=positions if facts["outliers"] else None,
    )
    tensors = [weight.new_empty(layout.groups, facts["levels"])]
    if facts["outliers"]:
        tensors.append(weight.new_empty(facts["outliers"]))
    store_in_module(model, fqn, stored, tensors)
