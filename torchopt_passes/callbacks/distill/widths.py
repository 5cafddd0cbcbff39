"""How many channels a layer returns, and which weight makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchopt_passes.callbacks.distill.taps import Tap
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.captured import CapturedModule
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices
from torchopt_passes.graph.watches import input_node, output_node

__all__ = ["channel_dim", "kept_channels", "read_width"]

_OUT = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim", "nf")
_IN = ("in_features", "in_channels", "nx")


def channel_dim(ndim: int, given: int | None) -> int:
    """Return the dimension of the channels of a feature: as given, 1 for maps, the last one for tokens and vectors."""
    return given if given is not None else 1 if ndim >= 4 else -1


def read_width(model: nn.Module, tap: Tap, given_dim: int | None) -> int | None:
    """Return how many channels a layer returns (or is given), None where that cannot be read off the model.

    A captured graph has recorded it. A module tells by its attributes, and one of several parts by the last of them
    that tells.

    Args:
        model: source module or captured graph.
        tap: what is looked at.
        given_dim: the dimension of the channels where the loss names it.
    """
    if isinstance(model, CapturedModule):
        node = (output_node if tap.side == "output" else input_node)(model.graph, tap.path)
        shape = node.meta["val"].shape
        return int(shape[channel_dim(len(shape), given_dim)])
    module = model.get_submodule(tap.path)
    if tap.side == "input":
        return _attribute(module, _IN)
    widths = [width for part in module.modules() if (width := _own_width(part)) is not None]
    return widths[-1] if widths else None


def kept_channels(plans: Sequence[Plan], teacher: nn.Module, tap: Tap, width: int) -> tuple[int, ...] | None:
    """Return which of the teacher's channels a student has that plans made of it, ascending; None for all of them.

    Args:
        plans: what removed indices from the student, in the order in which they were applied.
        teacher: the model as it was before.
        tap: a layer of it.
        width: how many channels it has.

    Raises:
        ConfigError: the plans were made for other sizes.
    """
    found = _making(teacher, tap, width)
    if found is None:
        return None
    fqn, dim = found
    kept = list(range(width))
    for plan in plans:
        for edit in plan.edits:
            if isinstance(edit, RemoveIndices) and edit.target == fqn and edit.dim == dim:
                if edit.size != len(kept):
                    raise ConfigError(
                        f"kept: a plan removes from {edit.size} indices of {fqn}, but there are {len(kept)}: give the "
                        "plans that made the student of this teacher, in their order"
                    )
                gone = set(edit.indices)
                kept = [index for place, index in enumerate(kept) if place not in gone]
    return tuple(kept) if len(kept) < width else None


def check_width(feature: torch.Tensor, dim: int, expected: int | None, tap: Tap, who: str) -> None:
    """Refuse a feature of another width than was read off the model.

    Raises:
        CallbackError: says how to tell it.
    """
    if expected is not None and feature.shape[dim] != expected:
        raise CallbackError(
            f"{tap.path!r} of the {who} has {feature.shape[dim]} channels in dimension {dim} of "
            f"{tuple(feature.shape)}, but {expected} were read off its parts: give example_inputs=one batch, or "
            "channel_dim= of the loss"
        )


def _making(model: nn.Module, tap: Tap, width: int) -> tuple[str, int] | None:
    """Return the weight whose indices are the channels, and their dimension; of several parts, the last one's."""
    module = model.get_submodule(tap.path)
    if tap.side == "input":
        weight = module._parameters.get("weight")
        return (f"{tap.path}.weight", 1) if weight is not None and weight.ndim > 1 else None
    found = None
    for name, part in module.named_modules(prefix=tap.path):
        weight = part._parameters.get("weight")
        if weight is not None:
            dim = 1 if _is_transposed(part) else 0
            if weight.ndim > dim and weight.shape[dim] == width:
                found = (f"{name}.weight", dim)
    return found


def _is_transposed(module: nn.Module) -> bool:
    transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Embedding
    return isinstance(module, transposed) or type(module).__name__ == "Conv1D"


def _own_width(module: nn.Module) -> int | None:
    width = _attribute(module, _OUT)
    if width is None and isinstance(module, nn.LayerNorm | nn.RMSNorm):
        width = module.normalized_shape[-1]
    weight = module._parameters.get("weight")
    if width is None and weight is not None and weight.ndim == 1:  # RMS norms of Transformers
        width = len(weight)
    return width


def _attribute(module: nn.Module, names: Sequence[str]) -> int | None:
    values: list[Any] = [getattr(module, name, None) for name in names]
    return next((value for value in values if isinstance(value, int)), None)
