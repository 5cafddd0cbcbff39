"""SmoothActivations: move the outliers of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.equalization import smoothing_scale
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_inputs import AbsMax, required, watch_values
from torchopt_passes.graph.quantization.rescale import (
    ScaleChannels,
    Weights,
    is_near_one,
    move_scale,
    unscaled,
    usable_sites,
)
from torchopt_passes.graph.quantization.scale_pairs import Site
from torchopt_passes.graph.quantization.scale_value import ScaleValue, SharedInput, find_inputs

__all__ = ["SmoothActivations"]


class SmoothActivations(GraphPass):
    """SmoothQuant: divide the input channels of linears by a scale, and multiply their weights by it.

    The division costs nothing: it goes into the weight and bias of the norm or layer that makes the channels, where
    these linears alone read them. Linears of one value (query, key and value) share one scale. Besides a layer norm or
    RMS norm in front of linears those places are the values of attention in front of its output projection, and the
    up projection of a gated feed-forward block in front of its down projection. What feeds a residual stream too (the
    norms of BERT) is left alone, unless `insert` divides the inputs of the linears explicitly. Run it before
    `InsertFakeQuant`.

    Args:
        alpha: how much of the difficulty moves into the weights: 0 none, 1 all of it.
        insert: put a division in front of the linears whose scale cannot move anywhere: one element-wise operation
            more in the captured graph, for each value that they read.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        equations 3 and 4.

    Proof:
        Outputs equal those before in float64 within 1e-9; scaled tensors are rounded to the model's dtype, so the
        graph before is run with what gives exactly those.

    Example:
        >>> SmoothActivations(alpha=0.8).recipe()
        {'smooth_activations': {'alpha': 0.8}}
    """

    claim = "outputs equal the outputs before, with the scaled values rounded to the model's dtype"

    alpha: float = 0.5
    insert: bool = False
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse an alpha outside [0, 1]."""
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"SmoothActivations: alpha must be in [0, 1], not {self.alpha}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"SmoothActivations: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Measure the inputs of the linears, and choose the scales."""
        context = context or PassContext()
        sites, skips = usable_sites(graph_module, context)
        inputs = self._inputs(graph_module, sites, context)
        if not sites and not inputs:
            return Plan(skips=tuple(skips))
        watches = {r.value: AbsMax(r.read_dim) for site in sites for r in site.readers}
        watches |= {shared.value.name: AbsMax(-1) for shared in inputs}
        batches = required(context.calibration, "SmoothActivations")
        watch_values(graph_module, batches, watches, max_batches=self.max_batches, what="Measuring activations")
        edits: list[Edit] = []
        weights = Weights(graph_module)
        for site in reversed(sites):  # a weight that one place divides and another reads has its last rows then
            activation = site.per_channel([watches[r.value].largest.cpu() for r in site.readers])
            weight = site.per_channel([weights.columns(r).abs().amax(0).float().cpu() for r in site.readers])
            scale = smoothing_scale(activation, weight, self.alpha)
            if is_near_one(scale):
                skips.append(Skip(target=site.name, reason="nothing to do: it is smooth already"))
                continue
            numbers = {"activation_max": float(activation.max()), "smoothed_max": float((activation / scale).max())}
            numbers |= {"alpha": self.alpha}
            edits += weights.scaled(move_scale(site, scale, f"input of {site.partners} smoothed", numbers, self.name))
        for shared in inputs:
            edits += self._divide(shared, watches[shared.value.name].largest.cpu(), weights)
        return Plan(tuple(edits), tuple(skips))

    def _inputs(self, graph_module: fx.GraphModule, sites: list[Site], context: PassContext) -> list[SharedInput]:
        if not self.insert:
            return []
        taken = {reader.axis.fqn for site in sites for reader in site.readers}
        found = find_inputs(graph_module, taken)
        return [one for one in found if not any(context.skipped_by(fqn) for fqn, _ in one.weights)]

    def _divide(self, shared: SharedInput, activation: torch.Tensor, weights: Weights) -> list[Edit]:
        """Return the edits that divide a value and multiply the weights that read it; none where it is smooth."""
        largest = [weights[fqn].movedim(dim, -1).flatten(0, -2).abs().amax(0) for fqn, dim in shared.weights]
        scale = smoothing_scale(activation, torch.stack(largest).amax(0).float().cpu(), self.alpha)
        if is_near_one(scale):
            return []
        reason = f"input of {', '.join(fqn for fqn, _ in shared.weights)} divided: no norm or layer can take the scale"
        numbers = {"activation_max": float(activation.max()), "smoothed_max": float((activation / scale).max())}
        numbers |= {"alpha": self.alpha, "scale_min": float(scale.min()), "scale_max": float(scale.max())}
        users = tuple(user.name for user in shared.users)
        divided = ScaleValue(
            target=shared.value.name, reason=reason, numbers=numbers, users=users, scale=scale.clone(), divide=True
        )
        scaled = [
            ScaleChannels(target=fqn, reason=reason, numbers=numbers, dim=dim, scale=scale.clone(), by=self.name)
            for fqn, dim in shared.weights
        ]
        return [divided, *weights.scaled(scaled)]

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the tensors that give exactly the stored ones once they are scaled."""
        return unscaled(graph_module, plan.edits)
