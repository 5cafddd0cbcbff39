"""ScaleOutputs: give the output channels of linears one range, where a kernel rounds outputs with one step for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.equalization import output_scale
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_inputs import AbsMax, required, watch_values
from torchopt_passes.graph.quantization.rescale import ScaleChannels, unscaled
from torchopt_passes.graph.quantization.scale_value import ScaleValue, plain_linears
from torchopt_passes.graph.quantization.targets import FUSED_ACTIVATIONS, KINDS
from torchopt_passes.graph.tensors import aliases

__all__ = ["ScaleOutputs"]


class ScaleOutputs(GraphPass):
    """Divide the output channels of linears by a scale each, and multiply the scale back behind them.

    Kernels that return int8 (LiteRT, XNNPACK) have one step for all channels of an output. In Transformer encoders a
    few channels of what goes into the residual stream are a hundred times larger than the others, which are rounded
    away then. Divided by what each channel reaches they are all alike, and the weights are as exact as before where
    each output channel has its own step. One multiplication more in the captured graph, for each linear that gains.
    Run it before `InsertFakeQuant`, and behind `SmoothActivations`.

    Args:
        min_gain: by how many dB the rounding noise of an output must fall; other linears are left alone.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Formula:
        W'_c = W_c / s_c, b'_c = b_c / s_c and Y_c = s_c Y'_c, with s_c of `functional.equalization.output_scale`. The
        noise of a step falls by 20 log10(max_c max|Y_c| / sqrt(mean_c max|Y_c|^2)) dB.

    Source:
        The step of each output channel of Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
        Bias Correction", section 4.1, with the inverse scale kept in the graph as in section 3 of SmoothQuant.

    Proof:
        Outputs equal those before in float64 within 1e-9; scaled tensors are rounded to the model's dtype, so the
        graph before is run with what gives exactly those.

    Example:
        >>> ScaleOutputs(min_gain=6.0).recipe()
        {'scale_outputs': {'min_gain': 6.0}}
    """

    claim = "outputs equal the outputs before, with the scaled values rounded to the model's dtype"

    min_gain: float = 12.0
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse a gain that is none."""
        if not self.min_gain > 0.0:
            raise ConfigError(f"ScaleOutputs: min_gain must be > 0 dB, not {self.min_gain}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"ScaleOutputs: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Measure the outputs of the linears, and choose the scales."""
        context = context or PassContext()
        linears, skips = _usable(graph_module, context)
        if not linears:
            return Plan(skips=tuple(skips))
        watches = {one.node.name: AbsMax(-1) for one in linears}
        batches = required(context.calibration, "ScaleOutputs")
        watch_values(graph_module, batches, watches, max_batches=self.max_batches, what="Measuring outputs")
        edits: list[Edit] = []
        for one in linears:
            largest = watches[one.node.name].largest.cpu()
            gain = _gain(largest)
            if gain < self.min_gain:
                skips.append(Skip(target=one.weight, reason=f"nothing to do: scaled outputs gain {gain:.1f} dB"))
                continue
            edits += self._scaled(one, output_scale(largest), gain)
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the tensors that give exactly the stored ones once they are scaled."""
        return unscaled(graph_module, plan.edits)

    def _scaled(self, linear: _Linear, scale: torch.Tensor, gain: float) -> list[Edit]:
        reason = "one step for all channels of the output would round the smaller ones away"
        numbers = {"gain_db": gain, "scale_min": float(scale.min()), "scale_max": float(scale.max())}
        dims = {linear.weight: linear.dim} | ({linear.bias: 0} if linear.bias else {})
        divided: list[Edit] = [
            ScaleChannels(
                target=fqn, reason=reason, numbers=numbers, dim=dim, scale=scale.clone(), divide=True, by=self.name
            )
            for fqn, dim in dims.items()
        ]
        users = tuple(user.name for user in linear.node.users)
        return [
            *divided,
            ScaleValue(target=linear.node.name, reason=reason, numbers=numbers, users=users, scale=scale.clone()),
        ]


@dataclass(frozen=True)
class _Linear:
    node: fx.Node
    weight: str
    dim: int  # of the outputs
    bias: str


def _usable(graph_module: fx.GraphModule, context: PassContext) -> tuple[list[_Linear], list[Skip]]:
    """Return the linears whose weight and bias are theirs alone, and the others with their reasons."""
    first, parameters = aliases(graph_module), dict(graph_module.named_parameters())
    linears: list[_Linear] = []
    skips: list[Skip] = []
    for node, fqn, dim in plain_linears(graph_module):
        place = KINDS[node.target].bias or 0
        bias = node.args[place] if place < len(node.args) else None
        own = isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1
        name = first.get(str(bias.target), "") if own else ""  # pyright: ignore
        pattern = context.skipped_by(fqn)
        if pattern is not None:
            skips.append(Skip(target=fqn, reason=f"skip pattern {pattern!r}"))
        elif bias is not None and (name not in parameters or parameters[name].ndim != 1):
            skips.append(Skip(target=fqn, reason=f"the bias of {node.name} is no parameter of its own"))
        elif not node.users or any(user.op == "output" or user.target in FUSED_ACTIVATIONS for user in node.users):
            skips.append(Skip(target=fqn, reason=f"{node.name} gives an output, or what runs in its kernel follows"))
        else:
            linears.append(_Linear(node, fqn, 1 - dim, name))
    return linears, skips


def _gain(largest: torch.Tensor) -> float:
    """Return by how many dB the noise falls with a step for each channel; 0 where all is zero."""
    power = float(largest.double().square().mean())
    return 20.0 * math.log10(float(largest.max()) / math.sqrt(power)) if power > 0 else 0.0
