"""Parameters and buffers by their dotted name (fqn), and globs that select them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from torchopt_passes.errors import ConfigError, PlanError

__all__ = ["aliases", "check_patterns", "find_owner", "get_tensor", "matching_pattern", "named_tensors"]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter and buffer once, by its first fqn (tied ones are one)."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def find_owner(module: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """Return the submodule that owns the parameter or buffer `fqn`, and its name there.

    Raises:
        PlanError: the module has no such parameter or buffer.
    """
    path, _, name = fqn.rpartition(".")
    owner: nn.Module | None = module
    for part in path.split(".") if path else []:
        owner = owner._modules.get(part) if owner is not None else None
    if owner is None or (name not in owner._parameters and name not in owner._buffers):
        raise PlanError(f"{type(module).__name__} has no parameter or buffer {fqn!r}{_near(module, fqn)}")
    return owner, name


def get_tensor(module: nn.Module, fqn: str) -> torch.Tensor:
    """Return the parameter or buffer `fqn`.

    Raises:
        PlanError: the module has no such parameter or buffer, or it is None.
    """
    owner, name = find_owner(module, fqn)
    tensor = owner._parameters.get(name)
    if tensor is None:
        tensor = owner._buffers.get(name)
    if tensor is None:
        raise PlanError(f"{fqn!r} is None in {type(module).__name__}")
    return tensor


def aliases(module: nn.Module) -> dict[str, str]:
    """Return every fqn of every parameter and buffer -> the first fqn of the same tensor (tied weights)."""
    first: dict[int, str] = {}
    result: dict[str, str] = {}
    pairs = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for fqn, tensor in pairs:
        result[fqn] = first.setdefault(id(tensor), fqn)
    return result


def matching_pattern(fqn: str, patterns: Iterable[str]) -> str | None:
    """Return the first glob that matches `fqn` or a module around it, or None.

    Example:
        >>> matching_pattern("encoder.layer.0.weight", ["head.*", "encoder.layer.0"])
        'encoder.layer.0'
        >>> matching_pattern("encoder.layer.0.weight", ["head.*"])
    """
    parts = fqn.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((p for p in patterns if any(fnmatchcase(prefix, p) for prefix in prefixes)), None)


def check_patterns(module: nn.Module, patterns: Sequence[str], what: str) -> None:
    """Refuse a glob that matches nothing: it is a typo.

    Raises:
        ConfigError: names the pattern and the closest names of the module.
    """
    names = list(aliases(module)) + [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{what} pattern {pattern!r} matches no parameter, buffer or module{_near(module, pattern)}"
            )


def _near(module: nn.Module, name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(aliases(module)), n=3, cutoff=0.4)
    return f"; close names: {close}" if close else ""
