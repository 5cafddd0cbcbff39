"""RemoveIndices: physically remove indices of a dimension of a parameter or buffer."""

from __future__ import annotations

from torch import nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["RemoveIndices"]


class RemoveIndices(Edit):
    """Remove indices of one dimension of a parameter or buffer; what depends on its size is made to fit.

    All `RemoveIndices` of a plan are applied together: a plan that removes an output channel without the input
    channel that reads it is refused.

    Args:
        dim: the dimension.
        indices: what leaves, ascending.
        size: of the dimension before, to tell whether the module is the one that the plan was made for.
    """

    dim: int
    indices: tuple[int, ...]
    size: int

    def check(self) -> None:
        """Refuse indices that are not ascending, out of range, or all there are."""
        if self.dim < 0 or self.size < 1:
            raise PlanError(f"{self.target}: dim must be >= 0 and size >= 1, not {self.dim} and {self.size}")
        if list(self.indices) != sorted(set(self.indices)) or not self.indices:
            raise PlanError(f"{self.target}: indices must be ascending, each once, and at least one")
        if self.indices[0] < 0 or self.indices[-1] >= self.size:
            raise PlanError(
                f"{self.target}: indices {self.indices[0]}..{self.indices[-1]} are outside 0..{self.size - 1}"
            )
        if len(self.indices) == self.size:
            raise PlanError(f"{self.target}: nothing of dimension {self.dim} would stay")

    def validate(self, module: nn.Module) -> None:
        """Refuse a module without that tensor, or with another size of it."""
        shape = tuple(get_tensor(module, self.target).shape)
        if self.dim >= len(shape) or shape[self.dim] != self.size:
            raise PlanError(
                f"{self.target} has shape {shape}, but the plan was made for {self.size} in dimension {self.dim}"
            )
