"""The model under training as callbacks see it: one forward hook for all of them, and who manages which weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchopt_passes._compat import active_data_parallel, compiled_source, run_eagerly
from torchopt_passes.callbacks.lifecycle import Lifecycle, Progress
from torchopt_passes.callbacks.optimizer_steps import after_each_step, before_each_step
from torchopt_passes.callbacks.outputs import accepts, argument, loss_of, with_loss
from torchopt_passes.callbacks.owned import OWNED, drop_parameters, take_parameters
from torchopt_passes.callbacks.sharded import is_sharded, shard_group
from torchopt_passes.callbacks.stand_ins import StandIns
from torchopt_passes.callbacks.student_call import StudentCall, combined_loss, counted_labels, share_of_step
from torchopt_passes.errors import CallbackError
from torchopt_passes.ranks import refuse_differences

__all__ = ["Student", "unwrap"]


@dataclass
class _Owned:
    """Whose a module is that a callback brought, and which optimizer trains it."""

    callback: weakref.ref[Lifecycle]
    optimizer: weakref.ref[torch.optim.Optimizer] | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or torch.compile."""
    return list(_layers(model))[-1]


class Student:
    """A model and the callbacks installed on it.

    In training mode its forward hook adds the callbacks' loss terms to the loss that the model returns. When
    the loop passes ``num_items_in_batch`` the loss becomes that forward's exact share of the accumulated
    batch, for every head: those of Transformers that ignore the argument too, and models that do not take it.
    Evaluation is left alone.
    """

    _all: ClassVar[weakref.WeakKeyDictionary[nn.Module, Student]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module | None) -> None:
        self._model = weakref.ref(model) if model is not None else None
        self._callbacks: list[Lifecycle] = []
        self._claims: dict[str, weakref.ref[Lifecycle]] = {}
        self._handles: list[RemovableHandle] = []
        self._at_end: list[Callable[[], None]] = []
        self._owned: dict[str, _Owned] = {}
        self._reducer: weakref.ref[nn.Module] | None = None
        self._stand_ins = StandIns()
        self._items: torch.Tensor | int | None = None
        self._progress: Callable[[], Progress] | None = None
        self._step_handle: RemovableHandle | None = None
        self._taken_handle: RemovableHandle | None = None
        self._taken: int | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        """The optimizer that trains the model, from the moment that callbacks begin."""

    @classmethod
    def of(cls, model: nn.Module) -> Student:
        """Return the student of a model, wrapped or not: always the same one."""
        *wrappers, model = _layers(model)
        if isinstance(model, nn.DataParallel):
            raise CallbackError(
                "nn.DataParallel replaces the model in each forward: use DistributedDataParallel (torchrun)"
            )
        student = cls._all.setdefault(model, cls(model))
        for wrapper in wrappers:
            if isinstance(wrapper, nn.parallel.DistributedDataParallel):
                student._reducer = weakref.ref(wrapper)
        return student

    @property
    def model(self) -> nn.Module:
        """The unwrapped model.

        Raises:
            CallbackError: the model is gone.
        """
        model = self._model() if self._model is not None else None
        if model is None:
            raise CallbackError("the model of this callback does not exist any more")
        return model

    @property
    def ranks(self) -> Any:
        """The process group of DistributedDataParallel or FSDP2 that trains the model; None where there is none."""
        reducer = self._reducer() if self._reducer is not None else None
        if reducer is not None:
            return getattr(reducer, "process_group", None)
        return next((group for p in self.model.parameters() if (group := shard_group(p)) is not None), None)

    @property
    def callbacks(self) -> tuple[Lifecycle, ...]:
        """The callbacks installed now."""
        return tuple(self._callbacks)

    def join(self, callback: Lifecycle) -> None:
        """Install a callback; one that is installed elsewhere moves here, one that is here already stays."""
        if callback.student is self:
            return
        if callback.student is not None:
            callback.student.leave(callback)
        if not self._handles:
            self._hook()
        self._callbacks.append(callback)
        callback.student = self
        try:
            callback.install(self)
        except BaseException:
            self.leave(callback)
            raise

    def leave(self, callback: Lifecycle) -> None:
        """Remove a callback; the hooks go with the last one."""
        if callback.student is not self:
            return
        try:
            callback.remove()
        finally:
            callback.student = None
            self._callbacks.remove(callback)
            self._claims = {fqn: owner for fqn, owner in self._claims.items() if owner() not in (None, callback)}
            self._disown(callback)
            if not self._callbacks:
                self._unhook()

    def claim(self, fqn: str, callback: Lifecycle) -> None:
        """Note that a callback alone decides which entries of a weight are zero.

        Raises:
            CallbackError: another callback does.
        """
        owner = self._claims[fqn]() if fqn in self._claims else None
        if owner is not None and owner is not callback:
            raise CallbackError(
                f"{fqn} is managed by two callbacks, {type(owner).__name__} and {type(callback).__name__}: "
                "give them separate weights with include= and skip="
            )
        self._claims[fqn] = weakref.ref(callback)

    def own(self, name: str, module: nn.Module, callback: Lifecycle) -> None:
        """Give the model parameters that a callback trains with it: projectors, gates, exits. Call it in `install`.

        The module becomes the submodule ``torchopt_<name>`` of the model: it is in the state_dict and in checkpoints,
        moves and is wrapped with the model, and is trained by its optimizer. When the callback leaves, it is gone from
        both. Use it within the student's forward (in `loss_term` or a hook), where DistributedDataParallel sees it.

        Args:
            name: an identifier, the same in every run.
            module: moved to the model's device. An attribute ``optimizer_options: dict`` overrides options of the
                optimizer, such as ``{"lr": 0.1, "weight_decay": 0.0}``; such a module has a parameter group of its own.
            callback: whose it is.

        Raises:
            CallbackError: the name is in use, or the model is wrapped already and the wrapper would not see it.
        """
        attribute = f"{OWNED}{name}"
        if not attribute.isidentifier() or hasattr(self.model, attribute):
            raise CallbackError(f"{type(self.model).__name__} cannot get a module {attribute!r}: take another name")
        if any(p.requires_grad for p in module.parameters()) and self._is_wrapped():
            raise CallbackError(
                f"{type(callback).__name__} brings parameters ({name}), but the model is wrapped for several ranks "
                "already, and their gradients would differ: attach before DistributedDataParallel or Accelerate's "
                "prepare; for fully_shard, make Session(model, callbacks), then shard, then session.bind(optimizer)"
            )
        device = next((parameter.device for parameter in self.model.parameters()), None)
        self.model.add_module(attribute, module.to(device=device).train(self.model.training))
        self._owned[attribute] = _Owned(weakref.ref(callback))

    def owns(self, callback: Lifecycle) -> bool:
        """Return whether a callback has brought parameters."""
        return any(owned.callback() is callback for owned in self._owned.values())

    def train_owned(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer train what callbacks brought; once for each optimizer.

        Raises:
            CallbackError: it cannot take it.
        """
        for attribute, owned in self._owned.items():
            if owned.optimizer is None or owned.optimizer() is not optimizer:
                take_parameters(optimizer, attribute, self.model.get_submodule(attribute))
                owned.optimizer = weakref.ref(optimizer)

    def follow(self, optimizer: torch.optim.Optimizer | None, progress: Callable[[], Progress]) -> None:
        """Call `Lifecycle.before_step` before each step of this optimizer from now on.

        Args:
            optimizer: the one that trains the model, itself and not what wraps it; None where the loop hides it.
            progress: returns where training is.

        Raises:
            CallbackError: a callback acts before the step, but this optimizer does not tell of it.
        """
        self._progress = progress
        if optimizer is not self.optimizer:
            self._unfollow()
            self.optimizer = optimizer
        if isinstance(optimizer, torch.optim.Optimizer) and self._taken_handle is None:
            self._taken_handle = after_each_step(optimizer, self._take_note)
        early = self._early()
        if not early or self._step_handle is not None:
            return
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CallbackError(
                f"{type(early[0]).__name__} acts on the gradients before each step, but {type(optimizer).__name__} is "
                "no torch.optim.Optimizer and does not tell of its steps"
            )
        self._step_handle = before_each_step(optimizer, self._before_step)

    def took(self, step: int) -> bool:
        """Return whether the optimizer took a step or a gradient scaler skipped it; True if the optimizer hides that.

        Args:
            step: the number of the last one, counted from 1 by a loop that counts skipped ones too.
        """
        return self._taken_handle is None or self._taken == step

    def lift(self) -> None:
        """Take away what stands in for parameters since the last forward; see `Lifecycle.stand_ins`."""
        self._stand_ins.lift()

    def tell_changed(self, progress: Progress) -> None:
        """Tell all callbacks that one of them has changed the structure of the model."""
        for callback in self._callbacks:
            callback.changed(progress)

    def check_masks(self) -> None:
        """Make sure that the masks are the same on all ranks; called on every rank after each change of masks.

        Raises:
            CallbackError: names a mask that differs.
        """
        if self.ranks is not None:
            buffers = self.model.named_buffers()
            bools = {name: b for name, b in buffers if name.endswith("_mask") and b.dtype is torch.bool}
            masks = {name: mask for name, mask in bools.items() if not is_sharded(mask)}
            refuse_differences(masks, "the mask", self.ranks)

    @contextmanager
    def aside(self) -> Generator[None]:
        """Run a block in which the model is itself: its hooks do nothing (while it is captured, or proven)."""
        callbacks, self._callbacks = self._callbacks, []
        self._stand_ins.lift()
        try:
            yield
        finally:
            self._callbacks = callbacks

    def at_end(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the last callback has left."""
        self._at_end.append(undo)

    def _disown(self, callback: Lifecycle) -> None:
        for attribute in [name for name, owned in self._owned.items() if owned.callback() in (None, callback)]:
            owned = self._owned.pop(attribute)
            model = self._model() if self._model is not None else None
            if model is None:
                continue
            optimizer = owned.optimizer() if owned.optimizer is not None else None
            if optimizer is not None:
                drop_parameters(optimizer, model.get_submodule(attribute).parameters())
            delattr(model, attribute)

    def _is_wrapped(self) -> bool:
        in_ddp = self._reducer is not None and self._reducer() is not None
        return in_ddp or any(map(is_sharded, self.model.parameters()))

    def _hook(self) -> None:
        before = self.model.register_forward_pre_hook(self._take_items, with_kwargs=True)
        after = self.model.register_forward_hook(self._add_terms, with_kwargs=True)
        self._handles = [before, after, *self._stand_ins.hook(self.model, lambda: self._callbacks)]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stand_ins.forget()
        self._unfollow()
        while self._at_end:
            self._at_end.pop()()

    def _unfollow(self) -> None:
        for handle in (self._step_handle, self._taken_handle):
            if handle is not None:
                handle.remove()
        self._step_handle = self._taken_handle = self._taken = self.optimizer = None

    def _early(self) -> list[Lifecycle]:
        """Return the callbacks that act before a step."""
        return [callback for callback in self._callbacks if callback.acts_before_step]

    def _before_step(self) -> None:
        if self._progress is not None:
            progress = self._progress()
            for callback in self._early():
                callback.before_step(progress)

    def _take_note(self) -> None:
        self._taken = self._progress().step + 1 if self._progress is not None else None

    @run_eagerly
    def _take_items(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep from the model what is not for it.

        ``num_items_in_batch`` is kept from the head, so that it returns a mean whatever it would do with it.
        """
        self._items = None
        if self._reducer is None and (reducer := active_data_parallel()) is not None:
            self._reducer = weakref.ref(reducer)
        rest = kwargs
        for callback in self._callbacks:
            rest = callback.take_inputs(module, args, rest)
        counted = bool(self._callbacks) and "num_items_in_batch" in rest
        if counted and (module.training or not accepts(module, "num_items_in_batch")):
            rest = dict(rest)
            items = rest.pop("num_items_in_batch")
            self._items = items if module.training else None
        return None if rest is kwargs else (args, rest)

    @run_eagerly
    def _add_terms(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not module.training or not self._callbacks:
            return None
        # by name: sums of floats depend on their order, and that of the callbacks must not matter
        changing = sorted((c for c in self._callbacks if c.changes_loss), key=lambda c: type(c).__qualname__)
        loss = loss_of(output)
        if loss is None:
            if changing:
                raise CallbackError(
                    f"{type(changing[0]).__name__} adds to the loss of {type(module).__name__}, but it returned none: "
                    "pass labels= to the model (no label smoothing or compute_loss_func in the Trainer), or, where "
                    "your loop owns the loss, call the callback's loss(...) there"
                )
            return None
        labels = argument(module, args, kwargs, "labels")
        call = StudentCall(module, args, kwargs, labels if isinstance(labels, torch.Tensor) else None, output, loss)
        total = combined_loss(call, changing)
        if self._items is not None:
            total = share_of_step(total, counted_labels(call), self._items)
        return None if total is loss else with_loss(output, total)

    def __deepcopy__(self, memo: dict[int, Any]) -> Student:
        """A copy of the model is a model of its own: its copied hook does nothing and drags no teacher along."""
        return Student(None)

    def __reduce__(self) -> tuple[type[Student], tuple[None]]:
        """Pickle as the copy: without callbacks."""
        return Student, (None,)


def _layers(model: nn.Module) -> Generator[nn.Module]:
    """Go through a model's wrappers, DistributedDataParallel and torch.compile, down to the model."""
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        yield model
        inner = compiled_source(model)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
