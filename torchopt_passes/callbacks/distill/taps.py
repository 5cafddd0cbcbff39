"""Taps: what layers of a model compute in one forward, by module path, on source modules and captured graphs alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchopt_passes._compat import run_eagerly
from torchopt_passes.errors import CallbackError, CaptureError, ConfigError
from torchopt_passes.graph.captured import CapturedModule
from torchopt_passes.graph.watches import Watch, input_node, output_node

__all__ = ["Tap", "Taps", "check_path", "layer_names"]


@dataclass(frozen=True)
class Tap:
    """One value of a model.

    Args:
        path: of a module; in a captured graph also the name of a node.
        side: what the module returns or what it is given; of several tensors the first.
    """

    path: str
    side: Literal["output", "input"] = "output"


class Taps:
    """Values of a model, recorded while a window is open; nothing is kept in between.

    Args:
        model: the model itself, unwrapped.
        taps: what to record.
        who: the model in errors, ``"student"`` or ``"teacher"``.

    Raises:
        ConfigError: the model has no such layer; names close ones.
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap], who: str) -> None:
        self._who, self._open = who, False
        self._taps = tuple(dict.fromkeys(taps))
        self._values: dict[Tap, tuple[torch.Tensor, int]] = {}
        self._again: set[Tap] = set()
        self._detached: set[Tap] = set()
        self._undo: Callable[[], None] = lambda: None
        for tap in self._taps:
            check_path(model, tap.path, who)
        if isinstance(model, CapturedModule):
            self._watch(model)
        elif self._taps:
            self._hook(model)

    def open(self) -> None:
        """Record from now on."""
        self._values, self._again, self._detached, self._open = {}, set(), set(), True

    def take(self) -> dict[Tap, torch.Tensor]:
        """Return what was recorded, and stop.

        Raises:
                CallbackError: a layer did not run, ran twice or without gradients, or its value was changed in place
                    later.
        """
        values, again, self._open = self._values, self._again, False
        self._values = {}
        for tap in self._taps:
            if tap not in values:
                raise CallbackError(
                    f"{tap.path!r} of the {self._who} computed nothing in this forward: it was not called, or returns "
                    "no tensor, or the model was compiled and called before (compile it after, or call it later)"
                )
            if tap in self._detached and self._who == "student" and torch.is_grad_enabled():
                raise CallbackError(
                    f"{tap.path!r} ran without gradients (reentrant checkpointing?): with gradient checkpointing, take "
                    "use_reentrant=False"
                )
            if tap in again:
                raise CallbackError(f"{tap.path!r} of the {self._who} ran more than once: name a layer that runs once")
            if _version(values[tap][0]) != values[tap][1]:
                raise CallbackError(
                    f"what {tap.path!r} of the {self._who} computes is changed in place afterwards (by a "
                    "ReLU(inplace=True), say): name the layer that changes it"
                )
        return {tap: value for tap, (value, _) in values.items()}

    def remove(self) -> None:
        """Leave the model as it was."""
        undo, self._undo, self._values = self._undo, lambda: None, {}
        undo()

    def record(self, tap: Tap, value: Any) -> None:
        """Note what was computed, if the window is open."""
        tensor = _first_tensor(value) if self._open else None
        if tensor is not None:
            if tap in self._values:
                self._again.add(tap)
            if not torch.is_grad_enabled():
                self._detached.add(tap)
            self._values[tap] = (tensor, _version(tensor))

    def _hook(self, model: nn.Module) -> None:
        handles: list[RemovableHandle] = []
        for tap in self._taps:
            module, hook = model.get_submodule(tap.path), _Hook(self, tap)
            if tap.side == "output":
                handles.append(module.register_forward_hook(hook.after, with_kwargs=True))
            else:
                handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))

        def undo() -> None:
            for handle in handles:
                handle.remove()

        self._undo = undo

    def _watch(self, model: CapturedModule) -> None:
        taps: dict[str, list[Tap]] = {}
        for tap in self._taps:
            try:
                node = (output_node if tap.side == "output" else input_node)(model.graph, tap.path)
            except CaptureError as error:
                raise CallbackError(f"the {self._who}, a captured graph: {error}") from error
            taps.setdefault(node.name, []).append(tap)
        if not taps:
            return

        def watch(group: list[Tap]) -> Watch:
            @run_eagerly
            def record(value: torch.Tensor) -> None:
                for tap in group:
                    self.record(tap, value)

            return record

        self._undo = model.watch({name: watch(group) for name, group in taps.items()})


class _Hook:
    """Shows a layer's values to `Taps`; copies and pickles of the model carry one that does nothing."""

    def __init__(self, taps: Taps | None, tap: Tap) -> None:
        self._taps, self._tap = taps, tap

    @run_eagerly
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._taps is not None:
            self._taps.record(self._tap, output)

    @run_eagerly
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._taps is not None:
            self._taps.record(self._tap, (*args, *kwargs.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self._tap)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None, Tap]]:
        return _Hook, (None, self._tap)


def layer_names(model: nn.Module) -> list[str]:
    """Return the paths of a model's modules, without itself and without what callbacks brought."""
    return [name for name, _ in model.named_modules() if name and not name.startswith("torchopt_")]


def check_path(model: nn.Module, path: str, who: str) -> None:
    """Refuse a layer that a model does not have.

    Raises:
        ConfigError: names close ones.
    """
    names = layer_names(model)
    if path in names or (isinstance(model, CapturedModule) and any(node.name == path for node in model.graph.nodes)):
        return
    close = get_close_matches(path, names, n=3, cutoff=0.4)
    raise ConfigError(
        f"the {who} {type(model).__name__} has no layer {path!r}"
        + (f"; close names: {close}" if close else f"; its layers begin with {names[:5]}")
    )


def _first_tensor(value: Any) -> torch.Tensor | None:
    """Return the floating tensor that comes first in what a module returned or was given."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).values()
    elif isinstance(value, tuple | list):
        items = cast("Iterable[Any]", value)
    return next((tensor for item in items if (tensor := _first_tensor(item)) is not None), None)


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version
