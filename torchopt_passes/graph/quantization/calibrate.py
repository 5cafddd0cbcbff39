"""Calibrate: choose the ranges of a prepared graph from batches of data."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal

import torch
from torch import fx, nn

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.affine import affine_qparams, along, min_max
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.observers import RangeObserver
from torchopt_passes.graph.quantization.state import fake_quant_off
from torchopt_passes.graph.verify import in_eval_mode
from torchopt_passes.progress import track

__all__ = ["Calibrate", "SetObserverState", "quantizer_places"]


class SetObserverState(Edit):
    """Give a fake-quantizer its range, and let it round from now on.

    Args:
        quantizer: its name in the graph, such as ``"fake_quant.conv1_weight"``.
        min_val: smallest value, shape [1] or [channels].
        max_val: largest value, same shape.
    """

    on_source = False

    quantizer: str
    min_val: torch.Tensor
    max_val: torch.Tensor

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without that fake-quantizer, or with another number of channels."""
        quantizer = self._find(module)
        for value in (self.min_val, self.max_val):
            if value.shape != quantizer.min_val.shape:
                raise PlanError(f"{self.quantizer} has {len(quantizer.min_val)} scales, not {tuple(value.shape)}")
        if bool((self.min_val > self.max_val).any()):
            raise PlanError(f"{self.quantizer}: min_val is above max_val")

    def apply(self, module: nn.Module) -> None:
        """Set the range and enable rounding."""
        quantizer = self._find(module)
        quantizer.set_range(self.min_val, self.max_val)
        quantizer.enable(True)

    def _find(self, module: nn.Module) -> FakeQuantizer:
        found = dict(fake_quantizers(module)).get(self.quantizer)
        if found is None:
            raise PlanError(f"the graph has no fake-quantizer {self.quantizer!r}: InsertFakeQuant comes first")
        return found


class Calibrate(GraphPass):
    """Run batches of data through a prepared graph in eval mode, unrounded, and set every range from what is seen.

    Weights take their exact range. Batches stream: memory does not grow with their number. The same batches give the
    same ranges, bit for bit.

    Args:
        method: how the range of an activation is chosen: ``"histogram"`` (least squared rounding error), ``"minmax"``
            or ``"moving_average"``.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.

    Proof:
        With the fake-quantizers off, outputs equal those before.

    Example:
        >>> Calibrate(method="minmax", max_batches=8).recipe()
        {'calibrate': {'method': 'minmax', 'max_batches': 8}}
    """

    claim = "outputs with fake-quant off equal the outputs before, fake-quant off"

    method: Literal["histogram", "minmax", "moving_average"] = "histogram"
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a number of batches that is none."""
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"Calibrate: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Run the batches on the graph as it is, with observers outside it: nothing of it is touched."""
        context = context or PassContext()
        places = quantizer_places(graph_module)
        skips: list[Skip] = []
        for name, target in list(places.items()):
            pattern = context.skipped_by(target) or context.skipped_by(name)
            if pattern is not None:
                skips.append(Skip(target=target, reason=f"skip pattern {pattern!r}"))
                del places[name]
        if not places:
            reason = "nothing to do: the graph has no fake-quantizers (InsertFakeQuant comes first)"
            return Plan(skips=tuple(skips) or (Skip(target="graph", reason=reason),))
        if context.calibration is None:
            raise ConfigError("Calibrate needs data: PassContext(calibration=[batch, ...])")
        ranges, batches = self._ranges(graph_module, set(places), context.calibration)
        edits: list[Edit] = []
        for name, target in places.items():
            low, high = ranges[name]
            quantizer = graph_module.get_submodule(name)
            if not isinstance(quantizer, FakeQuantizer) or _same(quantizer, low, high):
                skips.append(Skip(target=target, reason="nothing to do: it has this range already"))
                continue
            edits.append(self._edit(target, name, quantizer, low, high, batches))
        return Plan(tuple(edits), tuple(skips))

    def referring(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module before."""
        return fake_quant_off(graph_module)

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module after."""
        return fake_quant_off(graph_module)

    def _ranges(
        self, graph_module: fx.GraphModule, wanted: set[str], batches: Iterable[Any]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
        count = 0
        with in_eval_mode(graph_module):
            watcher = _Watcher(graph_module, wanted, self.method)
            state = {name: buffer.clone() for name, buffer in graph_module.named_buffers()}
            try:
                for batch in track(islice(batches, self.max_batches), "Calibrating"):
                    args, kwargs = as_call(batch)
                    watcher.run(*flat_inputs(graph_module, args, kwargs), enable_io_processing=False)
                    count += 1
            finally:
                for name, buffer in graph_module.named_buffers():
                    if not torch.equal(buffer, state[name]):
                        buffer.copy_(state[name])
        if not count:
            raise ConfigError("Calibrate got no batch: context.calibration is empty (a generator that was used up?)")
        return watcher.ranges(), count

    def _edit(
        self, target: str, name: str, quantizer: FakeQuantizer, low: torch.Tensor, high: torch.Tensor, batches: int
    ) -> SetObserverState:
        scale, _ = affine_qparams(low, high, quantizer.quant_min, quantizer.quant_max, symmetric=quantizer.signed)
        how = "exact range of the weight" if quantizer.exact else f"{self.method} of {batches} batches"
        return SetObserverState(
            target=target,
            reason=how,
            numbers={"min": float(low.min()), "max": float(high.max()), "step": float(scale.max())},
            quantizer=name,
            min_val=low.float().cpu(),
            max_val=high.float().cpu(),
        )


class _Watcher(fx.Interpreter):
    """Run a graph with its fake-quantizers replaced by observers."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[str], method: str) -> None:
        super().__init__(graph_module)
        self._quantizers = {n: q for n, q in fake_quantizers(graph_module) if n in wanted}
        self._all = dict(fake_quantizers(graph_module))
        self._method = method
        self._observers: dict[str, RangeObserver] = {}
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self._all:
            return super().call_module(target, args, kwargs)
        quantizer = self._quantizers.get(target)
        if quantizer is not None and not kwargs.get("follow", False):
            if quantizer.exact:
                self._weights[target] = weight_range(quantizer, *args)
            else:
                observer = self._observers.get(target) or RangeObserver(self._method, quantizer)
                self._observers[target] = observer
                observer.watch(args[0])
        return args[0]

    def ranges(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the range of every wanted fake-quantizer."""
        return self._weights | {name: observer.range() for name, observer in self._observers.items()}


def weight_range(
    quantizer: FakeQuantizer,
    weight: torch.Tensor,
    gamma: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact range of a weight, folded with its batch norm when it has one; shape [1] or [channels]."""
    weight = weight.detach().float()
    if var is not None:
        weight = weight * along(quantizer.channel_scale(gamma, var), weight.ndim, quantizer.weight_dim)
    return min_max(weight, quantizer.channel_dim)


def quantizer_places(graph_module: fx.GraphModule) -> dict[str, str]:
    """Return the name of every fake-quantizer that is called -> the user's name of what it rounds."""
    known = {name for name, _ in fake_quantizers(graph_module)}
    found: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in known:
            value = node.args[0]
            is_state = isinstance(value, fx.Node) and value.op == "get_attr"
            found.setdefault(str(node.target), str(value.target) if is_state else str(value))
    return found


def _same(quantizer: FakeQuantizer, low: torch.Tensor, high: torch.Tensor) -> bool:
    same = torch.equal(quantizer.min_val, low.float()) and torch.equal(quantizer.max_val, high.float())
    return same and quantizer.enabled
