"""A cache in the place of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.distill.cache import TeacherCache
from torchopt_passes.callbacks.distill.example_keys import example_keys
from torchopt_passes.callbacks.distill.inputs import named_inputs, token_mask
from torchopt_passes.callbacks.distill.predictions import KeptLogits
from torchopt_passes.callbacks.distill.taps import Tap
from torchopt_passes.callbacks.distill.teachers import Answer, Source
from torchopt_passes.callbacks.student_call import StudentCall
from torchopt_passes.errors import CallbackError

__all__ = ["CacheSource"]


class CacheSource(Source):
    """Answers from what `cache_teacher` kept; nothing runs."""

    has_features: ClassVar[bool] = False

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache
        if cache.info.top_k < cache.info.classes:
            self.temperatures = cache.info.temperatures

    @property
    def tokenizer(self) -> str:
        """Checksum of the vocabulary that the cache was made with; empty where it does not say."""
        return self._cache.info.tokenizer

    @property
    def hides(self) -> Callable[[nn.Module, Mapping[str, Any]], Iterable[str]] | None:
        """The column of the examples' numbers, where the cache has them."""
        index = self._cache.info.index
        return (lambda model, kwargs: (index,)) if index else None

    def ask(self, call: StudentCall, batch: Mapping[str, Any], own: Mapping[Tap, torch.Tensor]) -> Answer:
        """Find the examples of a batch."""
        info = self._cache.info
        columns = named_inputs(call.model, call.args, call.kwargs) | dict(batch)
        found = self._cache.lookup(example_keys(columns, info.columns, info.index))

        def logits(name: str) -> KeptLogits:
            if name != info.logits:
                raise CallbackError(
                    f"the cache has the teacher's {info.logits!r}, not {name!r}: logits=({info.logits!r},)"
                )
            student = outputs.field(call.output, name, "student")
            if student.shape[-1] != info.classes:
                raise CallbackError(
                    f"the student {type(call.model).__name__} has {student.shape[-1]} classes, the cached teacher "
                    f"{info.teacher} {info.classes}: both need the same classes or vocabulary"
                )
            return self._place(found, student, token_mask(call.model, call.args, call.kwargs, "decoder"))

        def nothing(path: str) -> torch.Tensor | None:
            return None

        return Answer(logits, {}, nothing)

    def _place(
        self, found: list[dict[str, torch.Tensor]], student: torch.Tensor, mask: torch.Tensor | None
    ) -> KeptLogits:
        """Return what was kept, each position where the student has it."""
        positions = student.shape[1] if student.ndim == 3 else 1
        covered = torch.ones(student.shape[0], positions, dtype=torch.bool)
        if mask is not None and mask.shape == covered.shape:
            covered = mask.cpu()
        rows = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        lengths = [len(one["rest"]) for one in found]
        if lengths != covered.sum(1).tolist():
            raise CallbackError(
                f"the cache has {lengths} positions of these examples, the batch {covered.sum(1).tolist()}: it was "
                "made with other padding or attention masks"
            )
        info, device = self._cache.info, student.device

        def spread(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            whole = torch.zeros(*covered.shape, rows.shape[-1], dtype=dtype)
            whole[covered] = rows.to(dtype)
            return (whole if student.ndim == 3 else whole[:, 0]).to(device)

        return KeptLogits(
            spread(rows["values"], torch.float32),
            spread(rows["indices"], torch.int64),
            spread(rows["rest"], torch.float32),
            info.temperatures,
            (covered if student.ndim == 3 else covered[:, 0]).to(device),
        )
