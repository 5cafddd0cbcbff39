"""PruneWeights: set the least important weights to zero, by threshold, target sparsity or pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx, nn

from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional import masks, patterns
from torchopt_passes.functional.patterns import parse_pattern
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.tensors import aliases, check_patterns, get_tensor, matching_pattern
from torchopt_passes.graph.weights import input_dim, matrix_weights

__all__ = ["MaskWeights", "PruneWeights"]


class MaskWeights(Edit):
    """Set the weights outside a mask to zero, in place.

    Args:
        mask: bool, shape of the parameter; True keeps the weight.
    """

    mask: torch.Tensor

    def check(self) -> None:
        """Refuse a mask that is not boolean."""
        if self.mask.dtype is not torch.bool:
            raise PlanError(f"the mask of {self.target} must be bool, not {self.mask.dtype}")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that parameter, or with another shape of it."""
        shape = tuple(get_tensor(module, self.target).shape)
        if shape != tuple(self.mask.shape):
            raise PlanError(f"{self.target} has shape {shape}, its mask {tuple(self.mask.shape)}")

    def apply(self, module: nn.Module) -> None:
        """Zero the weights; the parameter object, its gradient and requires_grad stay."""
        weight = get_tensor(module, self.target)
        with torch.no_grad():
            weight.masked_fill_(~self.mask.to(weight.device), 0)


