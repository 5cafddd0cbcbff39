"""LotteryTicket: prune what training made small, and train the rest again from an early state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from torchopt_passes.callbacks.lifecycle import Epochs, Progress, When, check_when
from torchopt_passes.callbacks.optimizer_entries import forget
from torchopt_passes.callbacks.owned import is_owned
from torchopt_passes.callbacks.sharded import masks_by, part_of
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.mask_rules import MaskRule
from torchopt_passes.functional.ticket_rounds import TicketRounds
from torchopt_passes.graph.tensors import find_owner

__all__ = ["LotteryTicket"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(kw_only=True, eq=False)
class LotteryTicket(WeightMasks):
    """Iterative magnitude pruning with rewinding, in one run: train, prune, go back to step k, train again, ...

    All trainable parameters and the statistics of batch norms go back to their values after step k, removed weights to
    zero, and the optimizer forgets its state. Those values lie in buffers ``<name>_rewind`` beside each parameter,
    and so in every checkpoint, until training ends: a resumed run goes on exactly.

    The learning rate is the loop's: a schedule over the whole run goes on through all rounds. For one that goes back
    with the weights, as in the paper, give the loop a schedule of one round at `position`; rounds are laid out when
    training begins.

    Args:
        sparsity: share of the weights that is zero after the last pruning, 0 < sparsity < 1; each pruning removes the
            same share of what is left.
        rounds: how often weights are pruned and rewound; the run has one round of training more.
        rewind: k: step (int) to go back to, share of the whole run (float), or `Epochs`; 0 is the initialization.
        length: steps of a round from step 0 to its pruning (int), or `Epochs`; None divides the run.
        scope: ``"global"`` ranks all weights together; ``"tensor"``, ``"uniform"`` and ``"erk"`` as in
            `GradualPruning`.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        w <- m * w_k, m = 1[|w_T| among the (1 - s)^(j/n) largest] at the end of round j of n.

    Source:
        Frankle and Carbin 2019, "The Lottery Ticket Hypothesis"; Frankle et al. 2020, "Linear Mode Connectivity and the
        Lottery Ticket Hypothesis", algorithm 1 (iterative magnitude pruning with rewinding to step k).

    Example:
        ```python
        ticket = top.LotteryTicket(sparsity=0.9, rounds=5, rewind=200, length=2000)
        scheduler = LambdaLR(optimizer, lambda step: one_round(ticket.position(step)))   # one_round: step -> factor
        with top.attach(model, optimizer, [ticket], total_steps=2000 + 5 * 1800):
            ...
        ```
    """

    sparsity: float = 0.8
    rounds: int = 5
    rewind: When = 0.01
    length: int | Epochs | None = None
    scope: Literal["global", "tensor", "uniform", "erk"] = "global"

    _layout: TicketRounds | None = field(default=None, init=False, repr=False)
    _kept: tuple[tuple[nn.Module, str], ...] = field(default=(), init=False, repr=False)
    _unverified: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        if not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be in (0, 1), not {self.sparsity}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")
        check_when(self.rewind, "rewind")
        if self.length is not None and not isinstance(self.length, Epochs) and self.length < 1:
            raise ConfigError(f"length must be at least 1 step, not {self.length}")
        self._rule = MaskRule(self.scope)
        if isinstance(self.rewind, int) and isinstance(self.length, int):
            self._layout = TicketRounds(self.rounds, self.length, self.rewind)

    @property
    def _masks_gradients(self) -> bool:
        return True

    def position(self, step: int) -> int:
        """Return the step within the round after `step` steps of the run: what a schedule of one round is to be asked.

        Raises:
            CallbackError: rounds depend on the length of the run, and it has not begun.
        """
        if self._layout is None:
            raise CallbackError("the rounds are not laid out yet: give rewind and length as steps, or ask in training")
        return self._layout.position(step)

    def install(self, student: Student) -> None:
        """Choose the weights, and make room for the values to go back to."""
        super().install(student)
        model = student.model
        names = [n for n, p in model.named_parameters() if p.requires_grad and not is_owned(n)]
        names += [n for n, _ in model.named_buffers() if n.rpartition(".")[2] in _STATISTICS]
        places = [find_owner(model, name) for name in names]
        for (owner, name), fqn in zip(places, names, strict=True):
            if hasattr(owner, f"{name}_rewind") and f"{name}_rewind" not in owner._buffers:
                raise CallbackError(f"{fqn} has a {name}_rewind beside it already: rename that first")
        self._kept = tuple(places)
        for owner, name in self._kept:
            owner.register_buffer(f"{name}_rewind", getattr(owner, name).detach().clone())

    def begin(self, progress: Progress) -> None:
        """Lay out the rounds."""
        rewind = progress.steps(self.rewind)
        if self.length is not None:
            layout = TicketRounds(self.rounds, progress.steps(self.length), rewind)
        elif progress.total_steps is not None:
            layout = TicketRounds.over(progress.total_steps, self.rounds, rewind)
        else:
            raise CallbackError("LotteryTicket divides the run into rounds: give total_steps=, or length= of a round")
        if progress.total_steps is not None and layout.ends[-1] >= progress.total_steps:
            raise CallbackError(
                f"the last pruning is after step {layout.ends[-1]}, but training ends at step {progress.total_steps}"
            )
        self._layout, self._unverified = layout, True
        super().begin(progress)
        if progress.step == 0:
            self._keep()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Note the values of step k; at the end of a round, prune and rewind."""
        super().after_step(progress)
        layout = self._layout
        if layout is None:
            raise CallbackError("LotteryTicket got a step before training began")
        if self._unverified:
            expected = self._expected(layout.done(progress.step - 1))
            self._refuse_lost_masks(progress.step - 1, expected, expected)
            self._unverified = False
        self._apply()
        if progress.step == layout.rewind:
            self._keep()
        if progress.step in layout.ends:
            self._prune(layout.sparsity(layout.done(progress.step), self.sparsity))
            self._go_back()
            self._check_masks()
            self._tell_changed(progress)

    @torch.no_grad()
    def remove(self) -> None:
        """Take masks and kept values away."""
        super().remove()
        for owner, name in self._kept:
            owner._buffers.pop(f"{name}_rewind", None)
        self._kept = ()

    def _ended(self) -> None:
        self._tell_if_short(self._expected(self.rounds))

    def _expected(self, done: int) -> int:
        if self._layout is None:
            return 0
        share = self._layout.sparsity(done, self.sparsity)
        return self._rule.removed([target.weight.shape for target in self._targets], share)

    def _keep(self) -> None:
        for owner, name in self._kept:
            owner.register_buffer(f"{name}_rewind", getattr(owner, name).detach().clone())

    def _prune(self, sparsity: float) -> None:
        scores = {t.fqn: t.weight.detach().abs().masked_fill(~t.mask, -torch.inf) for t in self._targets}
        found = masks_by(self._rule, scores, sparsity)
        for target in self._targets:
            target.choose(found[target.fqn])

    def _go_back(self) -> None:
        optimizer = self.student.optimizer if self.student is not None else None
        for owner, name in self._kept:
            tensor = getattr(owner, name)
            tensor.copy_(part_of(owner.get_buffer(f"{name}_rewind"), tensor))
            if optimizer is not None:
                forget(optimizer, tensor)
        self._apply()
