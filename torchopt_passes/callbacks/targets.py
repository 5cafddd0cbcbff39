"""Which weights of a model a pruning callback manages, and along which dimension they are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import fx, nn

from torchopt_passes.callbacks.lifecycle import Lifecycle
from torchopt_passes.callbacks.owned import is_owned
from torchopt_passes.callbacks.sharded import is_sharded, part_of
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.tensors import aliases, check_patterns, find_owner, matching_pattern
from torchopt_passes.graph.weights import input_dim, matrix_weights

__all__ = ["Masked", "Target", "choose_targets", "put_masks"]


class Masked(Protocol):
    """What lies under one mask."""

    @property
    def fqn(self) -> str:
        """Name of the parameter that the mask lies beside."""
        ...

    @property
    def owner(self) -> nn.Module:
        """The module that holds it, and the mask."""
        ...

    @property
    def mask_name(self) -> str:
        """Name of the mask buffer in the owner."""
        ...

    @property
    def claims(self) -> tuple[str, ...]:
        """Names of every parameter that the mask sets entries of to zero."""
        ...


MaskedT = TypeVar("MaskedT", bound=Masked)


@dataclass(frozen=True)
class Target:
    """One weight under a mask.

    Args:
        fqn: name of the parameter.
        owner: the module that holds it.
        name: its name there.
        input_dim: the dimension its operation sums over, None if unknown.
    """

    fqn: str
    owner: nn.Module
    name: str
    input_dim: int | None

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as it is now."""
        return self.owner._parameters[self.name]  # pyright: ignore[reportReturnType] (an attribute may lie over it)

    @property
    def mask_name(self) -> str:
        """Name of the mask buffer beside the weight, in the owner."""
        return f"{self.name}_mask"

    @property
    def claims(self) -> tuple[str, ...]:
        """The weight alone."""
        return (self.fqn,)

    @property
    def mask(self) -> torch.Tensor:
        """The mask beside the weight: bool, True for what is kept."""
        return self.state("mask")

    def choose(self, mask: torch.Tensor) -> None:
        """Set the mask; whole, or in parts as the weight is."""
        self.mask.copy_(part_of(mask, self.mask))

    def state(self, kind: str) -> torch.Tensor:
        """The buffer ``<name>_<kind>`` beside the weight; in parts on several ranks from when the weight is."""
        name = f"{self.name}_{kind}"
        buffer, weight = self.owner.get_buffer(name), self.weight
        if is_sharded(weight) and buffer.shape == weight.shape and not is_sharded(buffer):
            buffer = part_of(buffer, weight)
            self.owner.register_buffer(name, buffer)
        return buffer

    def refuse_taken(self, kind: str, value: torch.Tensor) -> None:
        """Refuse a weight beside which ``<name>_<kind>`` is something else than what a run that failed left over.

        Raises:
            CallbackError: it is.
        """
        name = f"{self.name}_{kind}"
        present = self.owner._buffers.get(name)
        ours = present is not None and present.shape == value.shape and present.dtype == value.dtype
        if hasattr(self.owner, name) and not ours:
            raise CallbackError(f"{self.fqn} has a {name} beside it already: rename that first")

    def put_state(self, kind: str, value: torch.Tensor) -> None:
        """Put a buffer ``<name>_<kind>`` beside the weight."""
        self.owner.register_buffer(f"{self.name}_{kind}", value)

    def drop_state(self, kind: str) -> None:
        """Take the buffer away, if it is there."""
        self.owner._buffers.pop(f"{self.name}_{kind}", None)

    def gradient(self) -> torch.Tensor:
        """The gradient of the weight, zeros where the step has none."""
        gradient = self.weight.grad
        return torch.zeros_like(self.weight) if gradient is None else gradient.detach()


def put_masks(student: Student, callback: Lifecycle, masks: Mapping[MaskedT, torch.Tensor]) -> None:
    """Put a mask buffer beside each weight, all or none; one left over by a run that ended in an error is replaced.

    Args:
        student: the model.
        callback: the one that manages these weights from now on.
        masks: bool, True for what is kept; of the shape of the weight, or one entry for each unit.

    Raises:
        CallbackError: another callback manages a weight, or the name is in use for something else.
    """
    for target, mask in masks.items():
        for fqn in target.claims:
            student.claim(fqn, callback)
        present = getattr(target.owner, target.mask_name, None)
        ours = isinstance(present, torch.Tensor) and present.dtype is torch.bool and present.shape == mask.shape
        if present is not None and not ours:
            raise CallbackError(
                f"{target.fqn} has a {target.mask_name} beside it already (torch.nn.utils.prune?): remove that first"
            )
    for target, mask in masks.items():
        target.owner.register_buffer(target.mask_name, mask)


def choose_targets(
    model: nn.Module, include: Sequence[str], skip: Sequence[str]
) -> tuple[tuple[Target, ...], tuple[Skip, ...]]:
    """Return the weights to manage and, with the reason, every parameter that is left alone.

    On a captured graph these are the weights of matrix operations; on another module its trainable parameters
    of two or more dimensions, embeddings excepted. A tied weight counts once, and not at all if it is an
    embedding too.

    Args:
        model: the student.
        include: globs on fqns; empty for all.
        skip: globs on fqns to leave alone.

    Raises:
        ConfigError: a glob matches nothing, or nothing is left to manage.
    """
    check_patterns(model, include, "include")
    check_patterns(model, skip, "skip")
    candidates = _graph_weights(model) if isinstance(model, fx.GraphModule) else _module_weights(model)
    targets: list[Target] = []
    skips: list[Skip] = []
    for fqn, parameter in model.named_parameters():
        pattern = matching_pattern(fqn, skip)
        if is_owned(fqn):
            skips.append(Skip(target=fqn, reason="brought by a callback"))
        elif fqn not in candidates:
            skips.append(Skip(target=fqn, reason="not the weight of a matrix operation"))
        elif pattern is not None:
            skips.append(Skip(target=fqn, reason=f"skip pattern {pattern!r}"))
        elif include and matching_pattern(fqn, include) is None:
            skips.append(Skip(target=fqn, reason="not in include"))
        elif not parameter.requires_grad:
            skips.append(Skip(target=fqn, reason="frozen: requires_grad is False"))
        else:
            owner, name = find_owner(model, fqn)
            targets.append(Target(fqn, owner, name, candidates[fqn]))
    if not targets:
        reasons = sorted({skip.reason for skip in skips})
        raise ConfigError(
            f"no weight of {type(model).__name__} is left to prune: {'; '.join(reasons) or 'no parameters'}"
        )
    return tuple(targets), tuple(skips)


def _graph_weights(graph_module: fx.GraphModule) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for fqn, nodes in matrix_weights(graph_module).items():
        dims = {input_dim(node, fqn) for node in nodes}
        found[fqn] = dims.pop() if len(dims) == 1 else None
    return found


def _module_weights(model: nn.Module) -> dict[str, int | None]:
    first = aliases(model)
    found: dict[str, int | None] = {}
    embeddings: set[str] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fqn = first[f"{path}.{name}" if path else name]
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                embeddings.add(fqn)
            elif parameter.ndim >= 2:
                found[fqn] = 0 if _is_transposed(module) else 1
    return {fqn: dim for fqn, dim in found.items() if fqn not in embeddings}


def _is_transposed(module: nn.Module) -> bool:
    """Return whether the weight's first dimension is the input: transposed convolutions, and GPT-2's Conv1D."""
    transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return isinstance(module, transposed) or type(module).__name__ == "Conv1D"
