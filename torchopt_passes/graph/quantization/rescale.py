"""Edits that change values alone: scale the channels of a tensor, set a tensor; and what they leave exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.affine import along
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.quantization.scale_pairs import Axis, Reader, Site, find_sites
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor

__all__ = [
    "SCALED_BY",
    "ScaleChannels",
    "SetTensor",
    "Weights",
    "is_near_one",
    "move_scale",
    "replace_tensor",
    "unscaled",
    "usable_sites",
]

SCALED_BY = "scaled_by"
"""The key of a node's meta that names the pass that has scaled a weight: one that searches must not search again."""


class ScaleChannels(Edit):
    """Multiply or divide a parameter, channel by channel; its fqn is the target.

    On a captured graph the tensor is a new one (the graph shares the old with the source module, which stays as it
    is); on the source module its values change in place.

    Args:
        dim: the dimension of the channels.
        scale: one factor for each channel.
        divide: divide by it, so that what one edit divides another multiplies exactly.
        groups: blocks of dimension 0 that each hold their own part of the channels (a grouped convolution's inputs).
        by: the pass.
    """

    dim: int
    scale: torch.Tensor
    divide: bool = False
    groups: int = 1
    by: str = ""

    def check(self) -> None:
        """Refuse scales that are not positive."""
        if self.scale.ndim != 1 or not bool((self.scale > 0).all()):
            raise PlanError(f"{self.target}: a scale is one positive number for each channel")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that tensor, or with another number of channels."""
        shape = tuple(get_tensor(module, self.target).shape)
        if self.dim >= len(shape) or shape[self.dim] * self.groups != len(self.scale) or shape[0] % self.groups:
            raise PlanError(
                f"{self.target} has shape {shape}: {len(self.scale)} scales do not fit dimension {self.dim}"
            )

    def apply(self, module: nn.Module) -> None:
        """Scale the tensor."""
        with torch.no_grad():
            replace_tensor(module, self.target, self.on(get_tensor(module, self.target)))
        for node in module.graph.find_nodes(op="get_attr") if isinstance(module, fx.GraphModule) and self.by else ():
            if node.target == self.target:
                node.meta[SCALED_BY] = self.by

    def on(self, tensor: torch.Tensor, *, undo: bool = False) -> torch.Tensor:
        """Return a tensor scaled, in its own dtype; or what it was before."""
        scale = self.scale.to(tensor)
        wide = tensor.unflatten(0, (self.groups, -1)) if self.groups > 1 else tensor
        if self.groups > 1:
            shape = [1] * wide.ndim
            shape[0], shape[self.dim + 1] = self.groups, -1
            factor = scale.reshape(shape)
        else:
            factor = along(scale, tensor.ndim, self.dim)
        result = wide / factor if self.divide != undo else wide * factor
        return result.reshape(tensor.shape)


class SetTensor(Edit):
    """Give a parameter or buffer, whose fqn is the target, another value of the same shape.

    On a captured graph it is a new tensor, so that the source module stays as it is.

    Args:
        value: what it becomes.
        mark: key of the meta of the nodes `marked` that tells that this was done.
        marked: names of those nodes.
    """

    value: torch.Tensor
    mark: str = ""
    marked: tuple[str, ...] = ()

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that tensor, or with another shape of it."""
        shape = tuple(get_tensor(module, self.target).shape)
        if shape != tuple(self.value.shape):
            raise PlanError(f"{self.target} has shape {shape}, the plan's value {tuple(self.value.shape)}")

    def apply(self, module: nn.Module) -> None:
        """Set the tensor."""
        with torch.no_grad():
            replace_tensor(module, self.target, self.value.to(get_tensor(module, self.target)).clone())
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) and self.mark else ():
            if node.name in self.marked:
                node.meta[self.mark] = True


