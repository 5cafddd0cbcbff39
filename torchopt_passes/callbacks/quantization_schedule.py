"""QuantizationSchedule: when, in quantization-aware training, ranges stop moving and batch norms freeze."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.lifecycle import Progress, When, check_when
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.batch_norm import batch_norms, freeze_batch_norms
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers
from torchopt_passes.graph.quantization.state import set_observers
from torchopt_passes.ranks import ranges_over_ranks, world_size

__all__ = ["QuantizationSchedule"]


@dataclass(kw_only=True, eq=False)
class QuantizationSchedule(Callback):
    """Fix the ranges of the fake-quantizers, then the statistics of the batch norms, while the weights go on training.

    First everything adapts to rounding; then ranges stand still, so that the weights settle on a grid that
    does not move; last the batch norms use their running statistics, as they will when deployed. Both are a
    function of the completed step and outlast training and ``train()``: the graph is ready for `ConvertQuantized`.
    On several ranks (DistributedDataParallel) ranges are those of the data of all: one small message a step.

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
        if progress.step <= self._off:
            self._share_ranges()
        if progress.step == self._off:
            set_observers(self._graph_module(), False)
        if progress.step == self._freeze:
            freeze_batch_norms(self._graph_module(), True)

    def _share_ranges(self) -> None:
        """Widen the ranges to those of all ranks.

        By itself each rank learns from its own data, and DistributedDataParallel then overwrites all with those of rank
        0. The minimum over ranks of r + m (x - r) is that of x, so this is the moving average over the whole batch.
        """
        ranks = self.student.ranks if self.student is not None else None
        if ranks is None or world_size(ranks) == 1:
            return
        learning = [q for _, q in fake_quantizers(self._graph_module()) if q.observing and not q.exact]
        if not learning:
            return
        sizes = [len(quantizer.min_val) for quantizer in learning]
        lows, highs = torch.cat([q.min_val for q in learning]), torch.cat([q.max_val for q in learning])
        low, high = ranges_over_ranks(lows, highs, ranks)
        for quantizer, smallest, largest in zip(learning, low.split(sizes), high.split(sizes), strict=True):
            if bool(torch.isfinite(smallest).all()):
                quantizer.set_range(smallest, largest)

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
