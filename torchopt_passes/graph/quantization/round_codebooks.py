"""GPTQ on codebooks: levels are chosen for the least error of the layer's output, not of the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.functional.codebooks import look_up, nearest
from torchopt_passes.functional.gptq import Rounder, gptq, output_error
from torchopt_passes.functional.packing import pack
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.quantization.codebook_weight import Layout
from torchopt_passes.graph.quantization.layer_hessians import layer_hessians
from torchopt_passes.graph.quantization.store_codebook import StoreCodebook
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.graph.quantization.weight_layers import WeightLayer, find_layers
from torchopt_passes.progress import track

__all__ = ["LayerRounder", "by_layers"]


@dataclass(frozen=True)
class LayerRounder:
    """Chooses the levels of a layer's weights column by column, each column's error made up for by those to come.

    Args:
        layer: the layer.
        hessian: of its output error, H = 2 X X^T, shape [groups, columns, columns].

    Source:
        Frantar et al. 2022, "GPTQ", algorithm 1; with a codebook as the grid, van Baalen et al. 2024, "GPTVQ"
        (there for vectors).
    """

    layer: WeightLayer
    hessian: torch.Tensor

    def round(self, edit: StoreCodebook, weight: torch.Tensor) -> StoreCodebook:
        """Return the edit with other indices; zeros of the weight and its outliers stay as they are.

        Args:
            edit: with the nearest level of each value.
            weight: the layer's, in the parameter's shape.

        Returns:
            The edit; its numbers have the squared output error on the calibration data, of nearest levels and of these,
            as a share of the squared output.
        """
        layout, levels = edit.layout, edit.codebook.to(weight.device)
        levels = nn.functional.pad(levels, (1, 0)) if edit.keep_zero else levels
        fixed = weight == 0
        if edit.outliers is not None:
            fixed.view(-1)[edit.outliers.to(weight.device).long()] = True
        indices = nearest(layout.to_rows(self._rounded(weight, levels.float(), layout, fixed)), levels)
        found = replace(edit, indices=pack(indices, edit.bits).cpu(), reason=f"{edit.reason}, GPTQ")
        size = max(self._error(weight), 1e-30)
        errors = [self._error(weight - one.snapped().to(weight.device)) / size for one in (edit, found)]
        return replace(found, numbers={"output_error_nearest": errors[0], "output_error": errors[1]})

    def _rounded(self, weight: torch.Tensor, levels: torch.Tensor, layout: Layout, fixed: torch.Tensor) -> torch.Tensor:
        matrix, keep = self.layer.matrix(weight.float()), self.layer.matrix(fixed)
        rounded = torch.empty_like(matrix)
        for group, part in enumerate(matrix):
            rows = slice(group * len(part), (group + 1) * len(part))
            own = levels.unsqueeze(1)
            if layout.channel_dim is not None:
                own = levels.unflatten(0, (-1, layout.per_channel))[rows]
            rounded[group] = gptq(
                part,
                self.hessian[group],
                _grids(own, layout),
                group_size=layout.group_size or None,
                act_order=True,
                fixed=keep[group],
            )
        return self.layer.weight(rounded, weight)

    def _error(self, difference: torch.Tensor) -> float:
        parts = zip(self.layer.matrix(difference.float()), self.hessian, strict=True)
        return sum(output_error(part, hessian) for part, hessian in parts)


def by_layers(
    graph_module: fx.GraphModule,
    fqns: Sequence[str],
    calibration: Iterable[Any] | None,
    make: Callable[[str, LayerRounder | None], StoreCodebook | Skip],
) -> list[StoreCodebook | Skip]:
    """Make the edit of each weight, those of layers on what the layers before, snapped already, give them.

    Args:
        graph_module: a captured graph; as before afterwards.
        fqns: the weights.
        calibration: batches; all of them are in memory with one layer's activations.
        make: makes the edit, or a skip, of a weight; it gets no rounder where the weight's inputs are no matrix or
            something else reads it too (an embedding with the head tied to it).

    Returns:
        What `make` gave, in the order of `fqns`.

    Raises:
        ConfigError: there is no data.
    """
    found: dict[str, StoreCodebook | Skip] = {}
    with walking(graph_module, calibration, "ClusterWeights(fit='gptq')") as batches:
        walk = Walk(graph_module, batches)
        wanted = set(fqns)
        layers = [layer for layer in find_layers(graph_module, walk.graph) if layer.fqn in wanted and not layer.why_not]

        def put(fqn: str, rounder: LayerRounder | None) -> None:
            found[fqn] = made = make(fqn, rounder)
            if isinstance(made, StoreCodebook):
                walk.set(fqn, made.snapped())

        for fqn in track([f for f in fqns if f not in {layer.fqn for layer in layers}], "Clustering"):
            put(fqn, None)
        for layer, hessian in layer_hessians(walk, layers, "Clustering"):
            put(layer.fqn, LayerRounder(layer, hessian))
    return [found[fqn] for fqn in fqns]


def _grids(tables: torch.Tensor, layout: Layout) -> Callable[[torch.Tensor, torch.Tensor], Rounder]:
    """Return the codebook of each group of columns; `tables` has shape [rows, or 1 for all, groups, levels]."""

    def fit(_columns: torch.Tensor, index: torch.Tensor) -> Rounder:
        table = tables[:, int(index[0]) // layout.size if layout.group_size else 0]

        def to_levels(columns: torch.Tensor) -> torch.Tensor:
            values = columns.reshape(len(table), -1).contiguous()
            return look_up(table, nearest(values, table)).view(columns.shape)

        return to_levels

    return fit
