"""Records: frozen, keyword-only dataclasses whose fields are checked when they are made, and that go to JSON and back.

A pass *is* its options and an edit *is* its data; both are records, so both share one check and one format.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache
from typing import Any, ClassVar, Self, dataclass_transform, get_type_hints

import torch

from torchopt_passes.errors import ConfigError, TorchOptError

__all__ = ["Record", "snake_case"]


def snake_case(name: str) -> str:
    """Return the registered name of a class.

    Example:
        >>> snake_case("InsertFakeQuant")
        'insert_fake_quant'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """Base of options and edits: subclasses become frozen keyword-only dataclasses by themselves.

    Every field is checked against its annotation at construction: strictly (``"1"`` is no ``int``), and no
    float may be NaN or infinite. Field types are ``str``, ``int``, ``float``, ``bool``, ``None``, tuples and
    dicts of those, and ``torch.Tensor``.

    Raises:
        ConfigError: (or what `error_class` names) a field has the wrong type or value; names field and class.

    Example:
        >>> class Point(Record):
        ...     x: int
        >>> Point(x=1)
        Point(x=1)
        >>> Point(x="1")
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.ConfigError: Point: x: Input should be a valid integer (got '1')
    """

    error_class: ClassVar[type[TorchOptError]] = ConfigError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)

    def __post_init__(self) -> None:
        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            problem = adapter(value)
            if problem:
                shown = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
                raise self.error_class(f"{type(self).__name__}: {name}: {problem} (got {shown})")
        self.check()

    def check(self) -> None:
        """Check what types cannot say; subclasses raise `error_class` from here."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; tensors as they are, tuples as tuples."""
        return {field.name: getattr(self, field.name) for field in _fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make a record from its fields by name, lists standing for tuples.

        Raises:
            ConfigError: an unknown or missing field, or a field that does not check.
        """
        fields = {field.name: field for field in _fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise cls.error_class(f"{cls.__name__}: unknown {unknown}; it has {sorted(fields)}")
        missing = sorted(name for name, field in fields.items() if name not in data and _required(field))
        if missing:
            raise cls.error_class(f"{cls.__name__}: missing {missing}")
        return cls(**{name: _tuples(value) for name, value in data.items()})

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return all(_equal(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        return hash((type(self), tuple(repr(value) for value in self.to_dict().values())))


def _fields(record: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(record)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


@cache
def _adapters(cls: type[Record]) -> dict[str, Any]:
    """Return, for each field, a function value -> what is wrong with it ('' when nothing is)."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    def make(hint: Any) -> Any:
        adapter = TypeAdapter[Any](hint, config=config)

        def problem(value: Any) -> str:
            if _not_finite(value):
                return "NaN and infinity are not allowed"
            try:
                adapter.validate_python(value)
            except ValidationError as error:
                messages = dict.fromkeys(item["msg"] for item in error.errors(include_url=False))
                return ", or ".join(messages)
            return ""

        return problem

    hints = get_type_hints(cls)
    return {field.name: make(hints[field.name]) for field in _fields(cls)}


def _not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, tuple):
        return any(_not_finite(item) for item in value if type(item) is not int)
    if isinstance(value, dict):
        return any(_not_finite(item) for item in value.values())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return not bool(torch.isfinite(value).all())
    return False
