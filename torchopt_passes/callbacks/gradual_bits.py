"""GradualBits: quantization-aware training that begins on wide grids and ends on narrow ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers

__all__ = ["GradualBits", "bits_at"]


def bits_at(step: int, start: int, end: int, wide: int, narrow: int) -> int:
    """Return the width after `step` completed steps: every width from wide to narrow, for about as many steps each.

    Formula: wide until `start`, narrow from `end` on, else narrow + ceil((wide - narrow) (end - step) / (end - start))
    - 1, and at least narrow.

    Example:
        >>> [bits_at(step, 0, 6, 8, 5) for step in range(8)]
        [7, 7, 6, 6, 5, 5, 5, 5]
        >>> bits_at(0, 1, 6, 8, 5)
        8
    """
    if step < start:
        return wide
    if step >= end:
        return narrow
    return max(narrow, narrow + math.ceil((wide - narrow) * (end - step) / (end - start)) - 1)


@dataclass(kw_only=True, eq=False)
class GradualBits(Callback):
    """Narrow the grids of the fake-quantizers step by step, down to the bits that `InsertFakeQuant` gave them.

    A network follows many small changes of its grid better than one large one. The width is a function of the
    completed step and is part of the state_dict. When a width changes the range stays: min-max grids and learned
    steps alike get a step that covers it with fewer levels. However training ends, the graph has its own bits then.

    Args:
        start_bits: the width of the beginning, 3 to 8; grids that are as narrow already stay.
        start: moment from which grids are narrowed, as a share of training (float) or completed steps (int).
        end: moment from which they have their own bits.
        weights: whether grids of weights are narrowed.
        activations: whether grids of activations are.

    Raises:
        ConfigError: a moment or width that is none.
        CallbackError: no fake-quantizer is narrower than `start_bits`.

    Source:
        Zhuang et al. 2018, "Towards effective low-bitwidth convolutional neural networks", section 3.3 (progressive
        quantization).

    Example:
        ```python
        graph = top.InsertFakeQuant(weight_bits=3)(top.capture(model, (x,))).graph_module
        Trainer(graph, args, train_dataset=data, callbacks=[top.GradualBits(end=0.5), top.QuantizationSchedule()])
        ```
    """

    start_bits: int = 8
    start: When = 0.0
    end: When = 0.5
    weights: bool = True
    activations: bool = True
    _own: dict[str, int] = field(default_factory=dict[str, int], init=False, repr=False)
    _moments: tuple[int, int] = field(default=(0, 0), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse moments and widths that are none."""
        check_when(self.start, "start")
        check_when(self.end, "end")
        if not 3 <= self.start_bits <= 8:
            raise ConfigError(f"start_bits must be 3 to 8, not {self.start_bits}")

    def install(self, student: Student) -> None:
        """Note the bits that every grid ends with."""
        found = dict(fake_quantizers(student.model)) if isinstance(student.model, fx.GraphModule) else {}
        if not found:
            raise CallbackError(
                f"{type(student.model).__name__} has no fake-quantizers: capture it and run InsertFakeQuant first"
            )
        chosen = {name: q for name, q in found.items() if (self.weights if q.exact else self.activations)}
        self._own = {name: q.bits for name, q in chosen.items() if q.bits < self.start_bits}
        if not self._own:
            raise CallbackError(
                f"GradualBits: no fake-quantizer is narrower than start_bits={self.start_bits}: give InsertFakeQuant "
                "fewer bits"
            )
        student.claim("bits of the fake-quantizers", self)

    def begin(self, progress: Progress) -> None:
        """Place both moments on the steps of this run, and give every grid the width of `progress`."""
        self._moments = progress.steps(self.start), progress.steps(self.end)
        if self._moments[0] > self._moments[1]:
            raise ConfigError(f"GradualBits: start, step {self._moments[0]}, is behind end, step {self._moments[1]}")
        self._set(progress.step)

    def after_step(self, progress: Progress) -> None:
        """Narrow the grids whose time has come."""
        self._set(progress.step)

    def metrics(self) -> dict[str, float]:
        """Return ``bits``: the mean width of the managed grids."""
        widths = [quantizer.bits for quantizer, _ in self._managed()]
        return {"bits": sum(widths) / len(widths)} if widths else {}

    def remove(self) -> None:
        """Leave every grid with its own bits."""
        for quantizer, own in self._managed():
            quantizer.set_bits(own)
        self._own = {}

    def _set(self, step: int) -> None:
        for quantizer, own in self._managed():
            quantizer.set_bits(bits_at(step, *self._moments, self.start_bits, own))

    def _managed(self) -> list[tuple[FakeQuantizer, int]]:
        if self.student is None:
            return []
        found = dict(fake_quantizers(self.student.model))
        return [(found[name], own) for name, own in self._own.items()]
