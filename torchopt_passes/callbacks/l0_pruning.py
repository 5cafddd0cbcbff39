"""L0Pruning: the network learns which of its weights it needs, by gates that are exactly open or closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from torchopt_passes.callbacks.hard_concrete_gates import HardConcreteGates
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.targets import Target, choose_targets
from torchopt_passes.functional.masks import keep_largest
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.prune_weights import MaskWeights

__all__ = ["L0Pruning"]


@dataclass(kw_only=True, eq=False)
class L0Pruning(HardConcreteGates):
    """Train a gate with each weight; the expected number of open gates is costly, and gates close to exactly zero.

    In training the forward computes with w * z, z the noisy gates of the step; in evaluation, and at the end, with the
    gates without noise. Gradients flow to weights and gates. When training ends, early too, the gates are multiplied
    into the weights: what closed is exactly zero, and the model is what the last evaluation computed. After an error
    the weights stay as they are. With `sparsity` the gates that are least likely to be open are closed as well if it
    takes more to reach the target, in each evaluation that of its step.

    Args:
        strength: factor of the expected number of open weights, > 0; or
        sparsity: the share of the weights that is zero at the end, in (0, 1): exactly one of the two.
        start: with `sparsity`, when the target begins to rise from 0, as a share of training (float) or completed steps
            (int).
        end: when it is reached, likewise; what remains is for recovery.
        ascent: with `sparsity`, step size of the multipliers.
        closed: probability with which a gate's concrete variable is below 1/2 at first, in (0, 1). Up to 0.083 the
            gates are exactly open at first when there is no noise: the model begins as it came.
        beta: temperature of the gates, > 0.
        gamma: < 0, and
        zeta: > 1: the interval that the concrete distribution is stretched to.
        lr: learning rate of the gates; None for that of the model. Gates want a larger one than most models.
        seed: of the noise.
        settle: from when on the gates are held, without noise and penalty, as a share of training (float), completed
            steps (int) or `Epochs`: weights and batch-norm statistics adapt to what will remain. None for never.
        include: globs on parameter or module names; empty for every matrix weight.
        skip: globs on names to leave alone.

    Math:
        z = min(1, max(0, sigmoid((log u - log(1 - u) + a) / beta) (zeta - gamma) + gamma)), u uniform in (0, 1);
        E L0 = sum sigmoid(a - beta log(-gamma / zeta)) and p = strength * E L0; or with t the target and s = 1 - E L0 /
        n, p = m1 (t - s) + m2 (t - s)^2 with m1 = 0 and m2 = 10 at first, m1 += ascent (t - s) and m2 += ascent (t -
        s)^2 after each step; without noise z = min(1, max(0, sigmoid(a) (zeta - gamma) + gamma)).

    Source:
        Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", equations 10 to 13; the
        Lagrangian: Wang et al. 2020, "Structured Pruning of Large Language Models", section 3.3.

    Example:
        ```python
        pruning = top.L0Pruning(sparsity=0.8, lr=0.05)
        Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
        ```
    """

    module_name: ClassVar[str] = "l0_weights"

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    skips: tuple[Skip, ...] = field(default=(), init=False, repr=False)
    """Parameters that are left alone, with the reason; filled when the callback is installed."""
    plan: Plan = field(default=Plan(), init=False, repr=False)
    """What closed, as a plan that other copies of the model take; filled at the end."""
    _targets: tuple[Target, ...] = field(default=(), init=False, repr=False)

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the weights under gates."""
        return tuple(target.fqn for target in self._targets)

    def install(self, student: Student) -> None:
        """Choose the weights and bring the gates."""
        self._targets, self.skips = choose_targets(student.model, self.include, self.skip)
        for target in self._targets:
            student.claim(target.fqn, self)
        self._bring(student, self._make({target.fqn: target.weight.shape for target in self._targets}))

    def _noisy(self) -> Mapping[str, torch.Tensor]:
        pairs = zip(self._targets, self._log_alphas, strict=True)
        return self._multiplied([self._draw(a, target.fqn) for target, a in pairs])

    def _multiplied(self, gates: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {t.fqn: t.weight * gate.to(t.weight) for t, gate in zip(self._targets, gates, strict=True)}

    def expected_sparsity(self) -> torch.Tensor:
        """Return the expected share of weights that are zero."""
        return 1.0 - self._expected_norm() / sum(target.weight.numel() for target in self._targets)

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Multiply the gates into the weights."""
        edits: list[MaskWeights] = []
        for target, gate in zip(self._targets, self.gates_at_test(), strict=True):
            target.weight.mul_(gate.to(target.weight))
            closed = int((gate == 0).sum())
            edits.append(
                MaskWeights(
                    target=target.fqn,
                    reason="gates closed while training",
                    numbers={"removed": float(closed), "sparsity": closed / gate.numel()},
                    mask=gate != 0,
                )
            )
        self.plan = Plan(tuple(edits), self.skips)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return ``sparsity`` (of an evaluation now), ``expected_sparsity``, ``l0_penalty``, ``target_sparsity``."""
        found = super().metrics()
        if found:
            gates = self.gates_at_test()
            found["sparsity"] = sum(int((g == 0).sum()) for g in gates) / sum(g.numel() for g in gates)
        return found

    def remove(self) -> None:
        """Let the weights and gates go."""
        super().remove()
        self._targets = ()

    @property
    def _names(self) -> tuple[str, ...]:
        return self.fqns

    def _expected_norm(self) -> torch.Tensor:
        return torch.stack([self._open(a).sum() for a in self._log_alphas]).sum()

    def _make_gates_at_test(self) -> list[torch.Tensor]:
        gates = [self._at_test(a) for a in self._log_alphas]
        if self.target > 0.0:
            flat = torch.cat([a.detach().flatten() for a in self._log_alphas])
            kept = keep_largest(flat, self.target).split([gate.numel() for gate in gates])
            gates = [gate * mask.view(gate.shape) for gate, mask in zip(gates, kept, strict=True)]
        return gates
