"""Plans for source modules, written by hand, and what they must equal: the model with zeros in place of what left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.graph.pruning import RemoveIndices, ResizeAttribute

__all__ = ["bert_plan", "gpt2_plan", "llama_plan", "masked", "plan_of", "remove", "resize"]


def remove(fqn: str, dim: int, indices: Iterable[int], size: int) -> RemoveIndices:
    return RemoveIndices(target=fqn, dim=dim, indices=tuple(indices), size=size, reason="by hand")


def resize(target: str, old: int, new: int) -> ResizeAttribute:
    return ResizeAttribute(target=target, old=old, new=new, reason="by hand")


def plan_of(*edits: Any) -> top.Plan:
    return top.Plan(tuple(edits))


def masked(model: nn.Module, plan: top.Plan, *readers: str) -> nn.Module:
    """Return a copy with zeros where the named tensors (what reads the removed units) would be cut."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for edit in plan.edits:
            if isinstance(edit, RemoveIndices) and edit.target.endswith(readers):
                tensor = model.get_parameter(edit.target)
                tensor.index_fill_(edit.dim, torch.tensor(edit.indices), 0)
    return model


def bert_plan(model: nn.Module, heads: Sequence[int], units: Sequence[int], layers: Sequence[int]) -> top.Plan:
    """Remove heads (of 4 features) and feed-forward units from layers of a BERT."""
    edits: list[Any] = []
    attributes: list[Any] = []
    rows = [4 * head + place for head in heads for place in range(4)]
    for layer in layers:
        path = f"bert.encoder.layer.{layer}"
        inner = model.get_parameter(f"{path}.attention.self.query.weight").shape[0]
        hidden = model.get_parameter(f"{path}.intermediate.dense.weight").shape[0]
        for name in ("query", "key", "value"):
            edits += [remove(f"{path}.attention.self.{name}.{kind}", 0, rows, inner) for kind in ("weight", "bias")]
        edits.append(remove(f"{path}.attention.output.dense.weight", 1, rows, inner))
        edits += [remove(f"{path}.intermediate.dense.{kind}", 0, units, hidden) for kind in ("weight", "bias")]
        edits.append(remove(f"{path}.output.dense.weight", 1, units, hidden))
        left = inner - len(rows)
        attributes.append(resize(f"{path}.attention.self.num_attention_heads", inner // 4, left // 4))
        attributes.append(resize(f"{path}.attention.self.all_head_size", inner, left))
    return plan_of(*edits, *attributes)


BERT_READERS = ("attention.output.dense.weight", "output.dense.weight")


def llama_plan(model: nn.Module, group: int, units: Sequence[int]) -> top.Plan:
    """Remove a key-value head with its two query heads (of 4 features), and feed-forward units, from all layers."""
    edits: list[Any] = []
    queries, keys = range(8 * group, 8 * group + 8), range(4 * group, 4 * group + 4)
    for layer in range(2):
        path = f"model.layers.{layer}"
        edits += [
            remove(f"{path}.self_attn.q_proj.weight", 0, queries, 16),
            remove(f"{path}.self_attn.k_proj.weight", 0, keys, 8),
            remove(f"{path}.self_attn.v_proj.weight", 0, keys, 8),
            remove(f"{path}.self_attn.o_proj.weight", 1, queries, 16),
            remove(f"{path}.mlp.up_proj.weight", 0, units, 32),
            remove(f"{path}.mlp.gate_proj.weight", 0, units, 32),
            remove(f"{path}.mlp.down_proj.weight", 1, units, 32),
        ]
    return plan_of(*edits, resize("config.intermediate_size", 32, 32 - len(units)))


LLAMA_READERS = ("o_proj.weight", "down_proj.weight")


def gpt2_plan(model: nn.Module, heads: Sequence[int], units: Sequence[int]) -> top.Plan:
    """Remove heads (of 4 features) and feed-forward units from all layers of a GPT-2, whose weights are (in, out)."""
    edits: list[Any] = []
    attributes: list[Any] = []
    rows = [4 * head + place for head in heads for place in range(4)]
    inside = [16 * part + row for part in range(3) for row in rows]
    for layer in range(2):
        path = f"transformer.h.{layer}"
        edits += [
            remove(f"{path}.attn.c_attn.weight", 1, inside, 48),
            remove(f"{path}.attn.c_attn.bias", 0, inside, 48),
            remove(f"{path}.attn.c_proj.weight", 0, rows, 16),
            remove(f"{path}.mlp.c_fc.weight", 1, units, 64),
            remove(f"{path}.mlp.c_fc.bias", 0, units, 64),
            remove(f"{path}.mlp.c_proj.weight", 0, units, 64),
        ]
        attributes += [
            resize(f"{path}.attn.num_heads", 4, 4 - len(heads)),
            resize(f"{path}.attn.split_size", 16, 16 - len(rows)),
        ]
    return plan_of(*edits, *attributes)


GPT2_READERS = ("c_proj.weight",)
