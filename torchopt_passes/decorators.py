"""The door by decorator: models that come out optimized wherever they are made."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast, overload

import torch
from torch import fx, nn

from torchopt_passes.errors import ConfigError, PlanError, ProofError
from torchopt_passes.graph.base import GraphPass, PassContext, on_copy
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.capture import CapturedModule, capture
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.registry import make_pass
from torchopt_passes.graph.report import PassReport
from torchopt_passes.graph.tensors import named_tensors
from torchopt_passes.recipe import Recipe, load_recipe

__all__ = ["OptimizeDecorator", "OptimizeResult", "optimize"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Passes = GraphPass | Recipe | str | Path | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class OptimizeResult:
    """What was done to a model: its attribute ``torchopt_result``.

    Args:
        plan: what was decided and applied.
        report: what was considered, changed, skipped, and the proof.
    """

    plan: Plan
    report: PassReport

    @property
    def modified(self) -> bool:
        """Whether the model differs from what it was made as."""
        return self.report.modified

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizeResult:
        """Return itself: nothing in it changes, and masks are large."""
        del memo
        return self


def optimize(
    passes: Passes,
    *,
    example_inputs: Any,
    context: PassContext | Callable[[Any], PassContext] | None = None,
) -> OptimizeDecorator:
    """Decorate a model class, or a function that returns a model: every model it makes comes out optimized.

    A new model is captured, the passes run and are proven on a copy, and their plan is applied to the model itself.
    **Where every edit can be applied to a source module** (pruning, fusing batch norms) **the result is that model**,
    an instance of its class. **Otherwise** (fake-quantization, int8) **it is the rewritten captured graph**, a
    `CapturedModule`, which is called the same way. Either has ``torchopt_result``: the plan, and the report with the
    proof.

    Of a class, construction is what is decorated, once for each instance, a subclass's too: ``super().__init__`` runs
    as it ever did, and copies and unpickled instances are as they were. ``from_pretrained`` and
    ``load_from_checkpoint`` optimize when the weights are there. Weights that are loaded by hand later replace the
    optimized ones: load them in a function, and decorate that. Zeros are not kept in training: `GradualPruning` does.
    A class of a library is decorated as a subclass: ``Small = optimize(...)(Bert)`` leaves ``Bert`` as it is.

    Args:
        passes: a pass, a `Pipeline`, a `Recipe` without callbacks, the path of one, or recipe data such as
            ``"fuse_batch_norm"`` or ``[{"prune_weights": {"sparsity": 0.5}}]``.
        example_inputs: to capture and prove with: a tensor, a tuple of positional arguments, a dict of keyword
            arguments, ``(args, kwargs)``, or a function from the new model to one of these.
        context: calibration data, skip patterns, seed: a `PassContext`, or a function from the new model to one.

    Returns:
        The decorator. A decorated function is typed to return its model or a `CapturedModule`. A decorated class keeps
        its type, since only the passes know: with passes that rewrite the graph alone, decorate a function instead.

    Raises:
        ConfigError: at the decoration: what is decorated is no module class or function, or the passes are wrong. When
            a model is made: it is no module, or has no weights yet (meta device).
        CaptureError, PassError, ProofError: when a model is made, from the capture and the passes.

    Example:
        >>> from torchopt_passes.graph.pruning import PruneWeights
        >>> @optimize(PruneWeights(sparsity=0.75), example_inputs=torch.ones(2, 4))
        ... class Model(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, width)
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> model = Model(8)
        >>> isinstance(model, Model), int((model.fc.weight == 0).sum())
        (True, 24)
        >>> model.torchopt_result.report.proof.status
        'proven'
    """
    return OptimizeDecorator(passes=_as_pass(passes), example_inputs=example_inputs, context=context)


@dataclass(frozen=True, kw_only=True)
class OptimizeDecorator:
    """The decorator that `optimize` returns.

    Args:
        passes: what is done to a new model.
        example_inputs: see `optimize`.
        context: see `optimize`.
    """

    passes: GraphPass
    example_inputs: Any
    context: PassContext | Callable[[Any], PassContext] | None = None

    @overload
    def __call__(self, target: type[ModuleT]) -> type[ModuleT]: ...
    @overload
    def __call__(self, target: Callable[P, ModuleT]) -> Callable[P, ModuleT | CapturedModule]: ...
    def __call__(self, target: Any) -> Any:
        """Decorate a module class, or a function that returns a module."""
        if isinstance(target, type):
            if not issubclass(target, nn.Module):
                raise ConfigError(f"@optimize decorates classes of nn.Module, which {target.__name__} is not")
            return _optimized_class(target, self)
        if not callable(target):
            raise ConfigError(f"@optimize decorates a class or a function, not {target!r}")

        @functools.wraps(target)
        def make(*args: Any, **kwargs: Any) -> Any:
            return self.run(target(*args, **kwargs))

        return make

    def run(self, model: Any) -> Any:
        """Return a model optimized: itself where the plan fits it, else the captured graph."""
        if not isinstance(model, nn.Module):
            raise ConfigError(f"@optimize: an nn.Module was to be made, not {model!r}")
        empty = next((fqn for fqn, tensor in named_tensors(model) if tensor.is_meta), None)
        if empty is not None:
            raise ConfigError(
                f"@optimize: {empty} of {type(model).__name__} has no values yet (meta device): load the weights in a "
                "function that returns the model, and decorate that"
            )
        given = self.example_inputs(model) if callable(self.example_inputs) else self.example_inputs
        context = self.context(model) if callable(self.context) else self.context or PassContext()
        call = as_call(given)
        if isinstance(model, fx.GraphModule):
            result = self.passes(model, replace(context, example_inputs=context.example_inputs or call))
            return _with_result(model, OptimizeResult(plan=result.plan, report=result.report))
        result = on_copy(self.passes)(capture(model, *call), context)
        done = OptimizeResult(plan=result.plan, report=result.report)
        if all(edit.on_source for edit in result.plan.edits):
            try:
                result.plan.apply(model)
            except PlanError as error:
                logger.warning("@optimize returns a captured graph, since the plan does not fit the model: %s", error)
            else:
                _check_equal(model, result.graph_module)
                return _with_result(model, done)
        return _with_result(result.graph_module, done)


def _as_pass(passes: Any) -> GraphPass:
    if isinstance(passes, GraphPass):
        return passes
    is_file = isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith((".yaml", ".yml", ".json")))
    if is_file or (isinstance(passes, Mapping) and "version" in passes):
        passes = load_recipe(cast("Any", passes))
    if not isinstance(passes, Recipe):
        return make_pass(passes)
    if passes.callbacks:
        names = [name for name, _ in passes.callbacks]
        raise ConfigError(f"@optimize runs passes; the recipe's callbacks {names} need training: use make_callbacks()")
    return passes.pipeline()


def _with_result(module: Any, result: OptimizeResult) -> Any:
    module.torchopt_result = result
    return module


def _check_equal(model: nn.Module, proven: nn.Module) -> None:
    """Check that the model has the tensors of the graph that was proven."""
    expected = dict(named_tensors(proven))
    for fqn, tensor in named_tensors(model):
        other = expected.get(fqn)
        if other is not None and not _equal(tensor, other):
            raise ProofError(f"@optimize: {fqn} of {type(model).__name__} is not what was proven on its graph")


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | ((left != left) & (right != right))).all())  # NaN equals NaN


_loading: ContextVar[Any] = ContextVar("_loading", default=None)


class _OptimizedType(type):
    """The type of decorated classes: construction, the whole chain of ``__init__``, is followed by the passes.

    A decorated class is an empty subclass of the class that it is made of, and comes right behind it in the method
    resolution order: so ``super().__init__()`` and ``super(Model, self).__init__()`` in its body both go on to its
    bases, though the name ``Model`` is bound to the subclass.
    """

    _torchopt: OptimizeDecorator

    def mro(cls) -> list[type]:
        order = super().mro()
        return [order[1], order[0], *order[2:]] if "_torchopt" in vars(cls) else order

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        return instance if _loading.get() is cls else cls._torchopt.run(instance)

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``, which ``inspect`` would not look at behind a ``__call__``."""
        signature = inspect.signature(cast("Any", cls).__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    # properties of the type come before class methods of that name: the passes run when the weights are there
    @property
    def from_pretrained(cls) -> Callable[..., Any]:
        return _then_optimize(cls, "from_pretrained")

    @property
    def load_from_checkpoint(cls) -> Callable[..., Any]:
        return _then_optimize(cls, "load_from_checkpoint")


def _then_optimize(cls: _OptimizedType, name: str) -> Callable[..., Any]:
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is None:
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
    original = vars(owner)[name].__get__(None, cls)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        token = _loading.set(cls)
        try:
            loaded = original(*args, **kwargs)
        finally:
            _loading.reset(token)
        if isinstance(loaded, tuple):  # Transformers, with output_loading_info=True
            model, *others = cast("tuple[Any, ...]", loaded)
            return (cls._torchopt.run(model), *others)
        return cls._torchopt.run(loaded)

    return load


def _optimized_class(target: type[nn.Module], decorator: OptimizeDecorator) -> type[nn.Module]:
    """Return the class whose instances come out optimized."""
    if "_torchopt" in vars(target):
        raise ConfigError(f"{target.__name__} is decorated already: give all passes to one @optimize, as a list")
    kind = type(target)
    meta = kind if issubclass(kind, _OptimizedType) else type("OptimizedType", (_OptimizedType, kind), {})
    body = {"__module__": target.__module__, "__qualname__": target.__qualname__, "_torchopt": decorator}
    try:
        return cast("type[nn.Module]", meta(target.__name__, (target,), body))
    except TypeError as error:
        raise ConfigError(
            f"@optimize cannot subclass {target.__name__} ({error}): decorate a function that returns the model"
        ) from error
