"""Where early exits may branch off: what modules compute, of what shape, and after how much of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.distill.taps import check_path, layer_names
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.exits import evenly_spaced
from torchopt_passes.graph.verify import Inputs, buffers_kept, in_eval_mode

__all__ = ["ExitHead", "Place", "choose_places"]


@dataclass(frozen=True)
class Place:
    """What a module computes.

    Args:
        path: of the module.
        width: features of what it returns.
        depth: share of the model's multiply-accumulates that is done when it returns, in [0, 1].
    """

    path: str
    width: int
    depth: float


class ExitHead(nn.Module):
    """A linear classifier on features of a layer, pooled over positions.

    Args:
        width: features.
        classes: of the logits.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, (samples, classes).

        Args:
            features: (samples, width), (samples, tokens, width), or (samples, width, height, width of the image).
            mask: (samples, tokens), 0 for padding; None counts every token.
        """
        if features.ndim == 3:
            if mask is not None and mask.shape == features.shape[:2]:
                counts = mask.to(features.dtype).unsqueeze(-1)
                features = (features * counts).sum(1) / counts.sum(1).clamp(min=1)
            else:
                features = features.mean(1)
        elif features.ndim > 3:
            features = features.flatten(2).mean(2)
        return self.linear(features.to(self.linear.weight.dtype))


def choose_places(
    model: nn.Module, at: tuple[str, ...], count: int, inputs: Inputs, logits: str
) -> tuple[tuple[Place, ...], int]:
    """Return where exits branch off, in the order of the model, and how many classes there are.

    Args:
        model: the student; it runs once, in eval mode, and is as before afterwards.
        at: paths of modules; empty for `count` places that divide the work most evenly, among the parts of the model's
            sequences (of the model itself, where it has none).
        count: see `at`.
        inputs: of a batch.
        logits: name of the output.

    Raises:
        ConfigError: the model has no such module, or no class logits by sample, or a module cannot carry an exit.
    """
    if isinstance(model, fx.GraphModule):
        raise ConfigError(
            "exits branch off modules, and a captured graph calls none: add them to the module, and capture parts of it"
        )
    for path in at:
        check_path(model, path, "student")
    names = list(at) if at else _parts(model)
    found, classes = _run(model, names, inputs, logits)
    for path in at:
        if not isinstance(found.get(path), Place):
            raise ConfigError(f"{path!r} cannot carry an exit: {found.get(path, 'it does not run')}")
    places = sorted((p for p in found.values() if isinstance(p, Place)), key=lambda place: place.depth)
    if not at:
        early = [place for place in places if 0.0 < place.depth < 1.0]
        if len(early) < count:
            raise ConfigError(
                f"{type(model).__name__} has {len(early)} places for {count} exits ({[p.path for p in early]}): name "
                "modules with at=, or take a smaller count="
            )
        places = [early[number] for number in evenly_spaced([place.depth for place in early], count)]
    return tuple(places), classes


def _parts(model: nn.Module) -> list[str]:
    """Return the outermost parts of sequences and lists of modules; a model without any has its own children."""
    names = layer_names(model)
    parts: list[str] = []
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        inside = any(name.startswith(f"{part}.") for part in parts)
        if isinstance(parent, nn.Sequential | nn.ModuleList) and not inside:
            parts.append(name)
    return parts or [name for name in names if "." not in name]


def _run(model: nn.Module, names: list[str], inputs: Inputs, logits: str) -> tuple[dict[str, Place | str], int]:
    """Return for each module what it computes, or why it can carry no exit."""
    seen: dict[str, tuple[Any, int]] = {}
    again: set[str] = set()
    counter = FlopCounterMode(display=False)

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in seen:
                again.add(name)
            seen[name] = output, counter.get_total_flops()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
    args, kwargs = inputs
    try:
        with in_eval_mode(model), buffers_kept(model), counter:
            output = outputs.field(model(*args, **kwargs), logits, "student")
    finally:
        for handle in handles:
            handle.remove()
    if output.ndim != 2 or output.shape[1] < 2:
        raise ConfigError(f"exits need class logits of shape (samples, classes), not {tuple(output.shape)}")
    total = max(1, counter.get_total_flops())
    found: dict[str, Place | str] = {}
    for name, (value, flops) in seen.items():
        first = value[0] if isinstance(value, tuple) and value else value
        if name in again:
            found[name] = "it runs more than once"
        elif not isinstance(first, torch.Tensor) or not first.is_floating_point() or not 2 <= first.ndim <= 4:
            found[name] = "it returns no features of 2 to 4 dimensions"
        elif len(first) != len(output):
            found[name] = f"it returns {len(first)} rows for {len(output)} samples"
        else:
            found[name] = Place(name, first.shape[-1 if first.ndim == 3 else 1], flops / total)
    return found, output.shape[1]
