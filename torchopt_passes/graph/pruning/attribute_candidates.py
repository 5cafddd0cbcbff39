"""Which numbers on a user's modules may be sizes of what was removed; candidates only, a trial decides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.slicing import Removal, blocks_of

__all__ = ["Axis", "Candidate", "Choice", "axes_of", "candidates_of", "is_expected", "true_of_config"]

Size = int | tuple[int, ...]
Counts = Mapping[str, Mapping[int, int]]
"""Path of a module or fqn -> number of units before -> after."""

Kind = Literal["size", "count", "width"]
"""A number is the size of an axis, the number of equal blocks on it (heads), or the size of a block (of one head)."""

_COUNT = re.compile(r"(^|_)(n|h|nb|num|heads?|groups?|count|experts|chunks)(_|$)|heads?$")
_HEADS = re.compile(r"(^|_)n?heads?$|num_heads|n_heads")
_WIDTH = re.compile(r"dim|size|width|features|channels|hidden|inner|embed")
_INNER = re.compile(r"all_head_size|inner|intermediate|ffn|mlp_dim|d_ff|dim_feedforward")


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that lost indices.

    Args:
        fqn: first fqn of the tensor.
        dim: the dimension.
        size: before.
        kept: the indices that stay.
    """

    fqn: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What is decided once for all modules of a class: that an attribute is a size, and how it follows a removal.

    Args:
        owner: class of the module or configuration.
        name: of the attribute.
        kind: how it follows.
        rank: tells choices apart that give the same attribute different values.
    """

    owner: type[Any]
    name: str
    kind: Kind
    rank: int


@dataclass(frozen=True)
class Candidate:
    """One attribute of one module, and the value that a choice gives it.

    Args:
        choice: made for all modules of the class.
        target: dotted path of the attribute.
        old: its value.
        new: its value under the choice.
    """

    choice: Choice
    target: str
    old: Size
    new: Size


def is_expected(choice: Choice) -> bool:
    """Return whether a name tells by itself that the attribute is meant: ``num_heads``, ``all_head_size``."""
    if not issubclass(choice.owner, nn.Module):
        return False
    if choice.kind == "count":
        return bool(_HEADS.search(choice.name))
    return choice.kind == "size" and bool(_INNER.search(choice.name))


def axes_of(removals: Mapping[str, Removal]) -> list[Axis]:
    """Return the dimensions that lost indices."""
    return [
        Axis(fqn, dim, removal.shape[dim], tuple(removal.kept(dim)))
        for fqn, removal in removals.items()
        for dim in removal.indices
    ]


def candidates_of(module: nn.Module, axes: Sequence[Axis], counts: Counts) -> list[Candidate]:
    """Return the candidates on the modules of a model and in its configuration.

    Args:
        module: the model; its attributes have their values of before.
        axes: what was removed.
        counts: hints: path of a module or fqn -> number of units before -> after.
    """
    found: list[Candidate] = []
    for path, owner in module.named_modules():
        found += _candidates(owner, path, _near(module, path, axes), _hints(path, counts))
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        found += _candidates(config, "config", axes, _hints("", counts))
    return found


def _candidates(owner: Any, path: str, axes: Sequence[Axis], hints: Mapping[int, int]) -> Iterator[Candidate]:
    for name, value in vars(owner).items():
        items = _items(value)
        if not items or name.startswith("_"):
            continue
        target = f"{path}.{name}" if path else name
        for kind, news in _options(name, items, axes, hints).items():
            for rank, new in enumerate(news):
                choice = Choice(type(owner), name, kind, rank)
                old: Size = items if isinstance(value, list | tuple) else items[0]
                yield Candidate(choice, target, old, new if isinstance(old, tuple) else new[0])


def true_of_config(module: nn.Module, axes: Sequence[Axis], accepted: Iterable[Candidate]) -> list[Candidate]:
    """Return what is to be set in the model's shared configuration: sizes that every layer that has them lost alike.

    A number of heads follows the modules' own, where the size of a head does not follow from it.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return []
    heads: dict[int, set[Size]] = {}
    for candidate in accepted:
        if candidate.choice.kind == "count" and isinstance(candidate.old, int):
            heads.setdefault(candidate.old, set()).add(candidate.new)
    found: list[Candidate] = []
    for name, value in vars(config).items():
        if type(value) is not int:
            continue
        if _INNER.search(name):
            alike = [axis for axis in axes if axis.size == value]
            news: set[Size] = {len(axis.kept) for axis in alike}
            uniform, kind = all(_uniform(module, axes, axis) for axis in alike), cast("Kind", "size")
        elif _HEADS.search(name) and isinstance(getattr(config, "head_dim", None), int):
            news, kind = heads.get(value, set()), "count"
            uniform = True
        else:
            continue
        if len(news) == 1 and uniform:
            found.append(Candidate(Choice(type(config), name, kind, 0), f"config.{name}", value, news.pop()))
    return found


