"""How many labels a loss is a mean over: what makes gradient accumulation exact when label counts differ.

A head returns the mean over the labels of its micro-batch. The mean over the whole accumulated batch is the
sum of those means, each weighted by its share of the labels: L = sum_i (c_i / n) L_i with n = sum_i c_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import predicts_next_token
from torchopt_passes.errors import CallbackError
from torchopt_passes.ranks import sum_over_ranks, world_size

__all__ = ["IGNORE_INDEX", "count_labels", "num_items_in_batch", "shifts_labels"]

IGNORE_INDEX = -100
"""The label that losses leave out, in PyTorch and Transformers."""


def shifts_labels(model: nn.Module) -> bool:
    """Return whether the model predicts label i + 1 at position i (a causal language model of Transformers)."""
    source: nn.Module = model.meta["source"] if isinstance(model, fx.GraphModule) and "source" in model.meta else model
    inside = getattr(source, "get_base_model", None)  # of PEFT
    return predicts_next_token(inside() if callable(inside) else source)  # pyright: ignore[reportArgumentType]


def count_labels(labels: object, *, shifted: bool) -> torch.Tensor:
    """Return how many labels count, by the Trainer's own rule: those that are not -100.

    Args:
        labels: a tensor, any shape.
        shifted: leave the first label of each row out, as causal language models do.

    Returns:
        int64 scalar, on the device of `labels`.

    Raises:
        CallbackError: the labels are no tensor.
    """
    if not isinstance(labels, torch.Tensor):
        raise CallbackError(
            f"num_items_in_batch needs labels in one tensor, not {type(labels).__name__}: leave num_items_in_batch out"
        )
    counted = labels[..., 1:] if shifted else labels
    return counted.ne(IGNORE_INDEX).sum()


def num_items_in_batch(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """Return the number of labels in the micro-batches of one optimizer step, for a loop of your own.

    Pass it to each forward of an attached model; the loss is then the exact share of the whole batch, and must
    not be divided by the number of micro-batches: multiply it by their number where the loop divides, as Accelerate's
    ``backward`` and Lightning do. On several ranks every rank calls it with its own micro-batches.

    Args:
        model: the student.
        batches: the micro-batches of the step, each with ``labels``.

    Returns:
        int64 scalar; on several ranks float64, the labels of all ranks by the number of ranks, because
        DistributedDataParallel and FSDP average the gradients over them.

    Example:
        >>> batches = [{"labels": torch.tensor([1, -100])}, {"labels": torch.tensor([2, 3])}]
        >>> num_items_in_batch(nn.Linear(1, 1), batches)
        tensor(3)
    """
    shifted = shifts_labels(model)
    counts = [
        count_labels(batch["shift_labels"], shifted=False)
        if "shift_labels" in batch
        else count_labels(batch.get("labels"), shifted=shifted)
        for batch in batches
    ]
    items = torch.stack(counts).sum()
    return items if world_size() == 1 else sum_over_ranks(items).double() / world_size()
