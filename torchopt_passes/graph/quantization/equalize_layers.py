"""EqualizeLayers: give the channels between two layers the same range on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.equalization import equalization_scale
from torchopt_passes.graph.axes import base_name
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm, foldable_into
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.folding import scale_of
from torchopt_passes.graph.quantization.relu6 import BoundReLU6, ReplaceReLU6
from torchopt_passes.graph.quantization.rescale import is_near_one, move_scale, unscaled, usable_sites
from torchopt_passes.graph.quantization.scale_pairs import Axis, Site
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.verify import Inputs, StateInterpreter, evaluate
from torchopt_passes.graph.weights import MATRIX_OPS, input_dim, parameter_behind

__all__ = ["EqualizeLayers"]

_CONVERGED = 1e-6


class EqualizeLayers(GraphPass):
    """Cross-layer equalization: scale channels between two layers so that one step size fits all of them.

    Where the channels that a convolution or linear makes go, through ReLU and other operations that commute with a
    positive scale, into other convolutions and linears alone (depthwise ones too, so that triples come out right), they
    are divided by s on one side and multiplied on the other. A batch norm in between takes its side of the scale in
    its weight and bias; ranges are those of the weights with their batch norms folded in. All pairs are visited until
    nothing changes. Residual streams are left alone.

    It helps grids with one step for a whole weight, and the ranges of activations; run it before `InsertFakeQuant`.

    Args:
        relu6: ``"skip"`` leaves layers with a ReLU6 between them alone; ``"channel"`` gives each of its channels the
            bound 6 / s, which is exact and costs one element-wise minimum; ``"relu"`` replaces it by ReLU, as the paper
            does, which changes what the model computes wherever it is above 6. The same for ``clamp(0, u)``.
        max_sweeps: visits to all pairs, at most.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections
        4.1.1 (bounds by channel) and 4.1.2, equation 11.

    Proof:
        Outputs equal those before (with a ReLU6 as it is replaced) in float64 within 1e-9; scaled tensors are rounded
        to the model's dtype, so the graph before is run with what gives exactly those.

    Example:
        >>> EqualizeLayers(relu6="relu").recipe()
        {'equalize_layers': {'relu6': 'relu'}}
    """

    claim = "outputs equal the outputs before, with the scaled values rounded to the model's dtype"

    relu6: Literal["skip", "channel", "relu"] = "skip"
    max_sweeps: int = 1000

    def check(self) -> None:
        """Refuse a number of sweeps that is none."""
        if self.max_sweeps < 1:
            raise ConfigError(f"EqualizeLayers: max_sweeps must be >= 1, not {self.max_sweeps}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Find the pairs, and the scales at which both sides of all of them have the same range."""
        found, skips = usable_sites(graph_module, context or PassContext(), through_relu6=self.relu6 != "skip")
        nodes = {node.name: node for node in graph_module.graph.nodes}
        ranges = _Ranges(graph_module)
        sites: list[tuple[Site, str]] = []
        for site in found:
            weight, reason = ranges.behind(nodes[site.node])
            if reason:
                skips.append(Skip(target=site.name, reason=reason))
            else:
                sites.append((site, weight))
        before = [ranges.spread(site, weight) for site, weight in sites]
        scales = self._converge(ranges, sites)
        edits: list[Edit] = []
        scaled: list[tuple[Site, torch.Tensor]] = []
        for (site, weight), scale, spread in zip(sites, scales, before, strict=True):
            if is_near_one(scale):
                skips.append(Skip(target=site.name, reason="nothing to do: both sides have the same ranges"))
                continue
            numbers = {"spread_before": spread, "spread_after": ranges.spread(site, weight)}
            edits += move_scale(
                site, scale, f"channels of {site.name} equalized with {site.partners}", numbers, self.name
            )
            scaled.append((site, scale.float()))
        return Plan((*self._relu6(scaled), *edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the tensors that give exactly the stored ones once they are scaled."""
        return unscaled(graph_module, plan.edits)

    def expect(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        inputs: Inputs,
        *,
        dtype: torch.dtype | None,
        record: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run the graph before, with the ReLU6 as they are replaced."""
        replaced = {edit.target: edit for edit in plan.edits if isinstance(edit, ReplaceReLU6 | BoundReLU6)}

        class Replaced(StateInterpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.name not in replaced:
                    return super().run_node(n)
                value = replaced[n.name].on(self.fetch_args_kwargs_from_env(n)[0][0], n)
                if record is not None:
                    record[n.name] = value
                return value

        state = self.reference_state(graph_module, plan)
        return evaluate(graph_module, inputs, dtype=dtype, state=state, record=record, interpreter=Replaced)

    def _relu6(self, scaled: Iterable[tuple[Site, torch.Tensor]]) -> list[Edit]:
        """Return what happens to the ReLU6 between layers that are scaled; one may hold channels of several."""
        if self.relu6 == "relu":
            names = {bounded.node: site.name for site, _ in scaled for bounded in site.bounded}
            return [ReplaceReLU6(target=node, reason=f"bounds channels of {name}") for node, name in names.items()]
        scales: dict[str, torch.Tensor] = {}
        for site, scale in scaled:
            for bounded in site.bounded:
                own = torch.where(bounded.index < 0, 1.0, scale[bounded.index])
                scales[bounded.node] = scales.get(bounded.node, torch.ones(())) * own
        reason = "a bound for each channel: they are scaled apart"
        return [BoundReLU6(target=node, reason=reason, scale=scale) for node, scale in scales.items()]

    def _converge(self, ranges: _Ranges, sites: Sequence[tuple[Site, str]]) -> list[torch.Tensor]:
        totals = [torch.ones(site.size, dtype=torch.float64) for site, _ in sites]
        for _ in range(self.max_sweeps):
            change = 0.0
            for place, (site, weight) in enumerate(sites):
                scale = equalization_scale(ranges.made(weight), ranges.read(site))
                ranges.apply(site, weight, scale)
                totals[place] = totals[place] * scale
                change = max(change, float(scale.log().abs().max()))
            if change < _CONVERGED:
                break
        return totals


class _Ranges:
    """The largest absolute value of each kernel, batch norms folded in: a matrix for each weight, [out, in]."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._matrices: dict[str, torch.Tensor] = {}
        self._weight: dict[str, str] = {}
        first = aliases(graph_module)
        for node in graph_module.graph.nodes:
            fqn = parameter_behind(node.args[MATRIX_OPS[node.target][-1]]) if node.target in MATRIX_OPS else None
            dim = input_dim(node, fqn) if fqn in first else None
            weight = get_tensor(graph_module, first[fqn]).detach() if fqn in first else None
            if fqn is None or dim is None or weight is None or weight.ndim < 2:
                continue
            matrix = weight.abs().double().movedim(1 - dim, 0)
            matrix = matrix.reshape(*matrix.shape[:2], -1).amax(2)
            users = [BatchNorm.of(user) for user in node.users]
            norm = next((n for n in users if n is not None and foldable_into(n)[0] is node), None)
            if norm is not None and len(matrix) == int(norm.node.meta["val"].shape[1]):
                matrix = matrix * scale_of(graph_module, norm).abs()[:, None]
                self._weight[norm.node.name] = first[fqn]
            self._weight.setdefault(node.name, first[fqn])
            self._matrices[first[fqn]] = matrix.cpu()

    def behind(self, node: fx.Node) -> tuple[str, str]:
        """Return the weight that makes the channels of a layer or a batch norm, or '' and the reason."""
        if node.name in self._weight:
            return self._weight[node.name], ""
        return "", f"{base_name(node)} {node.name} is not folded into a weight: there is no range to equalize"

    def made(self, weight: str) -> torch.Tensor:
        """Return r1, [out]."""
        return self._matrices[weight].amax(1)

    def read(self, site: Site) -> torch.Tensor:
        """Return r2, [site.size]."""
        return site.per_channel([self._grouped(reader.axis).amax(1).flatten() for reader in site.readers])

    def apply(self, site: Site, weight: str, scale: torch.Tensor) -> None:
        """Divide rows of one matrix, multiply columns of the others."""
        self._matrices[weight] = self._matrices[weight] / scale[:, None]
        for reader in site.readers:
            factor = torch.where(reader.index < 0, 1.0, scale[reader.index])
            wide = self._grouped(reader.axis) * factor.reshape(reader.axis.groups, 1, -1)
            self._matrices[reader.axis.fqn] = wide.flatten(0, 1)

    def spread(self, site: Site, weight: str) -> float:
        """Return how often the smallest range of a channel goes into the largest, on the worse side."""
        sides = [side[side > 0] for side in (self.made(weight), self.read(site))]
        return max((float(side.max() / side.min()) for side in sides if len(side)), default=1.0)

    def _grouped(self, axis: Axis) -> torch.Tensor:
        return self._matrices[axis.fqn].unflatten(0, (axis.groups, -1))