def _items(value: Any) -> tuple[int, ...]:
    """Return a size as a tuple; empty for what is no size."""
    items = tuple(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else (value,)
    return cast("tuple[int, ...]", items) if items and all(type(item) is int and item > 0 for item in items) else ()


def _near(module: nn.Module, path: str, axes: Sequence[Axis]) -> list[Axis]:
    """Return the axes that a module's numbers may be sizes of.

    Those of its own tensors and its children's; else those below it that all layers there lost alike; for a module
    without tensors those of the module around it. One whose tensors lost nothing has none.
    """
    while True:
        owner, prefix = module.get_submodule(path), f"{path}." if path else ""
        below = [axis for axis in axes if axis.fqn.startswith(prefix)]
        near = [axis for axis in below if axis.fqn.removeprefix(prefix).count(".") <= 1]
        holds = any(True for _ in owner.parameters())
        if near or holds or not path:
            return near or [axis for axis in below if _uniform(owner, below, axis, prefix)]
        path = path.rpartition(".")[0]


def _hints(path: str, counts: Counts) -> dict[int, int]:
    found: dict[int, int] = {}
    for place, hint in counts.items():
        if not path or place == path or place.startswith(f"{path}.") or path.startswith(f"{place}."):
            found.update(hint)
    return found


def _options(
    name: str, items: tuple[int, ...], axes: Sequence[Axis], hints: Mapping[int, int]
) -> dict[Kind, list[tuple[int, ...]]]:
    """Return the values that an attribute may take, by how it would follow what was removed."""
    count, width = bool(_COUNT.search(name)), bool(_WIDTH.search(name))
    if len(items) > 1 or count == width:
        count = width = True
    found: dict[Kind, dict[tuple[int, ...], None]] = {}
    for place, value in enumerate(items):
        if count and value in hints:
            follow: list[tuple[Kind, int]] = [("count", hints[value])]
        else:
            follow = [option for axis in axes for option in _follow(value, axis, count=count, width=width)]
        for kind, new in follow:
            if new != value:
                found.setdefault(kind, {})[(*items[:place], new, *items[place + 1 :])] = None
    return {kind: list(news) for kind, news in found.items()}


def _follow(value: int, axis: Axis, *, count: bool, width: bool) -> Iterator[tuple[Kind, int]]:
    if axis.size == value:
        yield "size", len(axis.kept)
    elif 1 < value < axis.size and axis.size % value == 0:
        blocks, size = value, axis.size // value
        whole = _blocks(axis, blocks) if count else None
        if whole is not None and all(len(places) == size for places in whole.values()):
            yield "count", len(whole)
        blocks, size = size, blocks
        inside = _blocks(axis, blocks) if width else None
        if inside is not None and len(inside) == blocks:
            yield "width", len(next(iter(inside.values())))


def _blocks(axis: Axis, blocks: int) -> dict[int, tuple[int, ...]] | None:
    try:
        return blocks_of(list(axis.kept), blocks, axis.size)
    except PlanError:
        return None


def _uniform(module: nn.Module, axes: Sequence[Axis], like: Axis, prefix: str = "") -> bool:
    """Return whether every tensor of a module that is called alike, and was as large, lost as many indices."""
    cut = {axis.fqn: axis for axis in axes if axis.dim == like.dim}
    for name, tensor in module.named_parameters():
        if _last(name) == _last(like.fqn) and tensor.ndim > like.dim:
            axis = cut.get(f"{prefix}{name}")
            size, left = (axis.size, len(axis.kept)) if axis is not None else (tensor.shape[like.dim],) * 2
            if size == like.size and left != len(like.kept):
                return False
    return True


def _last(fqn: str) -> str:
    return ".".join(fqn.split(".")[-2:])
