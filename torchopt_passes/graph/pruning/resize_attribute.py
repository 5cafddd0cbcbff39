"""ResizeAttribute: a size that the user's own module keeps as a number is made to fit what was removed."""

from __future__ import annotations

from typing import Any, cast

from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.pruning.pruned_record import note_attribute

__all__ = ["ResizeAttribute", "Size", "read_size", "write_size"]

Size = int | tuple[int, ...]
"""What an attribute that is a size holds: an integer, or several."""


class ResizeAttribute(Edit):
    """Set a size attribute of the source module, such as ``num_heads``; on a captured graph it changes nothing.

    Args:
        target: dotted path of the attribute, through modules and configurations:
            ``"encoder.layer.0.attention.num_heads"``, ``"config.intermediate_size"``.
        old: its value before.
        new: its value after.
    """

    writes_values = False

    old: Size
    new: Size

    def check(self) -> None:
        """Refuse a path that is none, and values that are not of one kind."""
        if not all(part.isidentifier() or part.isdigit() for part in self.target.split(".")):
            raise PlanError(f"{self.target!r} is no path of an attribute")
        if any(part.startswith("_") for part in self.target.split(".")[-1:]):
            raise PlanError(f"{self.target} is private")
        if isinstance(self.old, tuple) != isinstance(self.new, tuple):
            raise PlanError(f"{self.target}: {self.old} and {self.new} must both be integers, or both be tuples")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module that has another value there."""
        if isinstance(module, fx.GraphModule):
            return
        value = read_size(module, self.target)
        if value not in (self.old, self.new):
            raise PlanError(f"{self.target} is {value}, but the plan was made for {self.old}")

    def apply(self, module: nn.Module) -> None:
        """Set the attribute; a list stays a list."""
        if not isinstance(module, fx.GraphModule):
            note_attribute(module, self.target, self.old, self.new)
            write_size(module, self.target, self.new)


def read_size(module: nn.Module, target: str) -> Size:
    """Return the size at a dotted path.

    Raises:
        PlanError: there is no such attribute, or it is no integer and no sequence of integers.
    """
    owner, name = _owner(module, target)
    value: Any = getattr(owner, name, None)
    if isinstance(value, list | tuple):
        value = tuple(cast("list[Any]", value))
    items = value if isinstance(value, tuple) else (value,)
    if not items or not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise PlanError(f"{type(module).__name__} has no size {target!r}")
    return cast("Size", value)


def write_size(module: nn.Module, target: str, value: Size) -> None:
    """Set the size at a dotted path, in the kind of sequence that is there."""
    owner, name = _owner(module, target)
    now: Any = getattr(owner, name)
    setattr(owner, name, list(value) if isinstance(now, list) and isinstance(value, tuple) else value)


def _owner(module: nn.Module, target: str) -> tuple[Any, str]:
    """Return the object that holds an attribute: a submodule, or a configuration that one holds."""
    *path, name = target.split(".")
    owner: Any = module
    for part in path:
        if isinstance(owner, nn.Module) and part in owner._modules:
            owner = owner._modules[part]
        else:
            owner = getattr(owner, "__dict__", {}).get(part)
        if owner is None or isinstance(owner, type) or not hasattr(owner, "__dict__"):
            raise PlanError(f"{type(module).__name__} has no {target!r}: there is no {part!r}")
    return owner, name
