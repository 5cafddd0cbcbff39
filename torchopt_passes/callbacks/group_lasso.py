"""GroupLasso: whole units become zero while training goes on, and leave at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.penalty import Form, Penalty, check_form, learning_rates
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_blocks import UnitBlocks
from torchopt_passes.callbacks.unit_callback import UnitCallback
from torchopt_passes.functional.penalties import block_shrinkage
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["GroupLasso"]


@dataclass(kw_only=True, eq=False)
class GroupLasso(Penalty, UnitCallback):
    """Make the norm of each unit (channel, head, block) costly, so that those which matter least become zero.

    A unit is all that makes, scales and reads it: its row in the layers that make it, its entries in their norms, its
    column in the layers that read it. The proximal form shrinks each unit after each optimizer step and leaves it
    exactly at zero when it gets there; it may come back while gradients are stronger. The gradient form adds the
    gradient of the penalty: units come near zero, and none is. When training ends, early too, the units that are zero
    leave the model in place, which is proven to change nothing; after an error nothing leaves.

    A weight between two groups lies in a unit of either, and is shrunk by both, in turn.

    The student is a captured graph, or your own module (then `example_inputs` are needed). Groups that a norm or a mean
    is computed over (the width of a transformer) are left alone and in `skips`.

    Args:
        strength: factor of the penalty, > 0.
        form: ``"proximal"`` or ``"gradient"``.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. The
            removal is proven on them.

    Math:
        p(w) = strength * sum_g sqrt(|g|) ||w_g||_2, |g| the number of weights of unit g; proximal: w_g <- w_g max(1 -
        lr strength sqrt(|g|) / ||w_g||_2, 0) after each step, lr the largest of the unit's weights.

    Source:
        Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables", equation 2.1; Wen et
        al. 2016, "Learning Structured Sparsity in Deep Neural Networks", equation 2; one group after another: Bertsekas
        2011, "Incremental proximal methods for large scale convex optimization".

    Raises:
        CallbackError: the optimizer does not hold a weight (proximal form); at the end, when the model computes
            something else without the units.

    Example:
        ```python
        lasso = top.GroupLasso(strength=1e-3, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[lasso]).train()   # the model is smaller now
        lasso.plan.apply(fresh)                                               # and so is another copy of it
        ```
    """

    form: Form = "proximal"

    _blocks: tuple[UnitBlocks, ...] = field(default=(), init=False, repr=False)
    _roots: tuple[torch.Tensor, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        check_form(self.form)

    def install(self, student: Student) -> None:
        """Find the groups."""
        self._find_units(student)
        for unit_group in self._units:
            for fqn in unit_group.claims:
                student.claim(fqn, self)
        self._blocks = tuple(UnitBlocks(unit_group) for unit_group in self._units)
        self._roots = tuple(blocks.sizes(student.model).sqrt() for blocks in self._blocks)

    def penalty(self) -> torch.Tensor:
        """Return ``strength * sum sqrt(|g|) ||w_g||_2``."""
        terms = [(root * norms).sum() for root, norms in zip(self._roots, self._norms(), strict=True)]
        return self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def before_step(self, progress: Progress) -> None:
        """Add the gradient, in the gradient form."""
        if self.form == "gradient":
            super().before_step(progress)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Take the proximal step, in the proximal form; none where the optimizer took none."""
        if self.form != "proximal" or not progress.stepped or self.student is None:
            return
        model = self.student.model
        rates = learning_rates(self.student.optimizer, self._weights())
        for blocks, root in zip(self._blocks, self._roots, strict=True):
            rate = max(rates[fqn] for fqn in blocks.fqns)
            norms = blocks.norms(model)
            blocks.scale(model, block_shrinkage(norms, rate * self.strength * root.to(norms.device)))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return ``group_lasso``, and ``channel_ratio``: the share of units that are zero."""
        found = super().metrics()
        if found:
            zero = [norms == 0 for norms in self._norms()]
            found["channel_ratio"] = sum(int(z.sum()) for z in zero) / sum(z.numel() for z in zero)
        return found

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove the units that are zero."""
        stays = {units: norms > 0 for units, norms in zip(self._units, self._norms(), strict=True)}
        self._remove_units(stays, optimizer, "zero by group lasso")

    def remove(self) -> None:
        """Let the groups go."""
        super().remove()
        self._blocks, self._roots = (), ()

    def _norms(self) -> list[torch.Tensor]:
        return [blocks.norms(self.student.model) for blocks in self._blocks] if self.student is not None else []

    def _weights(self) -> dict[str, torch.Tensor]:
        if self.student is None:
            return {}
        return {fqn: get_tensor(self.student.model, fqn) for blocks in self._blocks for fqn in blocks.fqns}

    def _penalized(self) -> Sequence[torch.Tensor]:
        return list(self._weights().values())