class PruneWeights(GraphPass):
    """Zero weights of the model's linear, convolution and matrix-product operations.

    The weights are found on the graph, so that subclasses of ``nn.Conv2d``, GPT-2's ``Conv1D`` and parameters
    used directly count too; biases, normalisations and embeddings are left.

    Args:
        sparsity: share of weights to remove, 0 <= sparsity < 1; of each tensor or of all together (`scope`).
        threshold: remove weights with ``|w| <= threshold`` instead.
        count: remove so many weights, blocks or slices instead.
        scope: ``"tensor"`` reaches `sparsity` in each tensor; ``"global"`` ranks all weights together.
        method: ``"magnitude"`` removes the smallest ``|w|``, or the smallest ``scores`` of the context; ``"random"``
            removes at random (seed of the context); ``"lp:P"`` removes the slices with the smallest L-P norm, P any
            number, ``inf`` or ``-inf``.
        pattern: ``""`` for single weights; ``"N:M"`` keeps the N largest of every M along the input dimension
            (``"2:4"`` runs on sparse tensor cores); ``"block RxC"`` removes whole R x C blocks of the matrix
            (out, in * kernel) by their mean magnitude; ``"dim D"`` removes whole slices along dimension D of the weight
            (filters for 0), by their mean magnitude, an L-P norm or at random. They stay where they are, as zeros;
            `PruneChannels` takes channels away for good.
        include: globs on fqns; empty for every weight found.

    Every method of ``torch.nn.utils.prune`` has its counterpart here (docs/deployment.md), which masks the same weights
    but for three things. Halves are rounded up, not to even: 0.5 of 5 removes 3 here and 2 there, of 7 it removes
    4 in both (`count` says it exactly). Equal scores go in the order of memory, not in that of ``torch.topk``, which
    differs by device. And `sparsity` is a share of all weights, zeros included, so that a second run finds nothing to
    do: torch's second ``amount=b`` after ``amount=a`` is ``sparsity=1 - (1 - a) * (1 - b)``.

    Math:
        w' = m * w, m in {0, 1}; for a tensor of n weights exactly the number of `functional.masks` is removed.

    Source:
        Han et al. 2015, "Learning both Weights and Connections", section 3 (magnitude); Mishra et al. 2021,
        "Accelerating Sparse Deep Neural Networks", section 3 (2:4).

    Proof:
        The pruned graph equals the graph before with masked weights, in float64 within 1e-9.

    Example:
        >>> PruneWeights(sparsity=0.5, scope="global")
        PruneWeights(sparsity=0.5, threshold=None, scope='global', method='magnitude', pattern='', include=(),
            count=None)
    """

    claim = "outputs equal the model before with its weights masked"

    sparsity: float | None = None
    threshold: float | None = None
    scope: Literal["tensor", "global"] = "tensor"
    method: str = "magnitude"
    pattern: str = ""
    include: tuple[str, ...] = ()
    count: int | None = None

    def check(self) -> None:
        """Refuse options that contradict each other."""
        chosen = [self.sparsity is not None, self.threshold is not None, self.count is not None, ":" in self.pattern]
        if sum(chosen) != 1:
            raise ConfigError("PruneWeights takes exactly one of sparsity=, threshold=, count=, or an N:M pattern")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"PruneWeights: sparsity must be in [0, 1), not {self.sparsity}")
        if self.threshold is not None and self.threshold < 0:
            raise ConfigError(f"PruneWeights: threshold must be >= 0, not {self.threshold}")
        if self.count is not None and self.count < 0:
            raise ConfigError(f"PruneWeights: count must be >= 0, not {self.count}")
        kind, order = parse_pattern(self.pattern)[0], parse_method(self.method)[1]
        if order is not None and kind != "dim":
            raise ConfigError(f'PruneWeights: {self.method!r} ranks whole slices: it needs pattern="dim D"')
        if self.pattern and (self.scope == "global" or self.threshold is not None):
            raise ConfigError("PruneWeights: a pattern works on each tensor, with sparsity= or count=")
        if kind in ("n:m", "block") and self.method == "random":
            raise ConfigError(f"PruneWeights: pattern {self.pattern!r} is by magnitude")
        if self.threshold is not None and (self.scope == "global" or self.method == "random"):
            raise ConfigError("PruneWeights: threshold= is by magnitude and has no scope")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the masks; see the class."""
        context = context or PassContext()
        check_patterns(graph_module, self.include, "include")
        chosen, skips = self._choose(graph_module, context)
        found = self._masks(graph_module, ranked_by(chosen, context.scores), skips, context.seed)
        edits: list[Edit] = []
        for fqn, mask in found.items():
            weight = chosen[fqn]
            removed = int((~mask).sum())
            if bool((weight[~mask] == 0).all()):
                skips.append(Skip(target=fqn, reason="nothing to do: these weights are zero already"))
                continue
            numbers = {"removed": float(removed), "sparsity": removed / mask.numel()}
            edits.append(MaskWeights(target=fqn, reason=self._reason(), numbers=numbers, mask=mask))
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return the masked weights, multiplied, under every name a tied one has."""
        masked = {
            edit.target: get_tensor(graph_module, edit.target).detach() * edit.mask
            for edit in plan.edits
            if isinstance(edit, MaskWeights)
        }
        return {name: masked[first] for name, first in aliases(graph_module).items() if first in masked}

    def _choose(self, graph_module: fx.GraphModule, context: PassContext) -> tuple[dict[str, torch.Tensor], list[Skip]]:
        weights = matrix_weights(graph_module)
        chosen: dict[str, torch.Tensor] = {}
        skips: list[Skip] = []
        for fqn, parameter in graph_module.named_parameters():
            pattern = context.skipped_by(fqn)
            if fqn not in weights:
                masked = fqn.endswith("_orig") or ".parametrizations." in f".{fqn}"
                way = (
                    "; made from others in every forward: remove_torch_prune() makes masks permanent" if masked else ""
                )
                skips.append(Skip(target=fqn, reason=f"not the weight of a matrix operation{way}"))
            elif pattern is not None:
                skips.append(Skip(target=fqn, reason=f"skip pattern {pattern!r}"))
            elif self.include and matching_pattern(fqn, self.include) is None:
                skips.append(Skip(target=fqn, reason="not in include"))
            else:
                chosen[fqn] = parameter.detach()
        return chosen, skips

    def _masks(
        self, graph_module: fx.GraphModule, chosen: dict[str, torch.Tensor], skips: list[Skip], seed: int
    ) -> dict[str, torch.Tensor]:
        if self.scope == "global":
            return self._global_masks(chosen, self._share(sum(w.numel() for w in chosen.values())), seed)
        generator = torch.Generator().manual_seed(seed)
        uses = matrix_weights(graph_module)
        found: dict[str, torch.Tensor] = {}
        for fqn, weight in chosen.items():
            try:
                dims = {input_dim(node, fqn) for node in uses[fqn]}
                found[fqn] = self._mask(weight, dims, generator)
            except ConfigError as error:
                skips.append(Skip(target=fqn, reason=str(error)))
        return found

    def _mask(self, weight: torch.Tensor, dims: set[int | None], generator: torch.Generator) -> torch.Tensor:
        kind, numbers = parse_pattern(self.pattern)
        if kind == "n:m":
            if len(dims) != 1 or None in dims:
                raise ConfigError("its uses do not agree on one input dimension for N:M")
            return patterns.n_m_mask(weight, *numbers, dim=dims.pop() or 0)
        if self.threshold is not None:
            return masks.threshold_mask(weight, self.threshold)
        if kind == "block":
            blocks = weight.numel() // (numbers[0] * numbers[1])
            return patterns.block_mask(weight, (numbers[0], numbers[1]), self._share(blocks))
        if kind == "dim":
            return self._slices(weight, numbers[0], generator)
        share = self._share(weight.numel())
        if self.method == "random":
            return masks.random_mask(weight, share, generator)
        return masks.magnitude_mask(weight, share)

    def _slices(self, weight: torch.Tensor, dim: int, generator: torch.Generator) -> torch.Tensor:
        if not -weight.ndim <= dim < weight.ndim:
            raise ConfigError(f"pattern {self.pattern!r} does not fit a tensor of shape {tuple(weight.shape)}")
        share = self._share(weight.shape[dim])
        if self.method == "random":
            kept = masks.random_mask(weight.new_empty(weight.shape[dim]), share, generator)
            return masks.expand_slices(kept, weight, dim)
        order = parse_method(self.method)[1]
        return masks.slice_mask(weight, dim, share, 1.0 if order is None else order)

    def _share(self, n: int) -> float:
        """Return the share of n candidates to remove, whose `removed_count` is the count where that is given."""
        if self.count is None:
            return self.sparsity or 0.0
        if self.count > n:
            raise ConfigError(f"count={self.count} is more than the {n} there are")
        return self.count / max(n, 1)

    def _global_masks(self, chosen: dict[str, torch.Tensor], sparsity: float, seed: int) -> dict[str, torch.Tensor]:
        if self.method == "magnitude":
            return masks.global_magnitude_masks(chosen, sparsity)
        generator = torch.Generator().manual_seed(seed)
        flat = torch.cat([weight.flatten() for weight in chosen.values()]) if chosen else torch.empty(0)
        parts = masks.random_mask(flat, sparsity, generator).split([w.numel() for w in chosen.values()])
        return {fqn: part.view(w.shape) for (fqn, w), part in zip(chosen.items(), parts, strict=True)}

    def _reason(self) -> str:
        what = {"magnitude": "smallest magnitudes", "random": "random weights"}.get(self.method, "smallest norms")
        if self.pattern:
            return f"{what} in pattern {self.pattern!r}"
        if self.threshold is not None:
            return f"|w| <= {self.threshold:g}"
        where = "of the tensor" if self.scope == "tensor" else "of all weights together"
        return f"{what}, {f'{self.sparsity:.1%}' if self.count is None else self.count} {where}"


