"""Mixed precision: the bits of each layer, chosen exactly under a budget, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.graph.quantization.layer_rounding import Layer, group_layers
from torchopt_passes.graph.record import Record
from torchopt_passes.graph.report import PassReport, Proof, ReportRow
from torchopt_passes.graph.tensors import named_tensors
from torchopt_passes.search.bit_choice import choose_options
from torchopt_passes.search.layer_costs import LayerCosts, count_macs, layer_costs
from torchopt_passes.search.sensitivity import (
    FLOAT,
    By,
    Sensitivity,
    Width,
    bits_options,
    measure_sensitivity,
    widths_of,
)

__all__ = ["BitChoice", "LayerBits", "choose_bits", "shown"]

_DIGITS = 3


class LayerBits(Record):
    """The bits of one layer, and why.

    Args:
        layer: its weight's fqn, or the node of a product of two activations.
        has_weight: False for such a product.
        weight_bits: bits of the weight (of both operands of a product); 32 is float.
        activation_bits: bits of its inputs; 32 is float.
        reason: why, in words.
        numbers: the figures behind it, by name.
    """

    layer: str
    has_weight: bool
    weight_bits: int
    activation_bits: int
    reason: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class BitChoice:
    """Bits by layer: the options of an `InsertFakeQuant`, with the reasons.

    Args:
        layers: every layer that was chosen for, in the order of the graph.
        left: the matrix operations that stay float whatever is chosen, each with its reason.
        totals: summed ``cost``, and what is spent of each budget.
        insert: target and grid that it was chosen for.
    """

    layers: tuple[LayerBits, ...]
    left: tuple[Skip, ...]
    totals: dict[str, float]
    insert: InsertFakeQuant

    def insert_fake_quant(self, **options: Any) -> InsertFakeQuant:
        """Return the pass that gives each layer its bits.

        Args:
            options: others of `InsertFakeQuant`, such as ``qat=False``.
        """
        widths = {row.layer: (row.weight_bits, row.activation_bits) for row in self.layers}
        products = [row.layer for row in self.layers if not row.has_weight]
        own: dict[str, Any] = {
            k: v or None for k, v in bits_options(widths, products, self.insert.activation_bits).items()
        }
        return replace(self.insert, **(own | options))

    @property
    def report(self) -> PassReport:
        """The choice as a report: `report_table` shows it."""
        rows = [
            ReportRow(target=r.layer, action="changed", what=shown(r), reason=r.reason, numbers=r.numbers)
            for r in self.layers
        ]
        rows += [ReportRow(target=s.target, action="skipped", what="", reason=s.reason) for s in self.left]
        proof = Proof(claim="the choice with the least cost", status="unproven", detail="nothing was changed yet")
        return PassReport(
            name="choose_bits", options=self.totals, rows=tuple(rows), modified=False, seconds=0.0, proof=proof
        )

    def to_json(self) -> str:
        """Return the choice as JSON."""
        data = {
            "layers": [row.to_dict() for row in self.layers],
            "left": [skip.to_dict() for skip in self.left],
            "totals": self.totals,
            "insert": self.insert.to_dict(),
        }
        return json.dumps(data, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BitChoice:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is no such choice; says what is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a choice of bits is JSON: {error}") from error
        if not isinstance(data, dict) or set(data) != {"layers", "left", "totals", "insert"}:
            raise ConfigError("a choice of bits holds 'layers', 'left', 'totals' and 'insert'")
        parts = cast("dict[str, Any]", data)
        return cls(
            layers=tuple(LayerBits.from_dict(row) for row in parts["layers"]),
            left=tuple(Skip.from_dict(row) for row in parts["left"]),
            totals={str(k): float(v) for k, v in parts["totals"].items()},
            insert=InsertFakeQuant.from_dict(parts["insert"]),
        )


def choose_bits(
    graph_module: fx.GraphModule,
    context: PassContext,
    *,
    bits: Sequence[int] = (2, 4, 8),
    activation_bits: int | None = 8,
    size: float | None = None,
    bitops: float | None = None,
    latency: Mapping[str, Mapping[int, float]] | None = None,
    latency_budget: float | None = None,
    sensitivity: By | Sensitivity = "sqnr",
    insert: InsertFakeQuant | None = None,
    calibrate: Calibrate | None = None,
    state: str | Path | None = None,
) -> BitChoice:
    """Choose the bits of every layer: least summed sensitivity, exactly, within the budgets.

    Args:
        graph_module: a captured float graph; it is as before afterwards.
        context: its `calibration` measures the sensitivity; its `skip` keeps layers in float.
        bits: widths of weights to choose from, 2 to 8, and 32 for float.
        activation_bits: bits of the inputs of every layer, or None: those of its weight. A value that several layers
            read is rounded once, to the widest of what they chose.
        size: budget of bytes of all parameters and buffers, weights counted packed at their bits with 4 bytes for each
            scale. Up to 1: share of the float model's.
        bitops: budget of the sum over layers of MACs x weight bits x activation bits, for one sample. Up to 1: share
            of that with 8 x 8 bits everywhere.
        latency: layer -> weight bits -> measured latency, in the unit of `latency_budget`; layers it leaves out are 0.
        latency_budget: budget of the summed latency.
        sensitivity: how it is measured, or a table measured before (`measure_sensitivity`).
        insert: target and grid of `InsertFakeQuant`; its widths are set here.
        calibrate: how ranges are chosen while measuring.
        state: file of the measurements: an interrupted run goes on; see `measure_sensitivity`.

    Returns:
        The choice; ``choice.insert_fake_quant(qat=False)`` is the pass.

    Source:
        Dong et al. 2020, "HAWQ-V2", section 3.2 (summed sensitivity under a size); Yao et al. 2021, "HAWQ-V3", section
        3.4 (integer program; BitOps, latency).

    Raises:
        ConfigError: there is no budget, or none can be kept; names the best that can be reached.
    """
    insert = insert or InsertFakeQuant()
    if size is None and bitops is None and latency_budget is None:
        raise ConfigError("choose_bits needs a budget: size=, bitops=, or latency= with latency_budget=")
    if (latency is None) != (latency_budget is None):
        raise ConfigError("choose_bits: latency= and latency_budget= go together")
    found = insert.annotate(graph_module, context)
    layers = [layer for layer in group_layers(found.operations) if not layer.why_float]
    widths = widths_of(bits, activation_bits)
    choices = [_options(layer, widths, bits) for layer in layers]
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = measure_sensitivity(
            graph_module,
            context,
            by=sensitivity,
            bits=bits,
            activation_bits=activation_bits,
            insert=insert,
            calibrate=calibrate,
            state=state,
        )
    costs = [[sensitivity.cost(l.name, w) for w in own] for l, own in zip(layers, choices, strict=True)]  # noqa: E741
    spent: dict[str, list[list[float]]] = {}
    budgets: dict[str, float] = {}
    rest: dict[str, float] = {}
    if size is not None:
        weights = layer_costs(graph_module, found.operations, per_channel=insert.per_channel)
        own_bytes = [weights.get(layer.name, LayerCosts()) for layer in layers]
        whole = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(graph_module))
        rest["bytes"] = whole - sum(item.bytes((FLOAT, FLOAT)) for item in own_bytes)
        spent["bytes"] = [[i.bytes(w) for w in own] for i, own in zip(own_bytes, choices, strict=True)]
        budgets["bytes"] = size * whole if size <= 1 else size
    if bitops is not None:
        macs = count_macs(graph_module, layers, context)
        spent["bitops"] = [
            [float(macs[layer.name] * w * a) for w, a in own] for layer, own in zip(layers, choices, strict=True)
        ]
        budgets["bitops"] = bitops * 64 * sum(macs.values()) if bitops <= 1 else bitops
    if latency is not None and latency_budget is not None:
        spent["latency"] = [_latencies(layer, own, latency) for layer, own in zip(layers, choices, strict=True)]
        budgets["latency"] = latency_budget
    chosen = choose_options(costs, *_with_rest(spent, budgets, rest))
    rows = _Reasons(choices, costs, spent, budgets, rest, chosen).rows(layers)
    totals = {"cost": sum(row[i] for row, i in zip(costs, chosen, strict=True))}
    for name, table in spent.items():
        totals[name] = rest.get(name, 0.0) + sum(row[i] for row, i in zip(table, chosen, strict=True))
        totals[f"{name}_budget"] = budgets[name]
    return BitChoice(layers=rows, left=tuple(found.skips), totals=totals, insert=insert)


def shown(row: LayerBits) -> str:
    """Return a layer's bits in words.

    Example:
        >>> shown(LayerBits(layer="fc.weight", has_weight=True, weight_bits=4, activation_bits=8, reason=""))
        '4 bits, inputs 8'
    """
    if row.activation_bits == FLOAT:
        return "float"
    return f"{row.weight_bits} bits" + (f", inputs {row.activation_bits}" if row.has_weight else "")


def _options(layer: Layer, widths: tuple[Width, ...], bits: Sequence[int]) -> list[Width]:
    integers = [(w if layer.has_weight else a, a) for w, a in widths if a != FLOAT]
    return [*dict.fromkeys(integers), *([(FLOAT, FLOAT)] if set(bits) & {0, FLOAT} else [])]


def _latencies(layer: Layer, widths: list[Width], table: Mapping[str, Mapping[int, float]]) -> list[float]:
    row = table.get(layer.name)
    if row is None:
        return [0.0] * len(widths)
    missing = [w for w, _ in widths if w not in row]
    if missing:
        raise ConfigError(f"latency: {layer.name!r} has no figure for {missing} bits")
    return [float(row[w]) for w, _ in widths]


def _with_rest(
    spent: dict[str, list[list[float]]], budgets: dict[str, float], rest: dict[str, float]
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Return tables whose first layer carries what no choice changes, so that messages show the whole, and budgets."""
    tables = {name: [list(row) for row in table] for name, table in spent.items()}
    for name, fixed in rest.items():
        if tables[name]:
            tables[name][0] = [value + fixed for value in tables[name][0]]
    return tables, budgets


