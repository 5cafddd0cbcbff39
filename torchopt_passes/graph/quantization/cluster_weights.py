"""ClusterWeights: store weights as a few levels each, by k-means or on a logarithmic grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import fx, nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import codebooks
from torchopt_passes.functional.kmeans import kmeans
from torchopt_passes.functional.packing import pack
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.codebook_weight import Layout
from torchopt_passes.graph.quantization.input_moments import EMBEDDING_OPS, input_moments
from torchopt_passes.graph.quantization.round_codebooks import LayerRounder, by_layers
from torchopt_passes.graph.quantization.store_codebook import StoreCodebook
from torchopt_passes.graph.tensors import aliases, check_patterns, matching_pattern
from torchopt_passes.graph.verify import sqnr
from torchopt_passes.graph.weights import MATRIX_OPS, input_dim, weight_uses
from torchopt_passes.progress import track

__all__ = ["ClusterWeights"]

_BASES = {"power_of_two": 2.0, "log": math.sqrt(2.0)}
_DAMPING = 0.01  # of the mean importance, added to each: what no batch has touched keeps a say


class ClusterWeights(GraphPass):
    """Snap weights to a few levels each and store them as such: packed indices of `bits` bits, and a codebook.

    Weights of linears, convolutions, matrix products and embeddings are found on the graph. The stored form is the
    model: ``state_dict``, safetensors and memory hold no float copy of the weight, each forward computes it, and
    training moves the codebook (a level gets the summed gradient of its cluster), so a fine-tuned model stays
    clustered. A weight that has zeros keeps them: zero is a level of its own that nothing moves, so pruned stays
    pruned. See `codebook_weight` for the names in the state dict.

    Args:
        bits: 1 to 8; 2^bits levels.
        granularity: levels for the whole ``"tensor"``, for each output ``"channel"`` (row of an embedding), or for
            each ``"group"`` of `group_size` weights of a channel.
        group_size: of ``granularity="group"``.
        grid: ``"kmeans"``; ``"power_of_two"``: 0 and +- 2^e (a product is a shift); ``"log"``: 0 and +- sqrt(2)^e. The
            levels of these two do not train.
        weighted: what an error of a weight costs: ``"none"``: the same everywhere; ``"hessian"``: the diagonal of the
            Hessian of the layer's output error, the mean square of the inputs that this very weight multiplies;
            ``"activation"``: the mean square of its input channel. The two differ for convolutions alone, where
            padding lets the border of a kernel see less. Both need the context's `calibration`.
        fit: which level a weight gets: the ``"nearest"``, or by ``"gptq"`` (linears and convolutions): columns make up
            for each other's errors in the layer's output, on the context's `calibration`, each layer on what the
            snapped layers before it give. The levels are the same; zeros and outliers stay.
        outliers: share of the weights, the largest in magnitude, that are kept as they are (float, and int32 position).
        overrides: glob on fqns -> bits, the first that matches.
        min_numel: smaller tensors are left.

    Source:
        Han et al. 2016, "Deep compression", section 3 (shared weights, summed gradients); Choi et al. 2017, "Towards
        the limit of network quantization", section 3.3 (Hessian-weighted k-means); Kim et al. 2024, "SqueezeLLM",
        section 4.2 (dense and sparse); Miyashita et al. 2016 (logarithmic grids); Frantar et al. 2022, "GPTQ".

    Proof:
        The graph equals the graph before with each weight replaced by its snapped floats, in float64 within 1e-9.

    Example:
        >>> ClusterWeights(bits=3, overrides={"head": 6}).recipe()
        {'cluster_weights': {'bits': 3, 'overrides': {'head': 6}}}
    """

    claim = "outputs equal the model before with its weights snapped to their levels"

    bits: int = 4
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    group_size: int = 128
    grid: Literal["kmeans", "power_of_two", "log"] = "kmeans"
    weighted: Literal["none", "activation", "hessian"] = "none"
    fit: Literal["nearest", "gptq"] = "nearest"
    outliers: float = 0.0
    overrides: dict[str, int] | None = None
    min_numel: int = 1024

    def check(self) -> None:
        """Refuse widths and shares out of range."""
        lowest = 1 if self.grid == "kmeans" else 2
        for what, bits in [("bits", self.bits), *(self.overrides or {}).items()]:
            if not lowest <= bits <= 8:
                raise ConfigError(f"ClusterWeights: {what}: {self.grid} has {lowest} to 8 bits, not {bits}")
        if not 0.0 <= self.outliers <= 0.5:
            raise ConfigError(f"ClusterWeights: outliers is a share, 0 to 0.5, not {self.outliers}")
        if self.group_size < 2:
            raise ConfigError(f"ClusterWeights: group_size must be >= 2, not {self.group_size}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the levels of each weight; see the class."""
        context = context or PassContext()
        check_patterns(graph_module, tuple(self.overrides or {}), "overrides")
        uses: dict[str, list[tuple[fx.Node, int]]] = {}
        for fqn, node, position in weight_uses(graph_module, MATRIX_OPS | EMBEDDING_OPS):
            uses.setdefault(fqn, []).append((node, position))
        skips: list[Skip] = []
        chosen: dict[str, nn.Parameter] = {}
        for fqn, parameter in graph_module.named_parameters():
            reason = self._why_left(graph_module, fqn, parameter, fqn in uses, context)
            if reason:
                skips.append(Skip(target=fqn, reason=reason))
            else:
                chosen[fqn] = parameter
        moments = input_moments(graph_module, context.calibration) if chosen and self.weighted != "none" else {}

        def make(fqn: str, rounder: LayerRounder | None = None) -> StoreCodebook | Skip:
            return self._edit(fqn, chosen[fqn].detach(), uses[fqn], moments.get(fqn), rounder, context.seed)

        if self.fit == "gptq" and chosen:
            found = by_layers(graph_module, list(chosen), context.calibration, make)
        else:
            found = [make(fqn) for fqn in track(chosen, "Clustering", total=len(chosen))]
        edits = tuple(one for one in found if isinstance(one, StoreCodebook))
        return Plan(edits, (*skips, *(one for one in found if isinstance(one, Skip))))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the snapped weights under every name a tied one has."""
        snapped = {edit.target: edit.snapped() for edit in plan.edits if isinstance(edit, StoreCodebook)}
        return {name: snapped[first] for name, first in aliases(graph_module).items() if first in snapped}

    def _why_left(
        self, graph_module: fx.GraphModule, fqn: str, parameter: nn.Parameter, used: bool, context: PassContext
    ) -> str:
        pattern = context.skipped_by(fqn)
        path, _, name = fqn.rpartition(".")
        if name in ("original0", "original1") and f"{path}.0.indices" in dict(graph_module.named_buffers()):
            return "nothing to do: the codebook of a clustered weight"
        if not used:
            return "not the weight of a matrix operation or an embedding"
        if pattern is not None:
            return f"skip pattern {pattern!r}"
        if parameter.numel() < self.min_numel:
            return f"small: {parameter.numel()} weights, fewer than min_numel={self.min_numel}"
        if not parameter.is_floating_point() or not bool(torch.isfinite(parameter).all()):
            return "not all of its weights are finite numbers"
        return ""

    def _edit(
        self,
        fqn: str,
        weight: torch.Tensor,
        uses: Sequence[tuple[fx.Node, int]],
        moments: torch.Tensor | None,
        rounder: LayerRounder | None,
        seed: int,
    ) -> StoreCodebook | Skip:
        glob = matching_pattern(fqn, tuple(self.overrides or {}))
        bits = self.bits if glob is None else (self.overrides or {})[glob]
        channel_dim = None if self.granularity == "tensor" else _channel_dim(fqn, weight, uses)
        if self.granularity != "tensor" and channel_dim is None:
            return Skip(target=fqn, reason="its uses do not agree on one output dimension: take granularity='tensor'")
        layout = Layout(tuple(weight.shape), channel_dim)
        if self.granularity == "group" and self.group_size < layout.size:
            layout = Layout(tuple(weight.shape), channel_dim, self.group_size)
        outliers = codebooks.largest(weight, self.outliers) if round(self.outliers * weight.numel()) else None
        importance = self._importance(weight, uses, moments, fqn)
        edit = self._fit(fqn, weight, layout, bits, importance, outliers, seed)
        if edit.size() >= weight.nbytes:
            left = f"it would not shrink: {weight.nbytes} bytes as floats, {edit.size()} as {layout.groups} codebooks"
            return Skip(target=fqn, reason=left)
        edit = edit if rounder is None else rounder.round(edit, weight)
        edit.numbers.update(_numbers(edit, weight))
        return edit

    def _importance(
        self,
        weight: torch.Tensor,
        uses: Sequence[tuple[fx.Node, int]],
        moments: torch.Tensor | None,
        fqn: str,
    ) -> torch.Tensor | None:
        if moments is None:
            return None
        if self.weighted == "activation":
            dims = {input_dim(node, fqn) for node, _ in uses if node.target not in EMBEDDING_OPS}
            dim = dims.pop() if len(dims) == 1 else None
            if dim is not None:
                others = [d for d in range(weight.ndim) if d != dim]
                moments = moments.mean(others, keepdim=True).expand_as(weight)
        mean = moments.mean()
        return moments / mean + _DAMPING if bool(mean > 0) else None

    def _fit(
        self,
        fqn: str,
        weight: torch.Tensor,
        layout: Layout,
        bits: int,
        importance: torch.Tensor | None,
        outliers: torch.Tensor | None,
        seed: int,
    ) -> StoreCodebook:
        rows = layout.to_rows(weight)
        say = _say(weight, layout, importance, outliers)
        keep_zero = self.grid != "kmeans" or bool((weight == 0).any())
        if self.grid == "kmeans":
            levels = kmeans(rows, 2**bits, importance=say, keep_zero=keep_zero, seed=seed)
        else:
            levels = codebooks.fit_log_levels(rows, bits, _BASES[self.grid], say)
        levels = (codebooks.zero_first(levels) if keep_zero else levels).to(weight.dtype)
        indices = codebooks.nearest(rows, levels)
        return StoreCodebook(
            target=fqn,
            reason=self._reason(layout, bits, keep_zero),
            shape=layout.shape,
            bits=bits,
            codebook=levels[:, int(keep_zero) :].contiguous().cpu(),
            indices=pack(indices, bits).cpu(),
            keep_zero=keep_zero,
            channel_dim=layout.channel_dim,
            group_size=layout.group_size,
            trainable=self.grid == "kmeans",
            outliers=None if outliers is None else outliers.cpu(),
            outlier_values=None if outliers is None else weight.reshape(-1)[outliers.long()].cpu(),
        )

    def _reason(self, layout: Layout, bits: int, keep_zero: bool) -> str:
        where = {"tensor": "of the tensor", "channel": "of each channel"}.get(
            self.granularity, f"of each {layout.size} weights"
        )
        what = "k-means levels" if self.grid == "kmeans" else f"levels of the {self.grid} grid"
        how = "" if self.weighted == "none" else f", weighted by {self.weighted}"
        kept = ", zeros kept" if keep_zero and self.grid == "kmeans" else ""
        aside = f", {self.outliers:.2%} outliers" if self.outliers else ""
        return f"{2**bits} {what} {where}{how}{kept}{aside}"


def _numbers(edit: StoreCodebook, weight: torch.Tensor) -> dict[str, float]:
    numbers = {
        "bits": float(edit.bits),
        "groups": float(edit.layout.groups),
        "bytes_before": float(weight.nbytes),
        "bytes_after": float(edit.size()),
    }
    ratio = sqnr(edit.snapped(), weight.cpu())
    return numbers | ({"sqnr_db": ratio} if math.isfinite(ratio) else {})


def _say(
    weight: torch.Tensor, layout: Layout, importance: torch.Tensor | None, outliers: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the importance of each value in its group: none for outliers and for what fills a group up."""
    if importance is None and outliers is None and not layout.padded:
        return None
    say = torch.ones_like(weight, dtype=torch.float32) if importance is None else importance.float().clone()
    if outliers is not None:
        say = say.reshape(-1).index_fill(0, outliers.long(), 0.0).view(weight.shape)
    rows = layout.to_rows(say)
    if layout.padded:
        real = torch.arange(math.prod(layout.shape), device=weight.device).view(layout.shape)
        positions = layout.to_rows(real)
        copies = torch.nn.functional.pad(positions[:, 1:] == positions[:, :-1], (1, 0))
        rows = rows.masked_fill(copies, 0.0)
    return rows


def _channel_dim(fqn: str, weight: torch.Tensor, uses: Sequence[tuple[fx.Node, int]]) -> int | None:
    """Return the dimension that makes the outputs of every use (the rows of an embedding agree with any)."""
    dims = {input_dim(node, fqn) for node, _ in uses if node.target not in EMBEDDING_OPS}
    if not dims:
        return 0
    inner = dims.pop() if len(dims) == 1 else None
    return None if inner is None or weight.ndim < 2 or inner > 1 else 1 - inner
