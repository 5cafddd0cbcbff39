"""Masks of ``torch.nn.utils.prune`` and of parametrizations, read into a plan; a plan's masks, written back as such."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from torchopt_passes._compat import pruned_names
from torchopt_passes.errors import PlanError
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.prune_weights import MaskWeights
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor

__all__ = ["from_torch_prune", "remove_torch_prune", "to_torch_prune"]


@dataclass(frozen=True)
class _Masked:
    """A tensor that a module computes as mask * original: the owner, its name there, and where the mask came from."""

    owner: nn.Module
    name: str
    fqn: str
    original: torch.Tensor
    mask: torch.Tensor
    reason: str
    parametrized: bool


def from_torch_prune(model: nn.Module) -> Plan:
    """Return the masks of a model as a plan of `MaskWeights`; the model is left as it is.

    Read are the hooks of ``torch.nn.utils.prune`` (``weight_orig`` and ``weight_mask``), parametrizations that multiply
    by a buffer called ``mask`` (those of ``torch.ao.pruning``'s sparsifiers), and, where a weight carries neither, its
    zeros: what ``prune.remove`` leaves. The plan names parameters as the model without masks does (``fc.weight``), so
    that it applies to a fresh model, to a captured graph, and after `remove_torch_prune` to this one.

    Args:
        model: the pruned model.

    Returns:
        One edit for each masked parameter; weights that are zero everywhere, and the padding row of an embedding, are
        no pruning and are in the plan's skips. ``bool(plan)`` is ``prune.is_pruned(model)``, and true after
        ``prune.remove`` too.

    Raises:
        PlanError: a mask holds more than 0 and 1, or a tied parameter has two masks; names it.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5)
        >>> [(edit.target, edit.numbers["removed"]) for edit in from_torch_prune(layer).edits]
        [('weight', 4.0)]
    """
    found = _masked(model)
    edits = [_edit(item.fqn, item.mask, item.reason) for item in _first(found)]
    taken = {id(item.original) for item in found}
    padding = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.padding_idx is not None
    }
    skips: list[Skip] = []
    for fqn, parameter in model.named_parameters():
        if id(parameter) in taken or parameter.ndim < 2:
            continue
        if "parametrizations" in fqn.split("."):
            skips.append(Skip(target=fqn, reason="a parametrization makes a weight of it, by more than a mask"))
            continue
        mask = parameter.detach() != 0
        if id(parameter) in padding:
            mask[padding[id(parameter)]] = True
        if not bool(mask.any()):
            skips.append(Skip(target=fqn, reason="zero everywhere: an initial value, not a mask"))
        elif not bool(mask.all()):
            edits.append(_edit(fqn, mask, "zeros of the weight"))
    return Plan(tuple(edits), tuple(skips))


@torch.no_grad()
def remove_torch_prune(model: nn.Module) -> Plan:
    """Make every mask of a model permanent, in place, and return them: ``prune.remove`` for all, keeping what it drops.

    The parameters become those of a model that was never masked: the same ``Parameter`` objects under their old names,
    zero where they were masked. Masking moved them behind the module's other parameters, and there they stay.

    Args:
        model: the pruned model.

    Returns:
        The plan of `from_torch_prune`; ``callbacks.KeepZeros`` or the plan itself keeps the zeros from here on.

    Raises:
        PlanError: as `from_torch_prune`; nothing was changed.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5)
        >>> plan = remove_torch_prune(layer)
        >>> [name for name, _ in layer.named_parameters()], prune.is_pruned(layer)
        (['bias', 'weight'], False)
    """
    plan = from_torch_prune(model)
    for item in _masked(model):
        if item.parametrized:
            parametrize.remove_parametrizations(item.owner, item.name, leave_parametrized=True)
        else:
            prune.remove(item.owner, item.name)
        # prune multiplies: -0.0 where a negative weight was masked, which no zero of ours is
        parameter = item.owner._parameters[item.name]
        if parameter is not None:
            parameter.masked_fill_(~item.mask, 0)
    return plan


def to_torch_prune(plan: Plan, model: nn.Module) -> nn.Module:
    """Put the masks of a plan on a model as those of ``torch.nn.utils.prune``: it trains, and saves, as pruned there.

    Each masked parameter ``w`` becomes ``w_orig`` (the same object, its values untouched), the buffer ``w_mask`` and a
    forward pre-hook that computes ``w``: ``prune.custom_from_mask``. A tied parameter gets the mask in every module
    that holds it, and stays tied. On a model that is masked already the masks combine, as they do there.

    Args:
        plan: of masks alone.
        model: an ``nn.Module`` with the plan's parameters; changed in place.

    Returns:
        The model.

    Raises:
        PlanError: the plan does more than mask, or does not fit the model; nothing was changed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> mask = torch.tensor([[True, False]])
        >>> plan = Plan((MaskWeights(target="weight", reason="mine", mask=mask),))
        >>> to_torch_prune(plan, layer).weight_mask
        tensor([[1., 0.]])
    """
    masks: list[MaskWeights] = []
    for edit in plan.edits:
        if not isinstance(edit, MaskWeights):
            raise PlanError(f"torch.nn.utils.prune has masks alone: it cannot hold {edit.kind!r} of {edit.target}")
        masks.append(edit)
    owners = {edit.target: _owners(model, edit) for edit in masks}
    for edit in masks:
        for owner, name in owners[edit.target]:
            prune.custom_from_mask(owner, name, edit.mask.to(getattr(owner, name).device))
    return model


def _owners(model: nn.Module, edit: MaskWeights) -> list[tuple[nn.Module, str]]:
    """Return every module that holds the parameter, and its name there, masked already or not."""
    path, _, name = edit.target.rpartition(".")
    masked = f"{path}.{name}_orig".removeprefix(".")
    names = aliases(model)
    first = names.get(edit.target) or names.get(masked)
    if first is None:
        get_tensor(model, edit.target)  # raises, with the names that are close
    shape = tuple(get_tensor(model, first or edit.target).shape)
    if shape != tuple(edit.mask.shape):
        raise PlanError(f"{edit.target} has shape {shape}, its mask {tuple(edit.mask.shape)}")
    found = [find_owner(model, fqn) for fqn, same in names.items() if same == first]
    return [(owner, held.removesuffix("_orig") if held in _originals(owner) else held) for owner, held in found]


def _originals(owner: nn.Module) -> list[str]:
    return [f"{name}_orig" for name in pruned_names(owner)]


def _masked(model: nn.Module) -> list[_Masked]:
    """Return every masked tensor of a model, a tied one once for each module that holds it."""
    found: list[_Masked] = []
    for path, owner in model.named_modules():
        prefix = f"{path}." if path else ""
        for name in pruned_names(owner):
            original, mask = owner.get_parameter(f"{name}_orig"), owner.get_buffer(f"{name}_mask")
            fqn = prefix + name
            found.append(_Masked(owner, name, fqn, original, _binary(fqn, mask), "torch.nn.utils.prune", False))
        table = owner._modules.get("parametrizations")
        for name, chain in table.named_children() if table is not None else ():
            masks = [mask for step in chain.children() if (mask := step._buffers.get("mask")) is not None]
            original = chain._parameters.get("original")
            if original is None or len(masks) != len(list(chain.children())):
                continue
            fqn = prefix + name
            mask = torch.stack([_binary(fqn, mask).expand(original.shape) for mask in masks]).all(0)
            if not torch.equal(getattr(owner, name), original * mask):
                raise PlanError(f"the parametrization of {fqn} has a mask, but does not multiply by it")
            found.append(_Masked(owner, name, fqn, original, mask, "parametrization with a mask", True))
    return found


def _first(found: list[_Masked]) -> list[_Masked]:
    """Return the masked parameters, each once."""
    first: dict[int, _Masked] = {}
    for item in found:
        other = first.setdefault(id(item.original), item)
        if not torch.equal(other.mask, item.mask):
            raise PlanError(f"{other.fqn} and {item.fqn} are one parameter with two masks: a plan has one for each")
    return list(first.values())


def _binary(fqn: str, mask: torch.Tensor) -> torch.Tensor:
    kept = mask != 0
    if not torch.equal(kept.to(mask.dtype), mask):
        raise PlanError(f"the mask of {fqn} holds more than 0 and 1: it scales weights, it does not prune them")
    return kept


def _edit(fqn: str, mask: torch.Tensor, reason: str) -> Edit:
    removed = int((~mask).sum())
    numbers = {"removed": float(removed), "sparsity": removed / max(mask.numel(), 1)}
    return MaskWeights(target=fqn, reason=reason, numbers=numbers, mask=mask.detach().clone())
