"""Edits: the smallest decisions of a plan, and their registry by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Self

from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.record import Record, snake_case

__all__ = ["Edit", "Skip", "edit_kinds"]

_KINDS: dict[str, type[Edit]] = {}


class Skip(Record):
    """Something a pass considered and left as it is.

    Args:
        target: the parameter's fqn or the graph's node.
        reason: why it was left.
    """

    error_class = PlanError

    target: str
    reason: str


class Edit(Record):
    """One change to one thing; subclasses add what the change needs, and say how it is made.

    A subclass registers itself under its snake_case name, which is its `kind` in a plan file.

    Args:
        target: the parameter's fqn or the graph's node.
        reason: why it is made, in words a user understands.
        numbers: the figures behind the decision, by name.
    """

    error_class = PlanError
    kind: ClassVar[str] = ""
    on_source: ClassVar[bool] = True
    """Whether it can be applied to the user's own module too, or to a captured graph alone."""

    writes_values: ClassVar[bool] = True
    """Whether it changes tensors in place; one that only puts new ones in their place is rolled back without a copy."""

    target: str
    reason: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.kind = snake_case(cls.__name__)
        super().__init_subclass__(**kwargs)
        _KINDS[cls.kind] = cls

    def validate(self, module: nn.Module) -> None:
        """Refuse a module that this edit does not fit; changes nothing.

        Raises:
            PlanError: names the target and what does not fit.
        """

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Self]) -> None:
        """Make these edits, in order, in place; a family of edits that must be made together overrides it."""
        for edit in edits:
            edit.apply(module)

    @classmethod
    def apply_to_optimizer(
        cls, module: nn.Module, edits: Sequence[Self], optimizer: Any, before: Mapping[str, nn.Parameter]
    ) -> None:
        """Make an optimizer of the module's parameters fit; called after `apply_all`.

        Args:
            module: as `apply_all` left it.
            edits: what was applied.
            optimizer: its state tensors are replaced, never changed in place (that could not be rolled back).
            before: the parameters that the module had before, by first fqn.
        """

    def apply(self, module: nn.Module) -> None:
        """Make this edit in place."""
        raise NotImplementedError(f"{type(self).__name__} defines neither apply nor apply_all")


def edit_kinds() -> dict[str, type[Edit]]:
    """Return every registered edit by kind (the built-in passes are imported first)."""
    from torchopt_passes.graph.registry import load_builtin_passes

    load_builtin_passes()
    return dict(_KINDS)