def replace_tensor(module: nn.Module, fqn: str, value: torch.Tensor) -> None:
    """Put a value into a parameter or buffer: a new tensor under all its names in a graph, in place in a source."""
    old = get_tensor(module, fqn)
    if not isinstance(module, fx.GraphModule):
        old.copy_(value)
        return
    first = aliases(module)
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for name in [name for name, other in first.items() if other == first[fqn]]:
        owner, own = find_owner(module, name)
        table: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
        table[own] = new


def unscaled(graph_module: fx.GraphModule, edits: Iterable[Edit]) -> dict[str, torch.Tensor]:
    """Return, in float64, the tensors with which the graph before is exactly the graph after.

    Stored tensors are rounded to their dtype after scaling: what they would be without the scales is compared.
    """
    weights = Weights(graph_module)
    scaled = [edit for edit in weights.scaled(edits) if isinstance(edit, ScaleChannels)]
    exact = {edit.target: weights[edit.target].double() for edit in scaled}
    for edit in scaled:
        exact[edit.target] = edit.on(exact[edit.target], undo=True)
    return exact


class Weights:
    """The tensors of a graph as they are after some edits, which is left untouched.

    Args:
        graph_module: owner of the tensors.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._changed: dict[str, torch.Tensor] = {}

    def __getitem__(self, fqn: str) -> torch.Tensor:
        if fqn in self._changed:
            return self._changed[fqn]
        return get_tensor(self._graph_module, fqn).detach()

    def scaled(self, edits: Iterable[Edit]) -> list[Edit]:
        """Take edits into account, and return them."""
        edits = list(edits)
        for edit in edits:
            if isinstance(edit, ScaleChannels):
                self._changed[edit.target] = edit.on(self[edit.target])
        return edits

    def columns(self, reader: Reader) -> torch.Tensor:
        """Return a reader's weight as a matrix, a column for each of its input channels."""
        weight, axis = self[reader.axis.fqn], reader.axis
        if axis.groups == 1:
            return weight.movedim(axis.dim, -1).flatten(0, -2)
        blocks = weight.flatten(2).unflatten(0, (axis.groups, -1))  # [groups, out, in, kernel]
        return blocks.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def usable_sites(graph_module: fx.GraphModule, context: PassContext, **options: bool) -> tuple[list[Site], list[Skip]]:
    """Return the places where a scale can be moved, and the others with their reasons; skip patterns are obeyed."""
    sites: list[Site] = []
    skips: list[Skip] = []
    for site in find_sites(graph_module, **options):
        pattern = next((p for p in map(context.skipped_by, (site.name, *site.fqns)) if p is not None), None)
        if pattern is not None:
            skips.append(Skip(target=site.name, reason=f"skip pattern {pattern!r}"))
        elif site.why_not:
            skips.append(Skip(target=site.name, reason=site.why_not))
        else:
            sites.append(site)
    return sites, skips


def is_near_one(scale: torch.Tensor) -> bool:
    """Whether a scale changes nothing that is worth an edit: |log s| below 0.001 for every channel."""
    return float(scale.log().abs().max()) < 1e-3


def move_scale(site: Site, scale: torch.Tensor, reason: str, numbers: dict[str, float], by: str) -> list[Edit]:
    """Return the edits that divide what makes the channels of a site by a scale and multiply what reads them.

    Args:
        site: where.
        scale: positive, shape [site.size].
        reason: why.
        numbers: the figures behind it, of the whole site.
        by: the pass.
    """
    spread = {"scale_min": float(scale.min()), "scale_max": float(scale.max())}
    scale = scale.detach().float().cpu()

    def edit(axis: Axis, values: torch.Tensor, divide: bool) -> Edit:
        return ScaleChannels(
            target=axis.fqn,
            reason=reason,
            numbers=numbers | spread,
            dim=axis.dim,
            scale=values.clone(),  # safetensors refuses tensors that share memory
            divide=divide,
            groups=axis.groups,
            by=by,
        )

    readers = [
        edit(reader.axis, torch.where(reader.index < 0, 1.0, scale[reader.index]), False) for reader in site.readers
    ]
    return [*(edit(axis, scale, True) for axis in site.makers), *readers]
