"""One forward of the student, and what becomes of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchopt_passes.callbacks.items import count_labels, shifts_labels
from torchopt_passes.callbacks.lifecycle import Lifecycle
from torchopt_passes.callbacks.outputs import argument

__all__ = ["StudentCall", "combined_loss", "counted_labels", "share_of_step"]


@dataclass(frozen=True)
class StudentCall:
    """One training-mode forward of the student.

    Args:
        model: the student.
        args: positional inputs as the loop gave them.
        kwargs: keyword inputs as the loop gave them, without ``num_items_in_batch``.
        labels: the labels among them, or None.
        output: what the student returned.
        loss: the student's own loss, scalar.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: torch.Tensor | None
    output: Any
    loss: torch.Tensor


def combined_loss(call: StudentCall, callbacks: Sequence[Lifecycle]) -> torch.Tensor:
    """Return (1 - sum of replaces) times the student's loss, plus the terms of the callbacks."""
    terms = [term for callback in callbacks if (term := callback.loss_term(call)) is not None]
    if not terms:
        return call.loss
    added = torch.stack([term.value for term in terms]).sum() if len(terms) > 1 else terms[0].value
    kept = 1.0 - sum(term.replaces for term in terms)
    # A micro-batch without labels has a mean over nothing (NaN), which must not poison the terms.
    return added if kept == 0.0 else kept * call.loss + added


def counted_labels(call: StudentCall) -> torch.Tensor:
    """Return how many labels the student's loss is a mean over, int64 scalar."""
    shift_labels = argument(call.model, call.args, call.kwargs, "shift_labels")
    if shift_labels is not None:
        return count_labels(shift_labels, shifted=False)
    return count_labels(argument(call.model, call.args, call.kwargs, "labels"), shifted=shifts_labels(call.model))


def share_of_step(loss: torch.Tensor, count: torch.Tensor, items: torch.Tensor | int) -> torch.Tensor:
    """Return c / n of the loss; exactly the loss for c = n, and 0 without labels, where a mean is NaN."""
    count = count.to(device=loss.device, dtype=torch.promote_types(loss.dtype, torch.float32))
    if isinstance(items, torch.Tensor):
        items = items.to(loss.device)
    return torch.where(count > 0, loss * (count / items).to(loss.dtype), torch.zeros_like(loss))