@dataclass(frozen=True)
class _Reasons:
    """Says of each layer what the next narrower and the next wider option would have done."""

    choices: list[list[Width]]
    costs: list[list[float]]
    spent: dict[str, list[list[float]]]
    budgets: dict[str, float]
    rest: dict[str, float]
    chosen: tuple[int, ...]

    def rows(self, layers: list[Layer]) -> tuple[LayerBits, ...]:
        return tuple(self._row(index, layer) for index, layer in enumerate(layers))

    def _row(self, index: int, layer: Layer) -> LayerBits:
        choice = self.chosen[index]
        weight, activation = self.choices[index][choice]
        numbers = {"cost": self.costs[index][choice]}
        numbers |= {name: table[index][choice] for name, table in self.spent.items()}
        parts = [self._beside(index, choice, other) for other in (choice - 1, choice + 1)]
        return LayerBits(
            layer=layer.name,
            has_weight=layer.has_weight,
            weight_bits=weight,
            activation_bits=activation,
            reason="; ".join(part for part in parts if part) or "it has no other width to choose from",
            numbers=numbers,
        )

    def _beside(self, index: int, choice: int, other: int) -> str:
        if not 0 <= other < len(self.choices[index]):
            return ""
        width = self.choices[index][other][0]
        name = "float" if width == FLOAT else f"{width} bits"
        change = self.costs[index][other] - self.costs[index][choice]
        if change > 0:
            return f"{name} would add {change:.{_DIGITS}g} to the cost"
        need = self._exceeded(index, choice, other)
        if need:
            return f"{name} would take {-change:.{_DIGITS}g} off the cost, but needs {need}"
        return f"{name} would not lower the cost"

    def _exceeded(self, index: int, choice: int, other: int) -> str:
        for name, table in self.spent.items():
            free = self.budgets[name] - self.rest.get(name, 0.0)
            free -= sum(row[i] for row, i in zip(table, self.chosen, strict=True))
            more = table[index][other] - table[index][choice]
            if more > free:
                return f"{more:,.0f} {name} more, and {free:,.0f} are left"
        return ""
