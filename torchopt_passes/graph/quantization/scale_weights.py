"""ScaleWeights: let the weights of salient channels grow before they are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.equalization import activation_scale
from torchopt_passes.functional.groupwise import fit_range
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.layer_inputs import SecondMoment, required, several_times, watch_values
from torchopt_passes.graph.quantization.rescale import SCALED_BY, Weights, move_scale, unscaled, usable_sites
from torchopt_passes.graph.quantization.scale_pairs import Reader, Site
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["ScaleWeights"]

_AT_ONCE = 1 << 26  # elements of second moments that are held at a time: half a gigabyte


class ScaleWeights(GraphPass):
    """Activation-aware scaling: multiply the weights of channels with large inputs before they are rounded.

    A weight that is scaled up by s before it is rounded, and whose input is divided by s, has a smaller error in the
    output where its input is large. For each place where the division can go into what makes the channels (see
    `SmoothActivations`) the exponent of s = mean|x|^alpha is the one of a grid with the least error in the outputs of
    the linears there, measured exactly over the data by the second moment of their inputs. Run it before the weights
    are rounded, with the same width and groups.

    Args:
        bits: width of the integers that the weights will be rounded to.
        group_size: input channels with one step; 0 takes all of a row.
        symmetric: whether the zero point is 0.
        grid: number of exponents between 0 and 1 that are tried.
        min_gain: share of the error by which it must fall, else the place is left alone.
        max_batches: at most so many batches of the context's `calibration`; None takes all.

    Source:
        Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", equations 4
        and 5.

    Proof:
        Outputs equal those before in float64 within 1e-9; scaled tensors are rounded to the model's dtype, so the
        graph before is run with what gives exactly those.

    Example:
        >>> ScaleWeights(bits=4, group_size=64).recipe()
        {'scale_weights': {'group_size': 64}}
    """

    claim = "outputs equal the outputs before, with the scaled values rounded to the model's dtype"

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    grid: int = 20
    min_gain: float = 0.01
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse widths and sizes that are none."""
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"ScaleWeights: bits must be 2 to 8, not {self.bits}")
        if self.group_size < 0 or self.grid < 1 or not 0.0 <= self.min_gain < 1.0:
            raise ConfigError("ScaleWeights: group_size >= 0, grid >= 1 and 0 <= min_gain < 1")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"ScaleWeights: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Search the exponent of each place."""
        context = context or PassContext()
        found, skips = usable_sites(graph_module, context)
        done = {str(n.target) for n in graph_module.graph.nodes if n.meta.get(SCALED_BY) == self.name}
        sites: list[Site] = []
        for site in found:
            reason = self._why_not(graph_module, site, done)
            if reason:
                skips.append(Skip(target=site.name, reason=reason))
            else:
                sites.append(site)
        edits: list[Edit] = []
        weights = Weights(graph_module)
        parts = list(_parts(sites[::-1]))  # a weight that one place divides and another reads has its last rows then
        for part in parts:
            batches = (several_times if len(parts) > 1 else required)(context.calibration, "ScaleWeights")
            moments = {r.value: SecondMoment(r.read_dim) for site in part for r in site.readers}
            watch_values(graph_module, batches, moments, max_batches=self.max_batches, what="Measuring inputs")
            for site in part:
                alpha, scale, before, after = self._search(weights, site, moments)
                if after > before * (1.0 - self.min_gain) or alpha == 0.0:
                    gain = 0.0 if before == 0.0 else 1.0 - after / before
                    skips.append(Skip(target=site.name, reason=f"nothing to do: the best scale gains {gain:.1%}"))
                    continue
                numbers = {"alpha": alpha, "error_before": before, "error_after": after}
                reason = f"input of {site.partners} scaled by mean|x|^{alpha:g}"
                edits += weights.scaled(move_scale(site, scale, reason, numbers, self.name))
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the tensors that give exactly the stored ones once they are scaled."""
        return unscaled(graph_module, plan.edits)

    def _why_not(self, graph_module: fx.GraphModule, site: Site, done: set[str]) -> str:
        for reader in site.readers:
            if get_tensor(graph_module, reader.axis.fqn).ndim != 2:
                return f"{reader.node} is a convolution: weights are scaled for linears alone"
            if reader.axis.fqn in done:
                return "nothing to do: scaled already"
            if self.group_size and len(reader.index) % self.group_size:
                return f"{len(reader.index)} input channels of {reader.axis.fqn} are no groups of {self.group_size}"
        return ""

    def _search(
        self, current: Weights, site: Site, moments: Mapping[str, SecondMoment]
    ) -> tuple[float, torch.Tensor, float, float]:
        """Return the best exponent, its scale, and the relative error of the outputs without and with it."""
        mean = site.per_channel([moments[r.value].magnitude.mean.cpu() for r in site.readers])
        weights = [current.columns(r).float() for r in site.readers]
        matrices = [moments[r.value].matrix.to(w.device) for r, w in zip(site.readers, weights, strict=True)]
        total = sum(_energy(w.double(), h) for w, h in zip(weights, matrices, strict=True)) or 1.0
        results: list[tuple[float, float, torch.Tensor]] = []
        for step in range(self.grid + 1):
            alpha = step / self.grid
            scale = activation_scale(mean, alpha)
            error = sum(
                _energy(self._error(w, reader, scale), h)
                for w, h, reader in zip(weights, matrices, site.readers, strict=True)
            )
            results.append((error / total, alpha, scale))
        error, alpha, scale = min(results, key=lambda result: result[:2])
        return alpha, scale, results[0][0], error

    def _error(self, weight: torch.Tensor, reader: Reader, scale: torch.Tensor) -> torch.Tensor:
        factor = torch.where(reader.index < 0, 1.0, scale[reader.index]).to(weight)
        scaled = weight * factor
        grid = fit_range(scaled, self.bits, self.group_size or scaled.shape[1], symmetric=self.symmetric)
        return (grid.round(scaled) / factor - weight).double()


def _energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Return the sum of squares of the outputs of a weight: tr(W H W^T) with H the sum of x x^T."""
    return float(((weight @ moment) * weight).sum())


def _parts(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Yield the places in parts whose second moments fit into memory together."""
    part: list[Site] = []
    held = 0
    for site in sites:
        size = sum({r.value: len(r.index) ** 2 for r in site.readers}.values())
        if part and held + size > _AT_ONCE:
            yield part
            part, held = [], 0
        part.append(site)
        held += size
    if part:
        yield part
