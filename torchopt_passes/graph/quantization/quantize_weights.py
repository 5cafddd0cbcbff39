"""QuantizeWeights: weight-only quantization of linears and embeddings, for language models above all."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.gptq import gptq, output_error
from torchopt_passes.functional.groupwise import GroupGrid, fit_least_squares, fit_range
from torchopt_passes.functional.hqq import fit_hqq
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_hessians import layer_hessians
from torchopt_passes.graph.quantization.rescale import ScaleChannels
from torchopt_passes.graph.quantization.scale_weights import ScaleWeights
from torchopt_passes.graph.quantization.store_integers import StoreIntegers
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.graph.quantization.weight_layers import WeightLayer, find_layers
from torchopt_passes.graph.tensors import aliases, check_patterns, get_tensor, matching_pattern
from torchopt_passes.progress import track

__all__ = ["QuantizeWeights"]

aten = torch.ops.aten
_TO_OUTPUT = {
    aten.to.dtype,
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.contiguous.default,
    aten.mul.Tensor,
    aten.tanh.default,
    aten.div.Tensor,
}


@dataclass(frozen=True)
class _Weight:
    """A weight that is stored as integers: by which name, from which operation, on which grid."""

    fqn: str
    bits: int
    group_size: int
    note: str
    layer: WeightLayer | None


class QuantizeWeights(GraphPass):
    """Store the weights of linears (and embeddings) as integers; activations stay float.

    The pass decides on the captured graph; its plan applies to the graph, or to your own model, where the weights
    become tensors of torchao's: ``generate()``, ``save_pretrained`` and ``from_pretrained`` go on working.

    Args:
        bits: width of the integers: 2 to 8.
        group_size: input columns of a row that share a scale; None for the whole row. Where it does not divide a
            weight's columns, the largest common divisor is taken (and reported), down to 16.
        fit: how integers and scales are chosen. ``"rtn"``: range and nearest; ``"mse"``: scales of the least squared
            error; ``"hqq"``: of a sparse error; these need no data (the last two clip outliers, which language models
            need: the benchmark has them behind nearest). ``"gptq"``: columns make up for each other's
            errors in the outputs, on data, each layer on what the rounded layers before it give; ``"awq"``: channels
            with large inputs are scaled up first (`ScaleWeights`), then ``"rtn"``.
        symmetric: whether zero points are 0.
        linears: store linears; False for embeddings alone.
        embeddings: store embeddings too, and a head that is tied to one: they are one weight.
        head: store an untied head, the linear that gives the output.
        overrides: glob on fqns or modules -> bits, the first that matches.
        act_order: of ``"gptq"``: round the columns with the largest inputs first.
        damping: of ``"gptq"``: added to the Hessian's diagonal, as a share of its mean.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Frantar et al. 2022, "GPTQ"; Badri & Shaji 2023, "Half-Quadratic Quantization"; Lin et al. 2023, "AWQ".

    Proof:
        Outputs equal those of the model before with its weights rounded, in float64 within 1e-9.

    Example:
        >>> QuantizeWeights(bits=4, group_size=64, fit="gptq").recipe()
        {'quantize_weights': {'bits': 4, 'group_size': 64, 'fit': 'gptq'}}
    """

    claim = "outputs equal those of the model before with its weights rounded"

    bits: int = 8
    group_size: int | None = None
    fit: Literal["rtn", "mse", "hqq", "gptq", "awq"] = "rtn"
    symmetric: bool = True
    linears: bool = True
    embeddings: bool = False
    head: bool = False
    overrides: dict[str, int] | None = None
    act_order: bool = True
    damping: float = 0.01
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse widths, sizes and shares that are none."""
        for bits in (self.bits, *(self.overrides or {}).values()):
            if not 2 <= bits <= 8:
                raise ConfigError(f"QuantizeWeights: bits must be 2 to 8, not {bits}")
        if self.group_size is not None and self.group_size < 16:
            raise ConfigError(f"QuantizeWeights: group_size must be >= 16 or None, not {self.group_size}")
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"QuantizeWeights: damping must be in (0, 1], not {self.damping}")
        if not self.linears and not self.embeddings:
            raise ConfigError("QuantizeWeights: linears=False leaves nothing without embeddings=True")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"QuantizeWeights: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the weights, then fit them; see the class."""
        context = context or PassContext()
        check_patterns(graph_module, tuple(self.overrides or {}), "overrides")
        weights, skips = self._choose(graph_module, context)
        if not weights:
            skips = skips or [Skip(target="graph", reason="nothing to do: no linear has a float weight")]
            return Plan(skips=tuple(skips))
        edits: list[Edit] = []
        if self.fit == "awq":
            scaling = ScaleWeights(
                bits=self.bits,
                group_size=self.group_size or 0,
                symmetric=self.symmetric,
                max_batches=self.max_batches,
            ).plan(graph_module, context)
            edits += scaling.edits
            graph_module = scaling.apply(copy.deepcopy(graph_module))
        if self.fit == "gptq":
            edits += self._gptq(graph_module, weights, context)
        else:
            for weight in track(weights, "Fitting weights"):
                edits.append(self._nearest(weight, get_tensor(graph_module, weight.fqn)))
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the rounded weights, in float64; with ``"awq"`` also what was scaled."""
        state: dict[str, torch.Tensor] = {}
        for edit in plan.edits:
            if isinstance(edit, ScaleChannels):
                old = state.get(edit.target)
                state[edit.target] = edit.on(get_tensor(graph_module, edit.target).detach() if old is None else old)
            elif isinstance(edit, StoreIntegers):
                state[edit.target] = edit.value(torch.float64)
        first = aliases(graph_module)
        return {name: state[one] for name, one in first.items() if one in state}

    def _choose(self, graph_module: fx.GraphModule, context: PassContext) -> tuple[list[_Weight], list[Skip]]:
        found: list[_Weight] = []
        skips: list[Skip] = []
        layers = {layer.fqn: layer for layer in find_layers(graph_module)}
        embedded = _embedded(graph_module)
        for fqn in [*dict.fromkeys([*embedded, *layers])]:
            layer = layers.get(fqn)
            pattern = context.skipped_by(fqn)
            why = f"skip pattern {pattern!r}" if pattern else self._why_float(layer, fqn in embedded)
            columns = get_tensor(graph_module, fqn).shape[-1]
            group_size, note = _group_size(self.group_size, columns)
            if not why and not group_size:
                why = f"float: {columns} columns have no groups of {self.group_size}"
            if why:
                skips.append(Skip(target=fqn, reason=why))
                continue
            chosen = matching_pattern(fqn, tuple(self.overrides or {}))
            bits = self.bits if chosen is None else (self.overrides or {})[chosen]
            note += "" if chosen is None else f", override {chosen!r}"
            if fqn in embedded:
                note += ", embedding" if layer is None else ", embedding and the head tied to it: one weight"
            found.append(_Weight(fqn, bits, group_size, note, None if fqn in embedded else layer))
        return found, skips

    def _why_float(self, layer: WeightLayer | None, embedded: bool) -> str:
        if embedded:
            tied = "" if layer is None else ", and so is the head that is tied to it"
            return "" if self.embeddings else f"float: an embedding{tied} (embeddings=True stores it)"
        if layer is None:
            return "float: no linear reads it"
        if not self.linears:
            return "float: a linear (linears=False)"
        if layer.is_convolution:
            return "float: a convolution; only linears are stored as integers"
        if layer.operation.target is not aten.linear.default or layer.transposed:
            return f"float: a {layer.operands.kind} x W; torchao's tensors run in linears alone"
        if layer.quantizer:
            return "float: a fake-quantizer rounds it already"
        if layer.why_not:
            return f"float: {layer.why_not}"
        if not self.head and _gives_output(layer.operation):
            return "float: the head (head=True stores it)"
        return ""

    def _nearest(self, weight: _Weight, value: torch.Tensor) -> StoreIntegers:
        value = value.detach().float()
        grid = self._fit(value, weight)
        return self._edit(weight, value, grid, grid.quantize(value), {"rtn": "range"}.get(self.fit, self.fit), {})

    def _fit(self, value: torch.Tensor, weight: _Weight, importance: torch.Tensor | None = None) -> GroupGrid:
        bits, size = weight.bits, weight.group_size
        if self.fit in ("rtn", "awq"):  # the range is what `ScaleWeights` measures its scales by
            return fit_range(value, bits, size, symmetric=self.symmetric)
        if self.fit == "hqq":
            return fit_hqq(value, bits, size, symmetric=self.symmetric)
        return fit_least_squares(value, bits, size, symmetric=self.symmetric, importance=importance)

    def _gptq(self, graph_module: fx.GraphModule, weights: list[_Weight], context: PassContext) -> list[Edit]:
        edits: list[Edit] = []
        by_fqn = {weight.fqn: weight for weight in weights}
        with walking(graph_module, context.calibration, "QuantizeWeights", self.max_batches) as batches:
            walk = Walk(graph_module, batches)
            layers = {layer.fqn: layer for layer in find_layers(graph_module, walk.graph)}
            for weight in (w for w in weights if w.layer is None):  # embeddings come first and read no values
                edits.append(self._nearest(weight, get_tensor(graph_module, weight.fqn)))
                walk.set(weight.fqn, edits[-1].value())  # pyright: ignore
            ordered = [layer for layer in layers.values() if by_fqn.get(layer.fqn) and by_fqn[layer.fqn].layer]
            for layer, hessian in layer_hessians(walk, ordered, "Fitting weights"):
                value = get_tensor(graph_module, layer.fqn).detach().float()
                edit = self._one_gptq(by_fqn[layer.fqn], value, hessian[0])
                walk.set(layer.fqn, edit.value().to(value.dtype))
                edits.append(edit)
        return edits

    def _one_gptq(self, weight: _Weight, value: torch.Tensor, hessian: torch.Tensor) -> StoreIntegers:
        grids: dict[int, GroupGrid] = {}
        importance = hessian.diagonal().clone()

        def fit(columns: torch.Tensor, index: torch.Tensor) -> Any:
            grid = self._fit(columns, weight, importance[index])
            grids[int(index[0])] = grid
            return grid.round

        rounded = gptq(
            value, hessian, fit, group_size=weight.group_size, act_order=self.act_order, damping=self.damping
        )
        grid = GroupGrid.cat([grids[start] for start in sorted(grids)])
        size = max(output_error(value, hessian), 1e-30)
        nearest = fit_range(value, weight.bits, weight.group_size, symmetric=self.symmetric).round(value)
        numbers = {
            "output_error_nearest": output_error(value - nearest, hessian) / size,
            "output_error": output_error(value - rounded, hessian) / size,
        }
        return self._edit(weight, value, grid, grid.quantize(rounded), "GPTQ", numbers)

    def _edit(
        self,
        weight: _Weight,
        value: torch.Tensor,
        grid: GroupGrid,
        integers: torch.Tensor,
        how: str,
        numbers: dict[str, float],
    ) -> StoreIntegers:
        zero_point = None if self.symmetric else grid.zero_point.cpu().contiguous()
        stored = integers.numel() * weight.bits / 8 + grid.scale.nbytes * (1 if self.symmetric else 2)
        noise = float((grid.dequantize(integers) - value).square().sum() / value.square().sum().clamp(min=1e-30))
        return StoreIntegers(
            target=weight.fqn,
            reason=f"{weight.bits} bits, groups of {weight.group_size}, fit {how}{weight.note}",
            numbers={"bits": float(weight.bits), "bits_per_weight": 8 * stored / integers.numel(), "error": noise}
            | numbers,
            integers=integers.cpu(),
            scale=grid.scale.cpu().contiguous(),
            bits=weight.bits,
            zero_point=zero_point,
        )


def _group_size(wanted: int | None, columns: int) -> tuple[int, str]:
    if wanted is None or columns <= wanted:
        return columns, ""
    size = math.gcd(wanted, columns)
    if size == wanted:
        return size, ""
    return (size, f" ({columns} columns have no groups of {wanted})") if size >= 16 else (0, "")


def _embedded(graph_module: fx.GraphModule) -> list[str]:
    """Return the parameters that embeddings read, by first name."""
    first = aliases(graph_module)
    parameters = {name for name, _ in graph_module.named_parameters()}
    nodes = graph_module.graph.find_nodes(op="call_function", target=aten.embedding.default)
    names = [first.get(str(getattr(node.args[0], "target", ""))) for node in nodes]
    return list(dict.fromkeys(name for name in names if name in parameters))


def _gives_output(node: fx.Node) -> bool:
    """Whether a linear's result is the model's output, with no other layer and no sum in between."""
    return any(user.op == "output" or (user.target in _TO_OUTPUT and _gives_output(user)) for user in node.users)
