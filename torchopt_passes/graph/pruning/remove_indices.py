"""RemoveIndices: physically remove indices of a dimension of a parameter or buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.pruning.optimizer_state import exchange_parameters, slice_optimizer
from torchopt_passes.graph.pruning.slicing import Removal
from torchopt_passes.graph.pruning.source import remove_from_source
from torchopt_passes.graph.tensors import aliases, get_tensor

__all__ = ["RemoveIndices"]


class RemoveIndices(Edit):
    """Remove indices of one dimension of a parameter or buffer; what depends on its size is made to fit.

    All `RemoveIndices` of a plan are applied together: a plan that removes an output channel without the input
    channel that reads it is refused.

    The user's own module keeps its parameter objects. One that took smaller tensors over from a captured graph
    (`release`) has only its attributes made to fit.

    Args:
        dim: the dimension.
        indices: what leaves, ascending.
        size: of the dimension before, to tell whether the module is the one that the plan was made for.
    """

    writes_values = False

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
        sizes = {self.size} if isinstance(module, fx.GraphModule) else {self.size, self.size - len(self.indices)}
        if self.dim >= len(shape) or shape[self.dim] not in sizes:
            raise PlanError(
                f"{self.target} has shape {shape}, but the plan was made for {self.size} in dimension {self.dim}"
            )

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Any]) -> None:
        """Remove everything that leaves at once, from a captured graph or from the source module."""
        if isinstance(module, fx.GraphModule):
            from torchopt_passes.graph.surgery import remove_indices

            removals(module, edits)
            remove_indices(module, {(edit.target, edit.dim): edit.indices for edit in edits})
        else:
            remove_from_source(module, removals(module, edits))

    @classmethod
    def apply_to_optimizer(
        cls, module: nn.Module, edits: Sequence[Any], optimizer: Any, before: Mapping[str, nn.Parameter]
    ) -> None:
        """Cut the optimizer's state of each parameter as the parameter was cut; a new parameter takes its place."""
        cut = {fqn: removal for fqn, removal in removals(module, edits).items() if fqn in before}
        now = {fqn: module.get_parameter(fqn) for fqn in cut}
        exchange_parameters(optimizer, {before[fqn]: parameter for fqn, parameter in now.items()})
        slice_optimizer(optimizer, {now[fqn]: removal for fqn, removal in cut.items()})


def removals(module: nn.Module, edits: Sequence[RemoveIndices]) -> dict[str, Removal]:
    """Return what leaves each tensor, by its first fqn, with the shape that it had before the edits.

    Raises:
        PlanError: two edits cut the same dimension of a tensor.
    """
    first = aliases(module)
    indices: dict[str, dict[int, tuple[int, ...]]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for edit in edits:
        fqn = first.get(edit.target, edit.target)
        dims = indices.setdefault(fqn, {})
        if edit.dim in dims:
            raise PlanError(f"two edits cut dimension {edit.dim} of {edit.target}")
        dims[edit.dim] = edit.indices
        sizes.setdefault(fqn, {})[edit.dim] = edit.size
    found: dict[str, Removal] = {}
    for fqn, dims in indices.items():
        shape = tuple(sizes[fqn].get(dim, size) for dim, size in enumerate(get_tensor(module, fqn).shape))
        found[fqn] = Removal(shape, dims)
    return found
