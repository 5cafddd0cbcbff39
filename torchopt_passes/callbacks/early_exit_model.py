"""EarlyExitModel: a model that stops as soon as an exit is sure of each of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchopt_passes.callbacks import outputs
from torchopt_passes.callbacks.exit_places import Place
from torchopt_passes.callbacks.items import IGNORE_INDEX
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.exits import confidence

__all__ = ["EarlyExitModel", "EarlyExitOutput"]


class EarlyExitOutput(dict[str, Any]):
    """``logits`` (samples, classes), ``exits`` (samples,) int64, and ``loss`` where labels were given; also attributes.

    The number of an exit is 0 for the first, and the number of exits for the end of the model.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _AllOut(Exception):  # noqa: N818 (no error: it ends a forward)
    """Every sample of the batch has left."""


class EarlyExitModel(nn.Module):
    """A model with exits: each sample gets the logits of the first exit that is sure of it.

    In eval mode the model stops when every sample of the batch has left: work is saved for single samples and for
    batches that are easy as a whole. In training mode it is the model itself. It counts where samples leave, and goes
    into ``Trainer(model).evaluate()`` as it is, with ``remove_unused_columns=False`` for data sets of ``datasets``.

    Args:
        model: the model.
        places: where the exits branch off, in its order.
        heads: one for each.
        threshold: confidence (see `confidence`) that a sample leaves with, at least.
        logits: name of the model's output.
    """

    accepts_loss_kwargs: ClassVar[bool] = False
    """For the Trainer: ``num_items_in_batch`` is not for a model of any kind."""

    def __init__(
        self, model: nn.Module, places: Sequence[Place], heads: Sequence[nn.Module], *, threshold: float, logits: str
    ) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.places, self.threshold, self.logits = tuple(places), threshold, logits
        self.config = getattr(model, "config", None)
        self.counts = nn.Buffer(torch.zeros(len(self.places) + 1, dtype=torch.int64), persistent=False)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Return what the model returns in training mode, and `EarlyExitOutput` in eval mode."""
        given = {} if labels is None else {"labels": labels}
        if self.training:
            return self.model(*args, **given, **kwargs)
        leaving = _Leaving(self, kwargs.get("attention_mask"))
        handles = [
            self.model.get_submodule(place.path).register_forward_hook(leaving.hook(number))
            for number, place in enumerate(self.places)
        ]
        takes_labels = outputs.accepts(self.model, "labels")
        try:
            output = self.model(*args, **(given if takes_labels else {}), **kwargs)
            leaving.leave(len(self.places), outputs.field(output, self.logits, "student"))
        except _AllOut:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self.counts += torch.bincount(leaving.exits, minlength=len(self.counts)).to(self.counts)
        found: Mapping[str, Any] = {"logits": leaving.logits, "exits": leaving.exits}
        if labels is not None:
            found = {"loss": cross_entropy(leaving.logits.float(), labels, ignore_index=IGNORE_INDEX), **found}
        return EarlyExitOutput(found)

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """The share of samples that left at each exit, and at the end, since `reset`."""
        total = int(self.counts.sum())
        return tuple(int(count) / total for count in self.counts) if total else (0.0,) * len(self.counts)

    @property
    def average_depth(self) -> float:
        """The mean share of the multiply-accumulates that a sample leaves after, since `reset`; 1 is the end."""
        depths = (*(place.depth for place in self.places), 1.0)
        return sum(share * depth for share, depth in zip(self.exit_shares, depths, strict=True))

    def reset(self) -> None:
        """Count anew."""
        self.counts.zero_()


class _Leaving:
    """The samples of one forward, and where they left."""

    def __init__(self, owner: EarlyExitModel, mask: Any) -> None:
        self._owner, self._mask = owner, mask
        self.logits: torch.Tensor = torch.empty(0)
        self.exits: torch.Tensor = torch.empty(0, dtype=torch.int64)

    def hook(self, number: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            features = output[0] if isinstance(output, tuple) else output
            self.leave(number, self._owner.heads[number](features, self._mask))

        return after

    def leave(self, number: int, logits: torch.Tensor) -> None:
        """Let those leave that an exit is sure of; at the end, all."""
        if not len(self.exits):
            self.logits = torch.zeros_like(logits)
            self.exits = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
        if len(logits) != len(self.exits):
            raise ConfigError(f"exit {number} has {len(logits)} rows for {len(self.exits)} samples")
        last = number == len(self._owner.places)
        out = (self.exits < 0) & (confidence(logits) >= self._owner.threshold) if not last else self.exits < 0
        self.logits = torch.where(out.unsqueeze(1), logits.to(self.logits.dtype), self.logits)
        self.exits = torch.where(out, number, self.exits)
        if not last and bool((self.exits >= 0).all()):
            raise _AllOut
