"""QuantizationSchedule: when, in quantization-aware training, ranges stop moving and batch norms freeze."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.batch_norm import batch_norms, freeze_batch_norms
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers
from torchopt_passes.graph.quantization.state import set_observers

__all__ = ["QuantizationSchedule"]


@dataclass(kw_only=True, eq=False)
class QuantizationSchedule(Callback):
    """Fix the ranges of the fake-quantizers, then the statistics of the batch norms, while the weights go on training.

    First everything adapts to rounding; then ranges stand still, so that the weights settle on a grid that
    does not move; last the batch norms use their running statistics, as they will when deployed. Both are a
    function of the completed step and outlast training and ``train()``: the graph is ready for `ConvertQuantized`.

    Args:
        observer_off: moment from which ranges are fixed, as a share of training (float) or completed steps (int).
        freeze_bn: moment from which batch norms use, and no longer update, their running statistics; None never.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.2.

    Example:
        ```python
        graph = top.InsertFakeQuant(target="onnx")(top.capture(model, (x,))).graph_module
        Trainer(graph, args, train_dataset=data, callbacks=[top.QuantizationSchedule()]).train()
        ```
    """

    observer_off: When = 0.6
    freeze_bn: When | None = 0.8
    _off: int = field(default=0, init=False, repr=False)
    _freeze: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse moments that are none."""
        check_when(self.observer_off, "observer_off")
        if self.freeze_bn is not None:
            check_when(self.freeze_bn, "freeze_bn")

    def install(self, student: Student) -> None:
        """Refuse a model without fake-quantizers."""
        if not isinstance(student.model, fx.GraphModule) or not any(fake_quantizers(student.model)):
            raise CallbackError(
                f"{type(student.model).__name__} has no fake-quantizers: capture it and run InsertFakeQuant first"
            )
        student.claim("fake-quantizers", self)

    def begin(self, progress: Progress) -> None:
        """Place both moments on the steps of this run, and bring the graph to where `progress` is."""
        self._off = progress.steps(self.observer_off)
        self._freeze = None if self.freeze_bn is None else progress.steps(self.freeze_bn)
        graph_module = self._graph_module()
        set_observers(graph_module, progress.step < self._off)
        freeze_batch_norms(graph_module, self._freeze is not None and progress.step >= self._freeze)

    def after_step(self, progress: Progress) -> None:
        """Fix the ranges, or freeze the batch norms, if this is the moment."""
        if progress.step == self._off:
            set_observers(self._graph_module(), False)
        if progress.step == self._freeze:
            freeze_batch_norms(self._graph_module(), True)

    def metrics(self) -> dict[str, float]:
        """Return ``observers_on`` and ``bn_frozen``: how many fake-quantizers learn, how many batch norms stand."""
        if self.student is None:
            return {}
        graph_module = self._graph_module()
        observing = sum(quantizer.observing for _, quantizer in fake_quantizers(graph_module))
        frozen = sum(bool(norm.node.meta.get("bn_frozen")) for norm in batch_norms(graph_module.graph))
        return {"observers_on": float(observing), "bn_frozen": float(frozen)}

    def _graph_module(self) -> fx.GraphModule:
        model = self.student.model if self.student is not None else None
        if not isinstance(model, fx.GraphModule):
            raise CallbackError("QuantizationSchedule is not installed on a captured graph")
        return model
