"""From what a user names as teachers to what answers for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from torchopt_passes.callbacks.distill.cache import TeacherCache
from torchopt_passes.callbacks.distill.cache_source import CacheSource
from torchopt_passes.callbacks.distill.self_teachers import SelfTeacher, source_of
from torchopt_passes.callbacks.distill.teachers import ModelSource, Source, Teacher
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.record import snake_case

__all__ = ["make_sources"]


def make_sources(given: Any) -> tuple[Source, ...]:
    """Return what answers for a teacher, or for each of a list of them.

    Args:
        given: a module, a `Teacher`, a self-teacher, or a list of these. A self-teacher may be recipe data:
            ``"initial_weights"``, ``{"averaged_weights": {"decay": 0.99}}``.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(given, list | tuple):
        items = cast("Sequence[Any]", given)
        if not items:
            raise ConfigError("the list of teachers is empty")
        return tuple(_make_source(item) for item in items)
    return (_make_source(given),)


def _make_source(given: Any) -> Source:
    if isinstance(given, nn.Module):
        return ModelSource(Teacher(given))
    if isinstance(given, Teacher):
        return ModelSource(given)
    if isinstance(given, TeacherCache):
        return CacheSource(given)
    if isinstance(given, str | Mapping):
        given = _from_data(given)
    if isinstance(given, SelfTeacher):
        return source_of(given)
    raise ConfigError(
        f"teacher must be a torch.nn.Module, not {type(given).__name__} (or a Teacher, a TeacherCache, a self-teacher, "
        "or a list of these)"
    )


def _from_data(given: str | Mapping[Any, Any]) -> SelfTeacher:
    data: Mapping[Any, Any] = {given: {}} if isinstance(given, str) else given
    types = {snake_case(kind.__name__): kind for kind in SelfTeacher.__subclasses__()}
    name, options = next(iter(data.items())) if len(data) == 1 else (None, None)
    if name not in types or not isinstance(options or {}, Mapping):
        raise ConfigError(
            f"teacher must be a torch.nn.Module, or as data one of {sorted(types)} with its options, not {given!r}"
        )
    return types[name].from_dict({str(key): value for key, value in (options or {}).items()})
