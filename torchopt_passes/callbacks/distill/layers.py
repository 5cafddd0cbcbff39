"""Which layer of a student learns from which layer of its teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from torchopt_passes.errors import ConfigError

__all__ = ["match_layers", "teacher_positions"]

_INDEX = "{i}"


def match_layers(
    student: Sequence[str], teacher: Sequence[str], layers: Mapping[str, str] | Sequence[str], match: str
) -> list[tuple[str, str]]:
    """Return pairs of layers, in the order in which they were given, those of a pattern by their number.

    Args:
        student: every layer of the student, by module path.
        teacher: every layer of the teacher.
        layers: see `FeatureLoss`. A path without ``{i}`` is taken as it is.
        match: see `teacher_positions`.

    Raises:
        ConfigError: a pattern matches nothing, or stands on one side alone.

    Example:
        >>> small, large = [f"layer.{i}" for i in range(2)], [f"h.{i}" for i in range(6)]
        >>> match_layers(small, large, {"layer.{i}": "h.{i}"}, "even")
        [('layer.0', 'h.2'), ('layer.1', 'h.5')]
    """
    given = layers.items() if isinstance(layers, Mapping) else [(path, path) for path in layers]
    pairs: list[tuple[str, str]] = []
    for ours, theirs in given:
        if (_INDEX in ours) != (_INDEX in theirs):
            raise ConfigError(f"layers: {{i}} must stand in both or none of {ours!r} and {theirs!r}")
        if _INDEX not in ours:
            pairs.append((ours, theirs))
            continue
        small, large = _matching(student, ours, "student"), _matching(teacher, theirs, "teacher")
        places = teacher_positions(len(small), len(large), match)
        pairs += [(small[place], large[other]) for place, other in places]
    return pairs


def teacher_positions(student: int, teacher: int, match: str) -> list[tuple[int, int]]:
    """Return, for layers of the student, the layer of the teacher that each learns from, both counted from 0.

    Args:
        student: how many layers it has.
        teacher: how many layers it has, at least as many.
        match: ``"even"``, spread evenly and ending with the last; ``"first"``, ``"last"``, as many from either end; or
            ``"only_last"``, the last one alone.

    Math:
        even: layer j of n learns from layer floor((j + 1) m / n) - 1 of m.

    Source:
        Jiao et al. 2020, "TinyBERT", section 4.3: the uniform strategy g(j) = 3 j for 4 of 12 layers.

    Raises:
        ConfigError: the teacher has fewer layers.

    Example:
        >>> teacher_positions(4, 12, "even"), teacher_positions(2, 3, "even"), teacher_positions(2, 6, "last")
        ([(0, 2), (1, 5), (2, 8), (3, 11)], [(0, 0), (1, 2)], [(0, 4), (1, 5)])
    """
    if match == "only_last":
        return [(student - 1, teacher - 1)]
    if teacher < student:
        raise ConfigError(
            f"the student has {student} layers of this pattern, the teacher {teacher}: name the pairs one by one, or "
            'match="only_last"'
        )
    rules = {
        "even": lambda j: (j + 1) * teacher // student - 1,
        "first": lambda j: j,
        "last": lambda j: teacher - student + j,
    }
    return [(j, rules[match](j)) for j in range(student)]


def _matching(names: Sequence[str], pattern: str, who: str) -> list[str]:
    expression = re.compile(r"(\d+)".join(re.escape(part) for part in pattern.split(_INDEX)))
    found = {name: tuple(map(int, m.groups())) for name in names if (m := expression.fullmatch(name))}
    if not found:
        numbered = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", _INDEX, name) for name in names))
        close = get_close_matches(pattern, [name for name in numbered if _INDEX in name], n=3, cutoff=0.4)
        raise ConfigError(
            f"layers: the pattern {pattern!r} matches no layer of the {who}"
            + (f"; close patterns: {close}" if close else f"; its layers begin with {list(names)[:5]}")
        )
    return sorted(found, key=lambda name: found[name])
