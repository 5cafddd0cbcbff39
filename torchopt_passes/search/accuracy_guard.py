"""The accuracy guard: quantize everything, and back off layer by layer until the metric is near that of float."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.fingerprint import fingerprint
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.graph.quantization.layer_rounding import Layer, group_layers
from torchopt_passes.progress import track
from torchopt_passes.search.measured import Measured
from torchopt_passes.search.mixed_precision import BitChoice, LayerBits, shown
from torchopt_passes.search.sensitivity import FLOAT, By, Sensitivity, Width, measure_sensitivity

__all__ = ["GuardResult", "GuardStep", "keep_accuracy"]


@dataclass(frozen=True, kw_only=True)
class GuardStep:
    """One evaluation of the guard.

    Args:
        layer: the layer whose bits were changed; empty for the start.
        before: its bits before, in words.
        after: its bits after.
        metric: of the graph with that change.
        met: whether that is within the allowed drop.
        kept: whether the change was kept; a step of undoing that loses too much is not.
    """

    layer: str
    before: str
    after: str
    metric: float
    met: bool
    kept: bool


@dataclass(frozen=True, kw_only=True)
class GuardResult:
    """What the guard found.

    Args:
        met: whether the metric is within the allowed drop; look at it: the guard raises nothing when it is not.
        float_metric: the metric of the float graph.
        metric: that of the choice: with the goal not met, the best that any step reached.
        drop: the allowed drop, in the metric's unit.
        choice: bits of each layer and why; ``choice.insert_fake_quant(qat=False)`` is the pass.
        steps: every evaluation, in order.
    """

    met: bool
    float_metric: float
    metric: float
    drop: float
    choice: BitChoice
    steps: tuple[GuardStep, ...]

    def __str__(self) -> str:
        goal = f"{self.float_metric:.4g} - {self.drop:.4g}"
        state = "kept" if self.met else "NOT kept"
        lines = [f"accuracy {state}: {self.metric:.4g} (float {goal}), {len(self.steps)} evaluations"]
        for step in self.steps:
            change = f"{step.layer}: {step.before} -> {step.after}" if step.layer else "start"
            lines.append(f"  {step.metric:.4g} {change}{'' if step.kept else ' (undone)'}")
        return "\n".join(lines)


def keep_accuracy(
    graph_module: fx.GraphModule,
    evaluate: Callable[[fx.GraphModule], float],
    context: PassContext,
    *,
    drop: float = 0.01,
    start: int | BitChoice = 8,
    activation_bits: int = 8,
    sensitivity: By | Sensitivity = "sqnr",
    insert: InsertFakeQuant | None = None,
    calibrate: Calibrate | None = None,
    make_quantized: Callable[[InsertFakeQuant], fx.GraphModule] | None = None,
    max_evaluations: int | None = None,
    state: str | Path | None = None,
) -> GuardResult:
    """Quantize every layer; while the metric is too low, give the layer that suffers most more bits: 8, then float.

    Once the metric is near enough, each layer that was backed off is tried at its former bits again, the least
    sensitive first, and stays there if the metric allows: no layer is left wider than the order of backing off made
    it. What is found is the smallest set on that way, not of all sets; each evaluation is a step of the result.

    Args:
        graph_module: a captured float graph; it is as before afterwards.
        evaluate: graph in eval mode -> metric, higher is better, the same each time for the same graph.
        context: its `calibration` is read several times; its `skip` keeps layers in float from the start.
        drop: how much of the float metric may be lost, in its unit: 0.01 is a point of an accuracy in 0..1.
        start: bits of every weight at the start, or a choice (of `choose_bits`) to start from.
        activation_bits: bits of all inputs, when `start` is a number.
        sensitivity: how the order is measured, or a table measured before that holds every width that is tried.
        insert: target and grid of `InsertFakeQuant`; its widths are set here.
        calibrate: how ranges are chosen, in measuring and in making the quantized graph; min-max by default.
        make_quantized: the `InsertFakeQuant` of a step -> the graph to evaluate; by default a copy, that pass and
            `calibrate`. Give one to repair, train or convert as well.
        max_evaluations: at most so many quantized graphs are evaluated; then the best is returned.
        state: file that keeps the metrics, by the bits of every layer; files beside it, such as
            ``guard.sensitivity8.json`` (8: bits of the inputs), keep the sensitivities. An interrupted run goes on, and
            evaluates nothing twice; one with another `drop` uses them too.

    Returns:
        The bits, their reasons, the steps, and whether the goal is met.

    Source:
        NNCF's ``quantize_with_accuracy_control`` (ranks by score, reverts one by one), here with a rung of 8 bits and
        a way back.

    Raises:
        ConfigError: an option is wrong, the metric is no finite number, or the state file is of another run.
    """
    if drop < 0.0 or not math.isfinite(drop):
        raise ConfigError(f"keep_accuracy: drop must be a number >= 0, not {drop}")
    if max_evaluations is not None and max_evaluations < 1:
        raise ConfigError(f"keep_accuracy: max_evaluations must be >= 1, not {max_evaluations}")
    insert = start.insert if isinstance(start, BitChoice) else insert or InsertFakeQuant()
    calibrate = calibrate or Calibrate(method="minmax")
    found = insert.annotate(graph_module, context)
    layers = [layer for layer in group_layers(found.operations) if not layer.why_float]
    widths = _start(layers, start, activation_bits)
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = _sensitivity(graph_module, context, widths, sensitivity, insert, calibrate, state)
    run = {
        "search": "keep_accuracy",
        "start": {name: list(width) for name, width in widths.items()},
        "insert": insert.to_dict(),
        "calibrate": calibrate.to_dict(),
        "own make_quantized": make_quantized is not None,
        "weights": fingerprint(graph_module),
    }
    measured = Measured(state, run)
    if "float" not in measured:
        measured.put({"float": {"metric": float(evaluate(copy.deepcopy(graph_module).eval()))}})
    base = BitChoice(layers=(), left=tuple(found.skips), totals={}, insert=insert)
    make = make_quantized or partial(_make, graph_module, context, calibrate)

    def metric_of(tried: dict[str, Width]) -> float:
        name = ", ".join(f"{layer} {w}x{a}" for layer, (w, a) in tried.items())
        if name not in measured:
            pass_ = _choice(base, layers, tried, {}, {}).insert_fake_quant(qat=False)
            measured.put({name: {"metric": float(evaluate(make(pass_).eval()))}})
        return measured[name]["metric"]

    goal = measured["float"]["metric"] - drop
    guard = _Guard(layers, widths, sensitivity, goal, metric_of, max_evaluations)
    guard.run()
    metric = guard.best_metric
    choice = _choice(base, layers, guard.best, guard.reasons(), {"metric": metric, "goal": goal})
    return GuardResult(
        met=metric >= goal,
        float_metric=measured["float"]["metric"],
        metric=metric,
        drop=drop,
        choice=choice,
        steps=tuple(guard.steps),
    )


class _Guard:
    """The search itself: a pure function of the metrics, so that a resumed run takes the same way."""

    def __init__(
        self,
        layers: Sequence[Layer],
        start: dict[str, Width],
        sensitivity: Sensitivity,
        goal: float,
        metric_of: Callable[[dict[str, Width]], float],
        max_evaluations: int | None,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._start, self._sensitivity, self._goal, self._metric_of = start, sensitivity, goal, metric_of
        self._left = max_evaluations if max_evaluations is not None else math.inf
        self.steps: list[GuardStep] = []
        self.best, self.best_metric = dict(start), -math.inf
        self._history: dict[str, list[str]] = {name: [] for name in start}
        self._best_history = copy.deepcopy(self._history)
        self._seen: list[dict[str, Width]] = []

    def run(self) -> None:
        """Back off until the goal is met, then take back what was not needed."""
        now = dict(self._start)
        moves: list[tuple[str, Width]] = []
        met = self._try(now, "", None)
        for _ in track(range(2 * len(now)), "Backing off"):
            name = None if met else self._most_sensitive(now)
            if name is None or self._left < 1:
                break
            moves.append((name, now[name]))
            wider = {**now, name: _wider(now[name])}
            met = self._try(wider, name, now[name])
            now = wider
        if not met:
            return
        for name, narrower in sorted(moves, key=lambda move: self._sensitivity.cost(*move)):
            if self._left < 1:
                return
            # of a layer with two rungs the upper one alone can be taken back at first
            tried = {**now, name: narrower}
            # what was seen on the way did not do
            next_ = now[name] == _wider(narrower) and tried not in self._seen
            if next_ and self._try(tried, name, now[name], undo=True):
                now = tried

    def reasons(self) -> dict[str, str]:
        """Return why each layer has its bits."""
        met = self.best_metric >= self._goal
        unchanged = "the metric allows it" if met else "others have a larger cost"
        history = self._history if met else self._best_history
        return {name: "; ".join(said) or unchanged for name, said in history.items()}

    def _most_sensitive(self, now: dict[str, Width]) -> str | None:
        open_ = [name for name in now if now[name] != (FLOAT, FLOAT)]
        return max(open_, key=lambda name: self._sensitivity.cost(name, now[name]), default=None)

    def _try(self, widths: dict[str, Width], name: str, before: Width | None, *, undo: bool = False) -> bool:
        self._left -= 1
        self._seen.append(widths)
        metric = self._metric_of(widths)
        met = metric >= self._goal
        kept = met or not undo
        words = ["" if w is None else self._words(name, w) for w in (before, widths.get(name))]
        self.steps.append(GuardStep(layer=name, before=words[0], after=words[1], metric=metric, met=met, kept=kept))
        if name and before is not None:
            cost = self._sensitivity.cost(name, widths[name] if undo else before)
            if not undo:
                said = f"{words[0]} -> {words[1]}: the largest cost ({cost:.3g}) while the metric was too low"
                said += f"; it became {metric:.4g}"
            elif kept:
                said = f"back to {words[1]}: the metric stays at {metric:.4g}"
            else:
                said = f"{words[1]} again would give {metric:.4g}, below {self._goal:.4g}"
            self._history[name].append(said)
        # the smaller of two sets that meet the goal is better; below it, the one with the better metric
        if kept and (met or metric > self.best_metric):
            self.best, self.best_metric = dict(widths), metric
            self._best_history = copy.deepcopy(self._history)
        return met

    def _words(self, name: str, width: Width) -> str:
        return shown(_bits(self._layers[name], width, ""))


def _start(layers: Sequence[Layer], start: int | BitChoice, activation_bits: int) -> dict[str, Width]:
    if not isinstance(start, BitChoice):
        if not 2 <= start <= 8 or not 2 <= activation_bits <= 8:
            raise ConfigError(
                f"keep_accuracy: start and activation_bits must be 2 to 8, not {start}, {activation_bits}"
            )
        return {la.name: (start if la.has_weight else activation_bits, activation_bits) for la in layers}
    given = {row.layer: (row.weight_bits, row.activation_bits) for row in start.layers}
    differ = sorted(given.keys() ^ {layer.name for layer in layers})
    if differ:
        raise ConfigError(f"keep_accuracy: start= is of another graph or context: {differ[:3]} are not in both")
    return given


def _wider(width: Width) -> Width:
    """Return the next rung: 8 bits for what is below, then float.

    Example:
        >>> _wider((4, 8)), _wider((8, 8)), _wider((4, 4))
        ((8, 8), (32, 32), (8, 8))
    """
    return (8, 8) if min(width) < 8 else (FLOAT, FLOAT)


def _sensitivity(
    graph_module: fx.GraphModule,
    context: PassContext,
    start: dict[str, Width],
    by: By,
    insert: InsertFakeQuant,
    calibrate: Calibrate,
    state: str | Path | None,
) -> Sensitivity:
    """Measure every width that a rung can have."""
    file = None if state is None else Path(state)
    tables: list[Sensitivity] = []
    inputs = {a for _, a in start.values() if a != FLOAT} | {8}
    for activation in sorted(inputs):
        bits = {w for w, a in start.values() if a == activation} | ({8} if activation == 8 else set())
        beside = None if file is None else file.with_name(f"{file.stem}.sensitivity{activation}{file.suffix}")
        options = {"by": by, "insert": insert, "calibrate": calibrate, "state": beside}
        tables.append(
            measure_sensitivity(graph_module, context, bits=sorted(bits), activation_bits=activation, **options)  # pyright: ignore
        )
    return Sensitivity(by=by, rows=tuple(row for table in tables for row in table.rows))


def _make(
    graph_module: fx.GraphModule, context: PassContext, calibrate: Calibrate, insert: InsertFakeQuant
) -> fx.GraphModule:
    made = copy.deepcopy(graph_module).eval()
    insert(made, context)
    calibrate(made, context)
    return made


def _bits(layer: Layer, width: Width, reason: str) -> LayerBits:
    return LayerBits(
        layer=layer.name,
        has_weight=layer.has_weight,
        weight_bits=width[0],
        activation_bits=width[1],
        reason=reason,
    )


def _choice(
    base: BitChoice,
    layers: Sequence[Layer],
    widths: dict[str, Width],
    reasons: dict[str, str],
    totals: dict[str, float],
) -> BitChoice:
    rows = tuple(_bits(layer, widths[layer.name], reasons.get(layer.name, "")) for layer in layers)
    return BitChoice(layers=rows, left=base.left, totals=totals, insert=base.insert)
