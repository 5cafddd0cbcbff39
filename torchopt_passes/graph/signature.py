"""How a captured graph is called: as its source is, with the inputs it was captured with, and with no others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchopt_passes.errors import InputError

__all__ = ["CallSignature"]


@dataclass(frozen=True, kw_only=True)
class CallSignature:
    """The inputs of a captured graph, and how calls in the source's manner map to them.

    Args:
        name: of the source's class, for messages.
        order: parameters of the source's forward that may be given by position, in order.
        positional: inputs that were captured by position.
        keyword: inputs that were captured by keyword, in the graph's order.
        constants: captured inputs that hold no tensor (flags, None): their values are part of the graph.
        optional: the source's other parameters with their plain defaults; a call may repeat the default.

    Example:
        >>> def forward(input_ids, attention_mask=None, labels=None): ...
        >>> call = CallSignature.of(forward, "Model", (), {"labels": torch.ones(1), "input_ids": torch.ones(1)})
        >>> call.bind((), {"input_ids": 1, "labels": 2}), call.bind((1, None, 2), {})
        (((), {'labels': 2, 'input_ids': 1}), ((), {'labels': 2, 'input_ids': 1}))
        >>> call.bind((), {"input_ids": 1})
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.InputError: Model was captured with 'labels', and is called without: ...
    """

    name: str
    order: tuple[str, ...]
    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    constants: dict[str, Any]
    optional: dict[str, Any]

    @classmethod
    def of(cls, forward: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSignature:
        """Read the signature of a forward, and which of its parameters an example call gives."""
        parameters = inspect.signature(forward).parameters.values()
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        variable = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
        order = [*by_position, *(f"{variable}_{i}" for i in range(len(args) - len(by_position)))]
        given = dict(zip(order, args, strict=False)) | kwargs
        plain = (type(None), bool, int, float, str)
        return cls(
            name=name,
            order=tuple(order),
            positional=tuple(order[: len(args)]),
            keyword=tuple(kwargs),
            constants={k: v for k, v in given.items() if not _has_tensor(v)},
            optional={p.name: p.default for p in parameters if p.name not in given and isinstance(p.default, plain)},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs in the order of the graph."""
        return (*self.positional, *self.keyword)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that carry tensors, in the order of the graph."""
        return tuple(name for name in self.names if name not in self.constants)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call in the source's manner as the graph takes it.

        Args:
            args: by position, in the order of the source's forward.
            kwargs: by name, in any order.

        Returns:
            Positional and keyword arguments as they were captured.

        Raises:
            InputError: an input is missing, unknown, or differs from what is part of the graph.
        """
        if len(args) > len(self.order):
            raise InputError(f"{self.name} takes {len(self.order)} inputs by position, and is called with {len(args)}")
        given = dict(zip(self.order, args, strict=False))
        twice = given.keys() & kwargs.keys()
        if twice:
            raise InputError(f"{self.name} is given {sorted(twice)[0]!r} twice")
        given |= kwargs
        for name in self.names:
            if name not in given or (given[name] is None and name not in self.constants):
                if name in self.constants:
                    given[name] = self.constants[name]
                    continue
                raise InputError(
                    f"{self.name} was captured with {name!r}, and is called without: a graph holds one set of inputs; "
                    f"give it, or capture another graph without {name!r} for such calls (both share the parameters)"
                )
        for name, value in given.items():
            if name in self.constants:
                if not _same(value, self.constants[name]):
                    raise InputError(
                        f"{self.name} was captured with {name}={self.constants[name]!r}, which is part of the graph; "
                        f"capture it again for {name}={value!r}"
                    )
            elif name not in self.names and not (value is None or _same(value, self.optional.get(name, given))):
                raise InputError(
                    f"{self.name} was captured without {name!r}: its inputs are {list(self.inputs)}; capture it with "
                    f"an example of {name!r}, or leave it out"
                )
        return tuple(given[n] for n in self.positional), {n: given[n] for n in self.keyword}

    def python(self) -> inspect.Signature:
        """Return the signature of the captured forward, `self` included: what trainers and loaders read."""
        rank = {name: i for i, name in enumerate(self.order)}
        names = sorted(self.names, key=lambda n: rank.get(n, len(rank)))
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", kind)]
        required = [inspect.Parameter(n, kind) for n in names if n not in self.constants]
        constant = [inspect.Parameter(n, kind, default=self.constants[n]) for n in names if n in self.constants]
        return inspect.Signature([*parameters, *required, *constant])


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _same(a: Any, b: Any) -> bool:
    if _has_tensor(a) or _has_tensor(b):
        return False
    return a is b or (type(a) is type(b) and bool(a == b))
