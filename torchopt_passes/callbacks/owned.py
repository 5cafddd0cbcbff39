"""Parameters that callbacks bring (projectors, gates, exits): into the optimizer, and out again at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchopt_passes.errors import CallbackError

__all__ = ["OWNED", "drop_parameters", "is_owned", "take_parameters"]

OWNED = "torchopt_"
"""How the names of modules begin that callbacks bring."""


def is_owned(fqn: str) -> bool:
    """Return whether a parameter is one that a callback brought, by its name in the student."""
    return fqn.startswith(OWNED)


def take_parameters(optimizer: torch.optim.Optimizer, name: str, module: nn.Module) -> None:
    """Let an optimizer train a module's parameters, in a group of their own where the module has ``optimizer_options``.

    Parameters that the optimizer does not hold become a new group with the options of its first group. Those it
    holds stay where they are, unless the module asks for options of its own.

    Args:
        optimizer: that of the student.
        name: of the module in the student, for errors.
        module: what a callback brought.

    Raises:
        CallbackError: the optimizer has no such option, or a learning-rate schedule has counted its groups already.
    """
    options: dict[str, Any] = dict(getattr(module, "optimizer_options", {}))
    unknown = sorted(set(options) - set(optimizer.defaults))
    if unknown:
        raise CallbackError(
            f"{name}.optimizer_options has {unknown}, but {type(optimizer).__name__} has {sorted(optimizer.defaults)}"
        )
    new = {id(p): (fqn, p) for fqn, p in module.named_parameters(prefix=name) if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} & new.keys()
    if not new or (held == new.keys() and not options):
        return
    first = optimizer.param_groups[0]
    if "initial_lr" in first:
        raise CallbackError(
            f"the optimizer cannot take the parameters of {name}, because its learning-rate scheduler is there "
            "already: attach first and make the scheduler then; in the Trainer, pass callbacks=[...] when it is made, "
            "without model_init, and make a new Trainer to train again"
        )
    _take_out(optimizer, held)
    named = "param_names" in first
    base = {key: value for key, value in first.items() if key not in ("params", "param_names")}
    params = list(new.values()) if named else [parameter for _, parameter in new.values()]
    optimizer.add_param_group({**base, **options, "params": params})


def drop_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters and their state out of an optimizer.

    A group that is empty then goes, unless a learning-rate scheduler counts on it: that one stays, and trains nothing.
    """
    gone = {id(parameter): parameter for parameter in parameters}
    empty = [group for group in optimizer.param_groups if not group["params"]]
    _take_out(optimizer, gone)
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if group["params"] or "initial_lr" in group or group in empty
    ]


def _take_out(optimizer: torch.optim.Optimizer, ids: Iterable[int]) -> None:
    ids = set(ids)
    for group in optimizer.param_groups:
        stay = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in ids]
        if len(stay) < len(group["params"]):
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][index] for index in stay]
