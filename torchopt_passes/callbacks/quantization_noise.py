"""QuantizationNoise: in training, a random share of the weights is rounded; in eval mode all are."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import fx

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, Noise, fake_quantizers

__all__ = ["QuantizationNoise"]


@dataclass(kw_only=True, eq=False)
class QuantizationNoise(Callback):
    """Round a random share of each weight's entries in training, so that the rest gets gradients without bias.

    Entries are drawn anew for each optimizer step, from the seed and the completed step alone: the same in every
    micro-batch of an accumulated step, and in a run that was resumed. In eval mode, and when it is converted, every
    entry is rounded. Activations are rounded in full.

    Args:
        share: p, the share of entries that are rounded, in (0, 1]; 1 is ordinary quantization-aware training.
        seed: of the draws.

    Math:
        w_t = m * FQ(w) + (1 - m) * w, m ~ Bernoulli(p) for each entry.

    Raises:
        ConfigError: a share that is none.
        CallbackError: the model has no fake-quantized weights.

    Source:
        Stock et al. 2021, "Training with quantization noise for extreme model compression", section 4.

    Example:
        ```python
        Trainer(graph, args, train_dataset=data, callbacks=[top.QuantizationNoise(share=0.5)]).train()
        ```
    """

    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"share must be in (0, 1], not {self.share}")

    def install(self, student: Student) -> None:
        """Refuse a model without fake-quantized weights."""
        kind = type(student.model).__name__
        if not isinstance(student.model, fx.GraphModule) or not self._weights(student):
            raise CallbackError(f"{kind} has no fake-quantized weights: capture it and run InsertFakeQuant first")
        student.claim("noise of the fake-quantizers", self)

    def begin(self, progress: Progress) -> None:
        """Draw the entries of the first step."""
        self._draw(progress.step)

    def after_step(self, progress: Progress) -> None:
        """Draw the entries of the next step."""
        self._draw(progress.step)

    def remove(self) -> None:
        """Round every entry again."""
        for _, quantizer in self._weights(self.student):
            quantizer.noise = None

    def _draw(self, step: int) -> None:
        for name, quantizer in self._weights(self.student):
            quantizer.noise = Noise(self.share, zlib.crc32(f"{self.seed} {step} {name}".encode()))

    def _weights(self, student: Student | None) -> list[tuple[str, FakeQuantizer]]:
        if student is None:
            return []
        return [(name, quantizer) for name, quantizer in fake_quantizers(student.model) if quantizer.exact]
