"""How much each layer suffers from each width, measured for that layer alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import fx

from torchopt_passes.callbacks.outputs import loss_of
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.fingerprint import fingerprint
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.graph.quantization.layer_bits import FLOAT_BITS
from torchopt_passes.graph.quantization.layer_inputs import several_times
from torchopt_passes.graph.quantization.layer_rounding import Layer, LayerRunner, group_layers
from torchopt_passes.graph.record import Record
from torchopt_passes.progress import track
from torchopt_passes.search.measured import Measured

__all__ = ["FLOAT", "Sensitivity", "SensitivityRow", "Width", "bits_options", "measure_sensitivity", "widths_of"]

FLOAT = 32
"""The width that stands for float."""

By = Literal["sqnr", "gradient", "fisher", "leave_one_out"]
Width = tuple[int, int]
"""Bits of the weight and of the inputs; of both operands where there is no weight; (32, 32) is float."""


class SensitivityRow(Record):
    """What one width costs one layer.

    Args:
        layer: its weight's fqn, or the node of a product of two activations.
        weight_bits: bits of the weight (of both operands of a product); 32 is float.
        activation_bits: bits of its inputs; 32 is float.
        cost: what is summed and minimised, dimensionless unless the loss or metric has a unit; 0 for float.
        numbers: the figures behind it, by name.
    """

    layer: str
    weight_bits: int
    activation_bits: int
    cost: float
    numbers: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivity of every layer at every width: a table that goes to JSON and back.

    Args:
        by: how it was measured.
        rows: layer by layer in the order of the graph, from the narrowest width to float.
    """

    by: str
    rows: tuple[SensitivityRow, ...]

    def cost(self, layer: str, width: Width) -> float:
        """Return the cost of a layer at a width; float is free.

        Raises:
            ConfigError: it was not measured.
        """
        if width == (FLOAT, FLOAT):
            return 0.0
        for row in self.rows:
            if row.layer == layer and (row.weight_bits, row.activation_bits) == width:
                return row.cost
        raise ConfigError(f"the sensitivity has no row of {layer} at {width[0]} x {width[1]} bits: measure that too")

    def to_json(self) -> str:
        """Return the table as JSON."""
        return json.dumps({"by": self.by, "rows": [row.to_dict() for row in self.rows]}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is no such table; says what is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a sensitivity table is JSON: {error}") from error
        if not isinstance(data, dict) or set(data) != {"by", "rows"} or not isinstance(data["rows"], list):
            raise ConfigError("a sensitivity table holds 'by' and 'rows'")
        rows = cast("list[dict[str, Any]]", data["rows"])
        return cls(by=str(data["by"]), rows=tuple(SensitivityRow.from_dict(row) for row in rows))


def measure_sensitivity(
    graph_module: fx.GraphModule,
    context: PassContext,
    *,
    by: By = "sqnr",
    bits: Sequence[int] = (2, 4, 8),
    activation_bits: int | None = 8,
    distance: Literal["mse", "kl"] = "mse",
    metric: Callable[[fx.GraphModule], float] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    insert: InsertFakeQuant | None = None,
    calibrate: Calibrate | None = None,
    state: str | Path | None = None,
) -> Sensitivity:
    """Measure, for every layer that can be int8 and every width, what rounding that layer alone does.

    Args:
        graph_module: a captured float graph; it is copied, and as before afterwards.
        context: its `calibration` is read several times; its `skip` keeps layers in float.
        by: ``"sqnr"``: noise-to-signal ratio of the layer's own result, exact inputs in front of it (cheapest: one run
            for each width). ``"gradient"``: first-order change of the loss. ``"fisher"``: second-order change of the
            loss. Both take one forward and backward for each width. ``"leave_one_out"``: how far the outputs of the
            model move, or how much of `metric` is lost (one run for each layer and width).
        bits: widths of weights, 2 to 8; 32 (float) is free and always in the table.
        activation_bits: bits of the inputs at every width, or None: those of the weight.
        distance: of ``"leave_one_out"``: relative squared error of the outputs, or ``KL(float || rounded)`` of the
            distributions that softmax over their last dimension gives.
        metric: for ``"leave_one_out"`` instead of a distance: prepared graph -> figure of merit, higher is better. The
            graph has that layer alone rounded, calibrated anew.
        loss: for ``"gradient"`` and ``"fisher"``: (output, batch) -> scalar; by default the loss in the output.
        insert: target and grid of `InsertFakeQuant`; its widths are set here.
        calibrate: how ranges are chosen, anew for every width.
        state: file that keeps what is measured; a run that finds it goes on. After each width, and with
            ``"leave_one_out"`` after each layer, it is written.

    Returns:
        The table, the same whether the run was interrupted or not.

    Formula, with y a layer's result and d what rounding its weight and inputs adds to y, g = dL/dy:
        sqnr: sum d^2 / sum y^2 over all batches; number ``sqnr`` = -10 log10 of it, in dB
        gradient: |mean over batches of sum g d|; when the weight alone is rounded this is |g_w . dw|
        fisher: mean over batches of 1/2 sum g^2 d^2
        leave_one_out: sum (o' - o)^2 / sum o^2 with o the outputs; mean KL; or metric(float) - metric(rounded)

    Source:
        Dong et al. 2019, "HAWQ: Hessian aware quantization of neural networks with mixed precision" (sensitivity times
        perturbation); Li et al. 2021, "BRECQ", equation 10 (Fisher diagonal at a layer's output); Cai et al. 2020,
        "ZeroQ", section 3.2 (KL of the outputs, one layer rounded).

    Raises:
        ConfigError: there is no data or no loss, an option is wrong, or the state file is of another run.
    """
    insert, calibrate = insert or InsertFakeQuant(), calibrate or Calibrate(method="minmax")
    _check(by, insert, metric)
    batches = several_times(context.calibration, "measure_sensitivity")
    widths = widths_of(bits, activation_bits)
    layers = [layer for layer in group_layers(insert.annotate(graph_module, context).operations) if not layer.why_float]
    run = {
        "search": "sensitivity",
        "by": by if metric is None else f"{by} of a metric",
        "distance": distance,
        "insert": insert.to_dict(),
        "calibrate": calibrate.to_dict(),
        "layers": [layer.name for layer in layers],
        "weights": fingerprint(graph_module),
    }
    measured = Measured(state, run)
    for width in track([w for w in widths if w != (FLOAT, FLOAT)], "Measuring sensitivity"):
        missing = [layer for layer in layers if _key(layer, width) not in measured]
        if not missing:
            continue
        prepare = partial(_prepare, graph_module, context, insert, calibrate, width)
        if metric is not None:
            _by_metric(graph_module, prepare, missing, width, metric, measured)
            continue
        runner = LayerRunner(prepare(None), layers)
        with runner.measuring():
            if by == "leave_one_out":
                _by_outputs(runner, batches, missing, width, distance, measured)
            else:
                figures = _by_noise(runner, batches) if by == "sqnr" else _by_loss(runner, batches, by, loss)
                # what training alone runs has no figure: its bits change nothing
                measured.put({_key(layer, width): figures.get(layer.name, {"cost": 0.0}) for layer in missing})
    return Sensitivity(by=by, rows=tuple(_rows(layers, widths, measured)))


def widths_of(bits: Sequence[int], activation_bits: int | None) -> tuple[Width, ...]:
    """Return the widths to choose from, from the narrowest to float.

    Raises:
        ConfigError: a width is neither 2 to 8 nor float.

    Example:
        >>> widths_of((8, 4), 8)
        ((4, 8), (8, 8), (32, 32))
    """
    for width in (*bits, *(() if activation_bits is None else (activation_bits,))):
        if not 2 <= width <= 8 and (width not in FLOAT_BITS or width == activation_bits):
            raise ConfigError(f"bits must be 2 to 8, or 32 for float, not {width}")
    narrow = sorted({b for b in bits if b not in FLOAT_BITS})
    return (*((b, activation_bits or b) for b in narrow), (FLOAT, FLOAT))


def bits_options(widths: dict[str, Width], products: Iterable[str], default: int = 8) -> dict[str, dict[str, int]]:
    """Return widths by layer as the options of `InsertFakeQuant` that give each layer its own.

    Args:
        widths: layer -> bits of weight and inputs.
        products: the layers without a weight.
        default: the ``activation_bits`` of the pass: layers with that width are not named.
    """
    weights = {name: width[0] for name, width in widths.items() if name not in set(products)}
    inputs = {name: a for name, (_, a) in widths.items() if a != default and (name not in weights or a != FLOAT)}
    # weights first: the name of a product's node may also be that of a module with weights inside
    ordered = sorted(inputs, key=lambda name: name not in weights)
    return {"weight_bits_of": weights, "activation_bits_of": {name: inputs[name] for name in ordered}}


def _check(by: str, insert: InsertFakeQuant, metric: object) -> None:
    if by not in ("sqnr", "gradient", "fisher", "leave_one_out"):
        raise ConfigError(f"sensitivity is measured by 'sqnr', 'gradient', 'fisher' or 'leave_one_out', not {by!r}")
    if metric is not None and by != "leave_one_out":
        raise ConfigError(f"metric= goes with by='leave_one_out', not {by!r}")
    if insert.weight_bits_of or insert.activation_bits_of:
        raise ConfigError("insert= must leave the bits of layers open; PassContext(skip=...) keeps layers in float")


def _prepare(
    graph_module: fx.GraphModule,
    context: PassContext,
    insert: InsertFakeQuant,
    calibrate: Calibrate,
    width: Width,
    layer: Layer | None,
) -> fx.GraphModule:
    """Return a calibrated copy at one width, with one layer rounded, or all."""
    context = replace(context, prove=False)
    only: dict[str, Any] = {}
    if layer is not None:
        only = {"weight_bits_of": {layer.name: width[0], "*": FLOAT}}
    prepared = copy.deepcopy(graph_module).eval()
    replace(insert, qat=False, weight_bits=width[0], activation_bits=width[1], **only)(prepared, context)
    calibrate(prepared, context)
    return prepared


def _by_noise(runner: LayerRunner, batches: Iterable[Any]) -> dict[str, dict[str, float]]:
    noise, signal = dict[str, float](), dict[str, float]()

    def visit(name: str, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        noise[name] = noise.get(name, 0.0) + float((rounded.double() - exact.double()).square().sum())
        signal[name] = signal.get(name, 0.0) + float(exact.double().square().sum())

    runner.visit = visit
    for batch in track(batches, "Running batches"):
        runner.outputs(batch)
    return {name: _ratio(noise[name], signal[name]) for name in noise}


def _by_loss(
    runner: LayerRunner, batches: Iterable[Any], by: str, loss: Callable[[Any, Any], torch.Tensor] | None
) -> dict[str, dict[str, float]]:
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    runner.visit = lambda name, exact, rounded: seen.append((name, exact, rounded - exact))
    first, second = dict[str, float](), dict[str, float]()
    count = 0
    for batch in track(batches, "Running batches"):
        seen.clear()
        with torch.enable_grad():
            _, output = runner.outputs(batch)
            value = loss_of(output) if loss is None else loss(output, batch)
        if value is None:
            raise ConfigError(
                f"by={by!r} needs a loss and the model returns none: capture it with labels, or give loss="
            )
        found: Any = torch.autograd.grad(value, [exact for _, exact, _ in seen], allow_unused=True)
        for (name, _, change), slope in zip(seen, found, strict=True):
            terms = torch.zeros(()) if slope is None else (slope * change).double()
            first[name] = first.get(name, 0.0) + float(terms.sum())
            second[name] = second.get(name, 0.0) + 0.5 * float(terms.square().sum())
        count += 1
    figures = {name: {"gradient": abs(first[name]) / count, "fisher": second[name] / count} for name in first}
    return {name: {"cost": numbers[by], **numbers} for name, numbers in figures.items()}


def _by_outputs(
    runner: LayerRunner, batches: Iterable[Any], layers: list[Layer], width: Width, distance: str, measured: Measured
) -> None:
    for layer in track(layers, "Leaving one out"):
        above = below = 0.0
        for batch in batches:
            runner.rounded = set()
            exact = runner.outputs(batch)[0]
            runner.rounded = {layer.name}
            for one, other in zip(exact, runner.outputs(batch)[0], strict=True):
                if isinstance(one, torch.Tensor) and one.is_floating_point() and one.ndim:
                    up, down = (_kl if distance == "kl" else _squares)(one.double(), other.double())
                    above, below = above + up, below + down
        if not below:
            raise ConfigError("by='leave_one_out' needs an output that is a floating tensor and not all zero")
        numbers = {"cost": above / below} if distance == "kl" else _ratio(above, below)
        measured.put({_key(layer, width): numbers})


def _by_metric(
    graph_module: fx.GraphModule,
    prepare: Callable[[Layer | None], fx.GraphModule],
    layers: list[Layer],
    width: Width,
    metric: Callable[[fx.GraphModule], float],
    measured: Measured,
) -> None:
    if "float" not in measured:
        measured.put({"float": {"metric": float(metric(copy.deepcopy(graph_module).eval()))}})
    best = measured["float"]["metric"]
    for layer in track(layers, "Leaving one out"):
        value = float(metric(prepare(layer)))
        measured.put({_key(layer, width): {"cost": best - value, "metric": value}})


def _squares(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    return float((other - one).square().sum()), float(one.square().sum())


def _kl(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), float(one[..., 0].numel())


def _ratio(noise: float, signal: float) -> dict[str, float]:
    ratio = noise / max(signal, 1e-300)
    return {"cost": ratio} | ({"sqnr": -10.0 * math.log10(ratio)} if ratio > 0.0 else {})


def _key(layer: Layer, width: Width) -> str:
    weight, activation = width
    return f"{layer.name} {weight if layer.has_weight else activation}x{activation}"


def _rows(layers: list[Layer], widths: tuple[Width, ...], measured: Measured) -> Iterable[SensitivityRow]:
    for layer in layers:
        for weight, activation in dict.fromkeys((w if layer.has_weight else a, a) for w, a in widths):
            found = {"cost": 0.0} if activation == FLOAT else measured[_key(layer, (weight, activation))]
            numbers = {name: value for name, value in found.items() if name != "cost"}
            yield SensitivityRow(
                layer=layer.name,
                weight_bits=weight,
                activation_bits=activation,
                cost=found["cost"],
                numbers=numbers,
            )
