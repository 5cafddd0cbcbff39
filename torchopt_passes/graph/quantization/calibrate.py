"""Calibrate: choose the ranges of a prepared graph from batches of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from math import isfinite
from typing import Any, Literal

import torch
from torch import fx, nn

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.affine import along, fake_quantize, min_max
from torchopt_passes.functional.ranges import Grid, channel_mse_range
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.observers import ChosenRange, RangeObserver
from torchopt_passes.graph.quantization.places import chosen_places
from torchopt_passes.graph.quantization.state import fake_quant_off
from torchopt_passes.graph.quantization.targets import MAX_POOLS
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode, sqnr
from torchopt_passes.progress import track
from torchopt_passes.ranks import sum_over_ranks

__all__ = ["Calibrate", "SetObserverState"]

aten = torch.ops.aten
_AVERAGES = {
    aten.mean.dim,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
}


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

    Batches stream: memory does not grow with their number. The same batches give the same ranges, bit for bit; but for
    ``"histogram"`` and ``"moving_average"``, in any order. Edits carry the signal-to-quantization-noise ratio in dB:
    that of a weight as it is, that of an activation on the histogram of its method (torchao's two and min-max keep
    none).

    Args:
        method: how the range of an activation is chosen. ``"minmax"``: all that was seen; ``"moving_average"`` of
            that; ``"histogram"``: torchao's search for less rounding error; ``"percentile"``: a share is clipped;
            ``"mse"``: least squared rounding error; ``"entropy"``: least KL divergence, as TensorRT; ``"gaussian"``,
            ``"laplace"``: the clip that is best for that distribution (ACIQ); ``"auto"``: for each activation the one
            of these (but the first two named from torchao) with the best SQNR.
        percentile: for ``"percentile"`` and ``"auto"``: how many of a hundred values are not clipped.
        weight_method: ``"minmax"``: a weight's exact range; ``"mse"``: for each channel the part of it with the least
            squared rounding error. Both are of the weight folded with its batch norm. A graph that learns ranges while
            it trains takes the exact range again with its next training step.
        headroom: factor on the ranges of averages over all positions (global average pooling, a mean of tokens). A
            sample has one such value for each channel: a few batches tell badly how large they get, a clipped one
            changes a class, and their rounding error is small.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3; for each
        method its function in `torchopt_passes.functional.ranges` or `.aciq`.

    Proof:
        With the fake-quantizers off, outputs equal those before.

    Example:
        >>> Calibrate(method="minmax", max_batches=8).recipe()
        {'calibrate': {'method': 'minmax', 'max_batches': 8}}
    """

    claim = "outputs with fake-quant off equal the outputs before, fake-quant off"

    method: Literal[
        "histogram", "minmax", "moving_average", "percentile", "mse", "entropy", "gaussian", "laplace", "auto"
    ] = "histogram"
    percentile: float = 99.99
    weight_method: Literal["minmax", "mse"] = "minmax"
    headroom: float = 1.0
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a number of batches that is none, ranges below what was seen, and a percentile that nothing reads."""
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"Calibrate: max_batches must be >= 1, not {self.max_batches}")
        if not 1.0 <= self.headroom < float("inf"):
            raise ConfigError(f"Calibrate: headroom must be >= 1, not {self.headroom}")
        if not 0.0 < self.percentile <= 100.0:
            raise ConfigError(f"Calibrate: percentile must be above 0 and at most 100, not {self.percentile}")
        if self.percentile != 99.99 and self.method not in {"percentile", "auto"}:
            raise ConfigError(f"Calibrate: percentile goes with method 'percentile' or 'auto', not {self.method!r}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Run the batches on the graph as it is, with observers outside it: nothing of it is touched."""
        context = context or PassContext()
        places, skips = chosen_places(graph_module, context, _why_not)
        if not places:
            return Plan(skips=tuple(skips))
        if context.calibration is None:
            raise ConfigError("Calibrate needs data: PassContext(calibration=[batch, ...])")
        names = {place.name for place in places}
        ranges, batches = self._ranges(graph_module, names, context.calibration, context.ranks)
        edits: list[Edit] = []
        for place in places:
            chosen = ranges[place.name]
            if _same(place.quantizer, chosen.low, chosen.high):
                skips.append(Skip(target=place.target, reason="nothing to do: it has this range already"))
                continue
            edits.append(self._edit(place.target, place.name, place.quantizer, chosen, batches))
        return Plan(tuple(edits), tuple(skips))

    def referring(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module before."""
        return fake_quant_off(graph_module)

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module after."""
        return fake_quant_off(graph_module)

    def _ranges(
        self, graph_module: fx.GraphModule, wanted: set[str], batches: Iterable[Any], ranks: Any
    ) -> tuple[dict[str, ChosenRange], int]:
        count = 0
        with in_eval_mode(graph_module):
            watcher = _Watcher(graph_module, wanted, self)
            with buffers_kept(graph_module):
                for batch in track(islice(batches, self.max_batches), "Calibrating"):
                    args, kwargs = as_call(batch)
                    watcher.first = count == 0
                    watcher.run(*flat_inputs(graph_module, args, kwargs), enable_io_processing=False)
                    count += 1
        if not count:
            raise ConfigError("Calibrate got no batch: context.calibration is empty (a generator that was used up?)")
        if ranks is not None:
            watcher.gather(ranks)
            count = int(sum_over_ranks(torch.tensor(count), ranks))
        return watcher.ranges(), count

    def _edit(
        self, target: str, name: str, quantizer: FakeQuantizer, chosen: ChosenRange, batches: int
    ) -> SetObserverState:
        low, high = chosen.low, chosen.high
        scale, _ = quantizer.qparams(low, high)
        numbers = {"min": float(low.min()), "max": float(high.max()), "step": float(scale.max())}
        if chosen.method in chosen.sqnr:
            numbers["sqnr"] = chosen.sqnr[chosen.method]
        if quantizer.exact:
            how = "exact range of the weight" if chosen.method == "minmax" else "least squared error of the weight"
        else:
            auto = self.method == "auto"
            how = f"{chosen.method} of {batches} batches" + (", the best SQNR" if auto else "")
            numbers |= {f"sqnr_{method}": value for method, value in chosen.sqnr.items() if auto}
        return SetObserverState(
            target=target,
            reason=how,
            numbers=numbers,
            quantizer=name,
            min_val=low.float().cpu(),
            max_val=high.float().cpu(),
        )


class _Watcher(fx.Interpreter):
    """Run a graph with its fake-quantizers replaced by observers."""

    first = True
    """Whether this is the first batch: weights are the same in all."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[str], options: Calibrate) -> None:
        super().__init__(graph_module)
        self._quantizers = {n: q for n, q in fake_quantizers(graph_module) if n in wanted}
        self._all = dict(fake_quantizers(graph_module))
        self._watched = _watched(graph_module, self._all)
        self._averages = {str(node.target) for node in self._watched if _is_average(node.args[0])}
        self._options = options
        self._observers: dict[str, RangeObserver] = {}
        self._weights: dict[str, ChosenRange] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; in place of rounding a value, watch it."""
        name = str(n.target)
        if n.op != "call_module" or name not in self._all:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        quantizer = self._quantizers.get(name)
        if quantizer is not None and n in self._watched:
            if not quantizer.exact:
                self._watch(name, quantizer, args[0])
            elif self.first:
                self._weights[name] = _weight_choice(self._options.weight_method, quantizer, *args)
        return args[0]

    def gather(self, ranks: Any) -> None:
        """Take into account what the other ranks have seen."""
        for name, observer in self._observers.items():
            try:
                observer.gather(ranks)
            except ConfigError as error:
                raise ConfigError(f"Calibrate over several ranks: {name}: {error}") from error

    def ranges(self) -> dict[str, ChosenRange]:
        """Return the range of every wanted fake-quantizer."""
        observers = track(self._observers.items(), "Choosing ranges")
        chosen = {name: observer.choose() for name, observer in observers}
        factor = self._options.headroom
        for name in self._averages & chosen.keys() if factor > 1 else ():
            seen = chosen[name]
            how = f"{seen.method}, {factor:g} times as wide,"
            chosen[name] = ChosenRange(how, seen.low * factor, seen.high * factor)
        return self._weights | chosen

    def _watch(self, name: str, quantizer: FakeQuantizer, x: torch.Tensor) -> None:
        if name not in self._observers:
            options = self._options
            self._observers[name] = RangeObserver(options.method, quantizer, percentile=options.percentile)
        try:
            self._observers[name].watch(x)
        except ConfigError as error:
            raise ConfigError(f"Calibrate: {name}: {error}") from error


def _watched(graph_module: fx.GraphModule, quantizers: Mapping[str, FakeQuantizer]) -> set[fx.Node]:
    """Return the calls of fake-quantizers whose values count.

    A value that is read at several places of one grid counts once, at the first; but where max pools alone read it,
    what they keep counts, which is its largest values.
    """
    found: set[fx.Node] = set()
    for node in graph_module.graph.find_nodes(op="call_module"):
        if str(node.target) not in quantizers or node.kwargs.get("follow", False):
            continue
        behind = [user for pool in node.users if pool.target in MAX_POOLS for user in pool.users]
        kept = all(user.target == node.target for user in behind) and all(n.target in MAX_POOLS for n in node.users)
        found.update(behind if behind and kept else [node])
    return found


def _is_average(value: Any) -> bool:
    """Return whether a node averages over all positions: one value is left for each sample and channel."""
    shape = getattr(value.meta.get("val"), "shape", ())
    return value.target in _AVERAGES and len(shape) > 1 and all(dim == 1 for dim in shape[2:])


def _weight_choice(method: str, quantizer: FakeQuantizer, *args: torch.Tensor | None) -> ChosenRange:
    weight = _folded(quantizer, *args)  # pyright: ignore[reportArgumentType]
    dim, low_int, high_int = quantizer.channel_dim, quantizer.quant_min, quantizer.quant_max
    if method == "mse":
        low, high = channel_mse_range(weight, Grid(low_int, high_int, symmetric=quantizer.signed), dim)
    else:
        low, high = min_max(weight, dim)
    scale, zero_point = quantizer.qparams(low, high)
    ratio = sqnr(fake_quantize(weight, scale, zero_point, low_int, high_int, dim), weight)
    return ChosenRange(method, low, high, {method: ratio} if isfinite(ratio) else {})


def _folded(
    quantizer: FakeQuantizer,
    weight: torch.Tensor,
    gamma: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a weight as it is rounded: multiplied by its batch norm's scale when it has one."""
    weight = weight.detach().float()
    if var is None:
        return weight
    return weight * along(quantizer.channel_scale(gamma, var), weight.ndim, quantizer.weight_dim)


def _why_not(quantizer: FakeQuantizer) -> str:
    return "nothing to do: its grid is fitted to each value" if quantizer.fitted_to_value else ""


def _same(quantizer: FakeQuantizer, low: torch.Tensor, high: torch.Tensor) -> bool:
    same = torch.equal(quantizer.min_val, low.float()) and torch.equal(quantizer.max_val, high.float())
    return same and quantizer.enabled
