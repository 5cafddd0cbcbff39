"""Tensors that stand in for parameters while a model runs: gated weights, under names that never change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchopt_passes._compat import run_eagerly
from torchopt_passes.callbacks.lifecycle import Lifecycle
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.tensors import aliases, find_owner

__all__ = ["StandIns"]


class StandIns:
    """What stands in for parameters of a model now.

    ``module.weight`` finds an attribute of the instance before a parameter of that name, so the model's code, or a
    graph's, computes with the tensor laid over the parameter, wherever it reads it: in another module's forward, tied
    under a second name, or again in the backward pass (gradient checkpointing). Parameters, state_dict, optimizer and
    DistributedDataParallel see the parameter alone, and autograd takes the gradient to it and to whatever the tensor is
    made of.
    """

    def __init__(self) -> None:
        self._callbacks: Callable[[], Iterable[Lifecycle]] | None = None
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._laid: list[tuple[nn.Module, str]] = []
        self._flat: list[tuple[nn.RNNBase, list[torch.Tensor | None]]] = []

    def hook(self, model: nn.Module, callbacks: Callable[[], Iterable[Lifecycle]]) -> list[RemovableHandle]:
        """Lay what the callbacks give over the parameters before each forward of a model, and lift it after.

        Args:
            model: the student.
            callbacks: returns those that are at work now.

        Returns:
            What ends it.
        """
        self._callbacks = callbacks
        return [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def lay(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lay tensors over parameters; what lay there before goes.

        Args:
            model: the student, always the same one.
            tensors: fqn (the first one of a tied parameter) -> what stands in for it, of the same shape.
        """
        self.lift()
        if tensors and not self._places:
            from torch.distributed.tensor import DTensor

            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise CallbackError("gates and dropped filters need whole weights, but this model is sharded (FSDP2)")
            for name, first in aliases(model).items():
                self._places.setdefault(first, []).append(find_owner(model, name))
        for fqn, tensor in tensors.items():
            for owner, attribute in self._places[fqn]:
                owner.__dict__[attribute] = tensor
                self._laid.append((owner, attribute))
        for owner in dict.fromkeys(owner for owner, _ in self._laid):
            if isinstance(owner, nn.RNNBase):  # reads its weights from a list
                names: list[str] = [name for layer in owner._all_weights for name in layer]
                self._flat.append((owner, owner.__dict__["_flat_weights"]))
                owner.__dict__["_flat_weights"] = [getattr(owner, name) for name in names]

    def lift(self) -> None:
        """Take all of them away: the parameters are themselves again."""
        for rnn, weights in self._flat:
            rnn.__dict__["_flat_weights"] = weights
        for owner, attribute in self._laid:
            owner.__dict__.pop(attribute, None)
        self._laid, self._flat = [], []

    def forget(self) -> None:
        """Take all of them away, and hold no part of the model any more."""
        self.lift()
        self._places = {}

    @run_eagerly
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.lift()  # callbacks make the next ones of the parameters themselves
        tensors: dict[str, torch.Tensor] = {}
        for callback in self._callbacks() if self._callbacks is not None else ():
            tensors |= callback.stand_ins(module.training)
        self.lay(module, tensors)

    @run_eagerly
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # a backward pass may run parts of the model again: what it was computed with stays until the step
        if output is None or not module.training or not torch.is_grad_enabled():
            self.lift()

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIns:
        """A copy of the model is a model of its own: nothing stands in for its parameters."""
        return StandIns()

    def __reduce__(self) -> tuple[type[StandIns], tuple[()]]:
        """Pickle as the copy."""
        return StandIns, ()
