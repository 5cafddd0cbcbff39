"""StoreCodebook: the edit that replaces a weight by packed indices and a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.packing import packed_size
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.quantization.codebook_weight import (
    CodebookWeight,
    Layout,
    decode,
    store_in_graph,
    store_in_module,
    stored_parameters,
)
from torchopt_passes.graph.quantization.pretrained_codebooks import note_codebook
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["StoreCodebook"]


class StoreCodebook(Edit):
    """Store a weight as packed indices and a codebook, and compute it from them.

    Args:
        shape: of the weight.
        bits: of an index.
        codebook: levels of each group, (groups, levels), in the weight's dtype, without the zero of `keep_zero`.
        indices: packed, uint8.
        keep_zero: index 0 is zero and stays zero in training.
        channel_dim: the dimension whose indices have levels of their own; None for one group.
        group_size: so many values of a channel are a group; 0 for all.
        trainable: whether the levels train (those of a logarithmic grid would leave it).
        outliers: flat positions of weights that are kept as they are, int32; None for none.
        outlier_values: their values.
    """

    shape: tuple[int, ...]
    bits: int
    codebook: torch.Tensor
    indices: torch.Tensor
    keep_zero: bool = False
    channel_dim: int | None = None
    group_size: int = 0
    trainable: bool = True
    outliers: torch.Tensor | None = None
    outlier_values: torch.Tensor | None = None

    @property
    def layout(self) -> Layout:
        """How the weight lies in groups."""
        return Layout(self.shape, self.channel_dim, self.group_size)

    def check(self) -> None:
        """Refuse tensors that do not belong together: an index past the codebook would read other memory."""
        layout = self.layout
        levels = self.codebook.shape[-1] + self.keep_zero
        if not 1 <= self.bits <= 8 or not 1 <= levels <= 2**self.bits:
            raise PlanError(f"{self.target}: {levels} levels do not fit into {self.bits} bits")
        if tuple(self.codebook.shape[:-1]) != (layout.groups,) or not self.codebook.is_floating_point():
            raise PlanError(f"{self.target}: the codebook must be floating, ({layout.groups}, levels)")
        size = packed_size(layout.groups * layout.size, self.bits)
        if self.indices.dtype is not torch.uint8 or tuple(self.indices.shape) != (size,):
            raise PlanError(f"{self.target}: the indices must be {size} bytes")
        if (self.outliers is None) != (self.outlier_values is None):
            raise PlanError(f"{self.target}: outliers and outlier_values come together")
        count = math.prod(self.shape)
        if self.outliers is not None and self.outlier_values is not None:
            inside = self.outliers.numel() == 0 or 0 <= int(self.outliers.min()) <= int(self.outliers.max()) < count
            if self.outliers.dtype is not torch.int32 or self.outliers.shape != self.outlier_values.shape or not inside:
                raise PlanError(f"{self.target}: outliers must be int32 positions below {count}, with a value each")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that parameter, or with another shape or dtype of it."""
        weight = get_tensor(module, self.target)
        if tuple(weight.shape) != self.shape or weight.dtype != self.codebook.dtype:
            raise PlanError(
                f"{self.target} is {weight.dtype} of shape {tuple(weight.shape)}, "
                f"its codebook {self.codebook.dtype} for {self.shape}"
            )

    def apply(self, module: nn.Module) -> None:
        """Replace the parameter, under every name it has."""
        parameter = get_tensor(module, self.target)
        weight = CodebookWeight(
            self.indices.to(parameter.device, copy=True),
            layout=self.layout,
            bits=self.bits,
            levels=self.codebook.shape[1],
            keep_zero=self.keep_zero,
            outliers=None if self.outliers is None else self.outliers.to(parameter.device, copy=True),
        )
        if isinstance(module, fx.GraphModule):
            store_in_graph(module, self.target, weight, self._floats())
        else:
            store_in_module(module, self.target, weight, self._floats())
            note_codebook(
                module,
                self.target,
                self.layout,
                bits=self.bits,
                levels=self.codebook.shape[1],
                keep_zero=self.keep_zero,
                outliers=0 if self.outliers is None else len(self.outliers),
            )
        if not self.trainable:
            module.get_parameter(stored_parameters(self.target)[0]).requires_grad_(False)

    @classmethod
    def apply_to_optimizer(
        cls, module: nn.Module, edits: Sequence[Any], optimizer: Any, before: Mapping[str, nn.Parameter]
    ) -> None:
        """Put the codebooks in the place of the weights, without state."""
        new = dict(module.named_parameters())
        for edit in edits:
            old = before[edit.target]
            present = [new[name] for name in stored_parameters(edit.target) if name in new]
            for group in optimizer.param_groups:
                if any(parameter is old for parameter in group["params"]):
                    group["params"] = [p for p in group["params"] if p is not old] + present
            optimizer.state.pop(old, None)

    def snapped(self) -> torch.Tensor:
        """Return the weight as it will be computed."""
        return decode(
            self.codebook,
            self.indices,
            self.outlier_values,
            self.outliers,
            layout=self.layout,
            bits=self.bits,
            keep_zero=self.keep_zero,
        )

    def size(self) -> int:
        """Return the bytes that the stored form takes."""
        return sum(t.nbytes for t in (*self._floats(), self.indices, self.outliers) if t is not None)

    def _floats(self) -> list[torch.Tensor]:
        return [self.codebook] if self.outlier_values is None else [self.codebook, self.outlier_values]
