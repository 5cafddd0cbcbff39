"""InformationBottleneck: units pay for the information they let through, and those that carry none leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from torchopt_passes.callbacks.gates import GateModule, gate_key, get_rank, named_parameters
from torchopt_passes.callbacks.lifecycle import Progress
from torchopt_passes.callbacks.per_sample import READS, SampleGatedWeight
from torchopt_passes.callbacks.student import Student
from torchopt_passes.callbacks.unit_gates import GatedUnits
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.bottleneck import bottleneck_bound, noise_to_signal, sample_bottleneck
from torchopt_passes.functional.draws import normal_rows, seed_of
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["InformationBottleneck"]


class _GaussianGates(GateModule):
    """Mean and log variance of the gates of each group."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.mean = named_parameters({name: torch.ones(size) for name, size in sizes.items()})
        self.log_variance = named_parameters({name: torch.full((size,), -9.0) for name, size in sizes.items()})


@dataclass(kw_only=True, eq=False)
class InformationBottleneck(GatedUnits):
    """Multiply each unit (channel, head, block) by a Gaussian gate, and make the information that passes costly.

    Units that the task does not need drown in their own noise: the mean of their gate goes to zero. In training the
    gates are noisy, in evaluation they are at their mean, and closed where the noise outweighs it. When training ends,
    early too, the gates are multiplied into the weights that read the units, and the units that closed leave the model
    in place, which is proven to change nothing. That it can be done is rehearsed on a copy when the callback is
    installed; after an error nothing leaves. The model begins as it came: gates have mean 1 and hardly any noise.

    The student is a captured graph, or your own module (then `example_inputs` are needed). Groups that a norm or a mean
    is computed over (the width of a transformer), and such as no weight reads, are left alone and in `skips`.

    Args:
        strength: factor of the bound on the information, > 0.
        threshold: log alpha above which a unit is closed; 0 is where noise and signal are equal.
        noise: ``"sample"`` draws noise for each sample, for units that convolutions and linears read; ``"step"`` draws
            it once for each optimizer step, for all samples, and takes units that other products read too.
        lr: learning rate of the gates; None for that of the model. Gates want a larger one than most models.
        seed: of the noise.
        settle: from when on the gates are held, without noise and penalty, as a share of training (float), completed
            steps (int) or `Epochs`: weights and batch-norm statistics adapt to what will remain. None for never.
        skip: globs on names of parameters or modules; groups that cut one are left alone.
        kinds: what may leave (see `ChannelGroup`).
        example_inputs: ``(args, kwargs)``, or in another form of a call; by default those of the captured graph. The
            removal is proven on them.

    Math:
        z = mu + sigma eps; p = strength * sum log(1 + mu^2 / sigma^2) over all units; closed where log alpha =
        log(sigma^2 / mu^2) > threshold.

    Source:
        Dai et al. 2018, "Compressing Neural Networks using the Variational Information Bottleneck", equation 6 and
        section 2.2; mu = 1, log sigma^2 = -9 and threshold 0 as in its code.

    Raises:
        CallbackError: at the end, when the model computes something else without the units; nothing is removed then.

    Example:
        ```python
        bottleneck = top.InformationBottleneck(strength=1e-3, example_inputs=batch)
        Trainer(model, args, train_dataset=data, callbacks=[bottleneck]).train()   # the model is smaller now
        bottleneck.plan.apply(fresh)                                               # and so is another copy of it
        ```
    """

    module_name: ClassVar[str] = "bottleneck"

    strength: float = 1e-3
    threshold: float = 0.0
    noise: Literal["sample", "step"] = "sample"

    _seen: dict[str, int] = field(default_factory=dict[str, int], init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that are wrong in any training."""
        super().__post_init__()
        if not self.strength > 0:
            raise ConfigError(f"strength must be > 0, not {self.strength}")
        if self.noise not in ("sample", "step"):
            raise ConfigError(f'noise must be "sample" or "step", not {self.noise!r}')

    def install(self, student: Student) -> None:
        """Find the groups, rehearse the removal on a copy, and bring the gates."""
        self._gate_units(student)
        if self.noise == "sample":
            self._leave_out_mixed()
        self._bring(
            student, _GaussianGates({unit_group.group.name: unit_group.group.size for unit_group in self._units})
        )

    def begin(self, progress: Progress) -> None:
        """Draw for the first step."""
        self._check_parameters()
        super().begin(progress)
        self._seen = {}

    def after_step(self, progress: Progress) -> None:
        """Draw for the next step."""
        super().after_step(progress)
        self._seen = {}

    def penalty(self) -> torch.Tensor:
        """Return ``strength * sum log(1 + mu^2 / sigma^2)``."""
        return self.strength * torch.stack([bottleneck_bound(m, v).sum() for m, v in self._moments]).sum()

    def _noisy(self) -> Mapping[str, torch.Tensor]:
        if self.noise == "sample":
            return self._sample_gated()
        gates: list[torch.Tensor] = []
        for unit_group, (mean, log_variance) in zip(self._units, self._moments, strict=True):
            normal = normal_rows(0, 1, len(mean), self._seed(unit_group.group.name), mean.device)[0]
            gates.append(sample_bottleneck(mean, log_variance, normal))
        return self._multiplied(gates)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Multiply the gates into the weights, and remove the units that closed."""
        self._fold_and_remove(self.gates_at_test(), optimizer, "carries noise after training with a bottleneck")

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return ``bottleneck``, and ``channel_ratio``: the share of units that an evaluation now would close."""
        if self._module is None:
            return {}
        return {"bottleneck": float(self.penalty()), "channel_ratio": self._closed_ratio()}

    @property
    def _moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not isinstance(self._module, _GaussianGates):
            return []
        keys = [gate_key(group.name) for group in self.groups]
        return [(self._module.mean[key], self._module.log_variance[key]) for key in keys]

    def _make_gates_at_test(self) -> list[torch.Tensor]:
        return [m.detach() * (noise_to_signal(m, v) <= self.threshold) for m, v in self._moments]

    def _leave_out_mixed(self) -> None:
        """Leave out the groups that are read where samples cannot be told apart."""
        mixed: list[Skip] = []
        for unit_group in self._units:
            use = next((use for use in self._uses[unit_group] if use.node.target not in READS), None)
            if use is not None:
                reason = f'{use.node.target} reads its units, and mixes samples: noise="step" takes it'
                mixed.append(Skip(target=unit_group.group.name, reason=reason))
        names = {skip.target for skip in mixed}
        self._units = tuple(u for u in self._units if u.group.name not in names)
        self.skips = (*self.skips, *mixed)
        if not self._units:
            raise ConfigError(f"no channel group is left: {'; '.join(f'{s.target}: {s.reason}' for s in mixed)}")

    def _sample_gated(self) -> dict[str, torch.Tensor]:
        """Return stand-ins that gate what each weight reads, sample by sample."""
        if self.student is None:
            return {}
        of: dict[str, list[_Part]] = {}
        for unit_group, (mean, log_variance) in zip(self._units, self._moments, strict=True):
            seed = seed_of(self._seed(unit_group.group.name), get_rank())
            for fqn, _, units in unit_group.slices:
                of.setdefault(fqn, []).append(_Part(units, mean, log_variance, seed))
        model = self.student.model
        return {fqn: SampleGatedWeight.of(get_tensor(model, fqn), self._drawn(fqn, parts)) for fqn, parts in of.items()}

    def _drawn(self, fqn: str, parts: list[_Part]) -> Callable[[int], torch.Tensor]:
        first = self._seen.get(fqn, 0)  # samples of the step that earlier micro-batches had

        def gates(samples: int) -> torch.Tensor:
            self._seen[fqn] = first + samples
            return torch.stack([part.gates(first, samples) for part in parts]).prod(0)

        return gates


@dataclass(frozen=True)
class _Part:
    """The gates of one group on one axis of a weight."""

    units: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor
    seed: int

    def gates(self, first: int, samples: int) -> torch.Tensor:
        """Return (samples, size of the axis), from the noise of these samples of the step."""
        normal = normal_rows(first, samples, len(self.mean), self.seed, self.mean.device)
        z = sample_bottleneck(self.mean, self.log_variance, normal)
        padded = torch.cat([z, z.new_ones(samples, 1)], dim=1)
        return padded[:, self.units.to(z.device)]
