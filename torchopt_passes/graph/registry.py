"""The registry of passes by snake_case name; a pass registers itself when its class is made."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from torchopt_passes.errors import ConfigError

if TYPE_CHECKING:
    from torchopt_passes.graph.base import GraphPass

__all__ = ["load_builtin_passes", "make_pass", "pass_types", "register"]

_FAMILIES = ("pruning", "quantization", "fusion")
_PASSES: dict[str, type[GraphPass]] = {}


def register(pass_type: type[GraphPass]) -> None:
    """Add a pass under its name; a second class of that name must be the same class made again (a reload).

    Raises:
        ConfigError: another class has that name.
    """
    known = _PASSES.get(pass_type.name)
    if known is not None and (known.__module__, known.__qualname__) != (
        pass_type.__module__,
        pass_type.__qualname__,
    ):
        raise ConfigError(f"a pass named {pass_type.name!r} exists already: {known.__module__}.{known.__qualname__}")
    _PASSES[pass_type.name] = pass_type


def load_builtin_passes() -> None:
    """Import every family, so that its passes and edits are registered."""
    for family in _FAMILIES:
        import_module(f"torchopt_passes.graph.{family}")
    import_module("torchopt_passes.graph.pipeline")


def pass_types() -> dict[str, type[GraphPass]]:
    """Return every registered pass class by name."""
    load_builtin_passes()
    return dict(sorted(_PASSES.items()))


def make_pass(recipe: Any) -> GraphPass:
    """Make a pass from recipe data: ``"name"``, ``{name: {option: value}}``, or a list of those (a `Pipeline`).

    Raises:
        ConfigError: an unknown pass or option; lists the known ones.

    Example:
        >>> make_pass({"prune_weights": {"sparsity": 0.5}})
        PruneWeights(sparsity=0.5, ...)
    """
    from torchopt_passes.graph.pipeline import Pipeline

    if isinstance(recipe, list | tuple):
        return Pipeline(*(make_pass(item) for item in cast("list[Any]", recipe)))
    if isinstance(recipe, str):
        recipe = {recipe: {}}
    if not isinstance(recipe, dict) or len(cast("dict[Any, Any]", recipe)) != 1:
        raise ConfigError(f"a pass in a recipe is a name or {{name: {{option: value}}}}, not {recipe!r}")
    ((name, options),) = cast("dict[Any, Any]", recipe).items()
    types = pass_types()
    if name not in types:
        raise ConfigError(f"no pass is named {name!r}; known: {list(types)}")
    if name == Pipeline.name:
        return make_pass(options["passes"] if isinstance(options, dict) and set(options) == {"passes"} else options)
    if not isinstance(options or {}, dict):
        raise ConfigError(f"the options of {name!r} must be {{option: value}}, not {options!r}")
    return types[name].from_dict(options or {})