def ranked_by(weights: Mapping[str, torch.Tensor], scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what ranks each weight: its score where the user gave one, else the weight itself.

    Raises:
        ConfigError: a score is of no weight that is pruned, or of another shape.
    """
    for fqn, score in scores.items():
        if fqn not in weights:
            raise ConfigError(f"scores of {fqn!r}, which is not pruned; pruned are {sorted(weights)}")
        if score.shape != weights[fqn].shape:
            raise ConfigError(f"scores of {fqn} have shape {tuple(score.shape)}, it has {tuple(weights[fqn].shape)}")
    return {fqn: scores[fqn].detach() if fqn in scores else weight for fqn, weight in weights.items()}


def parse_method(method: str) -> tuple[Literal["magnitude", "random", "lp"], float | None]:
    """Return what ranks, and the order of a norm.

    Raises:
        ConfigError: the text is no method.

    Example:
        >>> parse_method("random"), parse_method("lp:2"), parse_method("lp:-inf")
        (('random', None), ('lp', 2.0), ('lp', -inf))
    """
    if method in ("magnitude", "random"):
        return method, None
    name, _, order = method.partition(":")
    try:
        if name == "lp" and (value := float(order)) == value:
            return "lp", value
    except ValueError:
        pass
    raise ConfigError(f'method must be "magnitude", "random" or "lp:P" with a number P, not {method!r}')
