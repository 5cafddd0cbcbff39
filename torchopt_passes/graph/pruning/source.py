"""Removal from the user's own module: tensors are cut, layers of torch.nn are told their new sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.module_sizes import fit_sizes
from torchopt_passes.graph.pruning.pruned_record import note_removals
from torchopt_passes.graph.pruning.slicing import Removal, slice_in_place
from torchopt_passes.graph.tensors import find_owner, get_tensor

__all__ = ["remove_from_source"]


def remove_from_source(module: nn.Module, removals: Mapping[str, Removal]) -> None:
    """Cut tensors of a module in place and make the layers that hold them fit.

    The masks that training callbacks keep beside weights (``weight_mask``) are cut with them.

    Args:
        module: the user's module.
        removals: first fqn of a parameter or buffer -> what leaves it.

    Raises:
        PlanError: the plan is applied already, some tensors are cut and others are not, or a layer cannot have the new
            shapes.
    """
    removals = {**removals, **_masks(module, removals)}
    tensors = {fqn: get_tensor(module, fqn) for fqn in removals}
    before = [fqn for fqn, tensor in tensors.items() if tuple(tensor.shape) == removals[fqn].shape]
    after = [fqn for fqn, tensor in tensors.items() if tuple(tensor.shape) == removals[fqn].new_shape]
    if len(before) != len(removals) and len(after) != len(removals):
        odd = next(fqn for fqn in removals if fqn not in before)
        raise PlanError(f"{odd} has shape {tuple(tensors[odd].shape)}, the plan was made for {removals[odd].shape}")
    if before:
        for fqn, tensor in tensors.items():
            slice_in_place(tensor, removals[fqn])
    changes = fit_sizes(module, {id(tensors[fqn]): removal for fqn, removal in removals.items()})
    if not before and not changes:
        raise PlanError("the plan is applied already: every tensor and every layer has the size that it leaves")
    note_removals(module, removals, changes)


def _masks(module: nn.Module, removals: Mapping[str, Removal]) -> dict[str, Removal]:
    """Return what leaves the masks beside the weights that are cut; the plan may name them itself."""
    found: dict[str, Removal] = {}
    for fqn, removal in removals.items():
        owner, name = find_owner(module, fqn)
        mask = owner._buffers.get(f"{name}_mask")
        if mask is not None and mask.dtype is torch.bool and tuple(mask.shape) in (removal.shape, removal.new_shape):
            found[f"{fqn}_mask"] = removal
    return {fqn: removal for fqn, removal in found.items() if fqn not in removals}
