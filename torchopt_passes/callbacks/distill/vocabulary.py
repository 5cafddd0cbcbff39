"""Whether student and teacher speak of the same classes and tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from torchopt_passes.errors import CallbackError, ConfigError

__all__ = ["check_classes", "check_tokenizers", "check_tokens", "compare_tokenizers", "vocabulary_fingerprint"]


def compare_tokenizers(given: Any, recorded: Sequence[str]) -> int:
    """Refuse tokenizers that give a token different numbers: two, or one and those that caches were made with.

    Args:
        given: ``(student's, teacher's)``, or the student's alone.
        recorded: `vocabulary_fingerprint` of each cache's tokenizer, empty for a cache that has none.

    Returns:
        See `check_tokenizers`.

    Raises:
        CallbackError: they differ.
        ConfigError: the student's alone, and nothing to compare it with.
    """
    pair = cast("Sequence[Any]", given) if isinstance(given, tuple | list) else (given,)
    if len(pair) == 1 and not (recorded and all(recorded)):
        raise ConfigError(
            "tokenizers= has the student's alone, and no teacher's to compare it with: give both, (student's, "
            "teacher's), or make the cache with cache_teacher(tokenizer=teacher's)"
        )
    student, teacher = pair[0], pair[-1]
    size = check_tokenizers(student, teacher)
    ours = vocabulary_fingerprint(student)
    if any(theirs not in ("", ours) for theirs in recorded):
        raise CallbackError(
            f"the student's tokenizer {type(student).__name__} with {len(student.get_vocab())} tokens is not the one "
            "that the teacher's cache was made with: some tokens have other numbers. Logits of different vocabularies "
            "do not compare: take a teacher of the same tokenizer, or train on the text that it writes "
            "(teacher_sequences)"
        )
    return size


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens and their numbers.

    Args:
        tokenizer: one of Transformers, or what else has ``get_vocab()``.
    """
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_tokenizers(student: Any, teacher: Any) -> int:
    """Refuse tokenizers that give a token different numbers.

    Args:
        student: a tokenizer of Transformers, or what else has ``get_vocab()``.
        teacher: likewise.

    Returns:
        The size of the vocabulary; what a model's logits have beyond it is padding.

    Raises:
        CallbackError: they differ; names both classes and sizes, and a token.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return max(ours.values()) + 1
    other = [token for token, number in ours.items() if theirs.get(token) != number]
    other += [token for token in theirs if token not in ours]
    token = min(other)
    raise CallbackError(
        f"the student's tokenizer is {type(student).__name__} with {len(ours)} tokens, the teacher's "
        f"{type(teacher).__name__} with {len(theirs)}: {len(other)} tokens differ, such as {token!r} "
        f"({ours.get(token)} and {theirs.get(token)}). Logits of different vocabularies do not compare: take a teacher "
        "of the same tokenizer, or train on the text that it writes (teacher_sequences)"
    )


def check_tokens(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that would read the student's token numbers as other tokens, by the models' configurations.

    Raises:
        CallbackError: names both classes and sizes.
    """
    ours, theirs = (getattr(getattr(model, "config", None), "vocab_size", None) for model in (student, teacher))
    if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
        raise CallbackError(
            f"the student {type(student).__name__} has a vocabulary of {ours} tokens, the teacher "
            f"{type(teacher).__name__} one of {theirs}: it would read the student's tokens as others. Take a teacher "
            "of the same tokenizer, or give it inputs of its own, Teacher(model, inputs=...); if the tokenizers are "
            "the same and only the padding of the vocabularies differs, Distillation(tokenizers=(student's, teacher's))"
        )


def check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher of other classes, or of the same classes in another order, by the models' configurations.

    Raises:
        CallbackError: names both classes and sizes.
    """
    ours, theirs = _labels(student), _labels(teacher)
    if ours and theirs and ours != theirs:
        raise CallbackError(
            f"the student {type(student).__name__} has the classes {_shown(ours)}, the teacher "
            f"{type(teacher).__name__} {_shown(theirs)}: their logits do not compare (config.id2label)"
        )


def _labels(model: nn.Module) -> list[str]:
    """Return the names of a model's classes, none where it has only numbers."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(labels[number]).lower() for number in sorted(labels)]
    return [] if all(name.startswith("label_") for name in names) else names


def _shown(labels: list[str]) -> str:
    return f"{labels[:6]}{' ...' if len(labels) > 6 else ''} ({len(labels)})"
