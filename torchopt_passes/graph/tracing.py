"""One export of a model in one mode, with the model left exactly as it was, and errors a user can act on."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import io
import random
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchopt_passes._compat import pruned_names, size_guards
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.no_grad import inline_no_grad
from torchopt_passes.graph.signature import CallSignature

__all__ = ["Call", "Trace", "no_cache", "trace"]


_STDLIB = sysconfig.get_path("stdlib").replace("\\", "/")


@dataclass(frozen=True)
class Call:
    """An example call of a model, ready for export.

    Args:
        args: positional inputs; a batch of one is doubled, since export would fix the size 1.
        kwargs: keyword inputs, likewise.
        shapes: the choices of dynamic shapes to try, most dynamic first.
        signature: how the graph is called.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[Any, ...]
    signature: CallSignature

    @classmethod
    def of(cls, model: nn.Module, args: Any, kwargs: dict[str, Any], dynamic: Any) -> Call:
        """Check an example call against the model's forward and choose the dynamic shapes.

        Raises:
            CaptureError: the inputs do not fit the forward.
        """
        if not isinstance(args, tuple):
            raise CaptureError(f"args must be a tuple of positional inputs, not a {type(args).__name__}: (x,)")
        args = cast("tuple[Any, ...]", args)
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(f"{type(model).__name__}.forward cannot be called so: {error}") from error
        signature = CallSignature.of(model.forward, type(model).__name__, args, kwargs)
        if dynamic in ("auto", "all"):
            args, kwargs = _without_batch_of_one(args, kwargs)
            choices = (_every_dim, _open_dims, _batch_dim)[dynamic == "auto" :]
            shapes = (*(_shapes(signature.positional, args, kwargs, choose) for choose in choices), None)
        elif dynamic is False:
            shapes = (None,)
        else:
            shapes = (dynamic,)
        return cls(args, kwargs, shapes, signature)


@dataclass(frozen=True)
class Trace:
    """An exported graph with the model's own parameters, and the sizes that it is good for.

    Args:
        module: the graph.
        dynamic_dims: input name -> the dims that stayed dynamic.
        guards: conditions on the sizes of the inputs, as code of torch.export.
    """

    module: fx.GraphModule
    dynamic_dims: dict[str, tuple[int, ...]]
    guards: tuple[str, ...]


def trace(model: nn.Module, call: Call, *, training: bool) -> Trace:
    """Export a model in one mode.

    Raises:
        CaptureError: names the user's line and a way out.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with no_cache(model), _own_random_state() as drawn:
            model.train(training)
            with _layerdrop(training), _symbolic_len(model):
                exported = _export(model, call, training)
            _refuse_python_random(model, call, drawn())
    finally:
        for module, mode in modes.items():
            module.training = mode
    module = exported.module(check_guards=False)
    inline_no_grad(module)
    return Trace(module, _dynamic_dims(exported), size_guards(exported))


def _refuse_python_random(model: nn.Module, call: Call, drew: bool) -> None:
    """What Python or numpy draws while tracing would be the same in every run of the graph."""
    if not drew:
        return
    with _own_random_state() as drawn:
        where = _where_drawn(model, call, drawn)
    raise CaptureError(
        f"{type(model).__name__} draws random numbers in Python{where}: a graph would draw the same ones in every run; "
        "switch that off in its config (Transformers' SpecAugment: mask_time_prob=0, mask_feature_prob=0, or "
        "apply_spec_augment=False), or capture a submodule without it"
    )


def _export(model: nn.Module, call: Call, training: bool) -> torch.export.ExportedProgram:
    failure: Exception | None = None
    for shapes in call.shapes:
        try:
            with _quiet_export(model):
                return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:  # whatever export raises: the next, less dynamic choice may work
            failure = failure or error
            if _is_data_dependent(error):
                break
    raise CaptureError(_explain(model, failure or RuntimeError("no shapes"), training)) from failure


@contextmanager
def _quiet_export(model: nn.Module) -> Generator[None]:
    """Hold back what export says of its own doings: the graph of a failed attempt, and attributes that are computed.

    Those are the flat weights of an RNN, and the weights that hooks of ``torch.nn.utils.prune`` put together in every
    forward: the graph computes them, from the same parameters and masks.
    """
    computed = {f"{path}.{name}".strip(".") for path, module in model.named_modules() for name in pruned_names(module)}
    known = "|".join([r"[^ ,]*_flat_weights[^ ,]*", *(re.escape(f"self.{fqn}") for fqn in sorted(computed))])
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        message = rf"The tensor attributes? ({known})(, ({known}))* (was|were) assigned"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def _explain(model: nn.Module, error: Exception, training: bool) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    text = str(error)
    if _is_data_dependent(error) and training and (norms := _cumulative_norms(model)):
        way = (
            f"the batch norm {norms[0]!r} has momentum=None, so it counts batches in Python to average over them: set "
            f"the momentum of {', '.join(norms)} to a number; ReestimateBatchNorm measures the statistics afterwards"
        )
    elif _is_data_dependent(error):
        way = "its Python branches on the values of a tensor: capture a submodule that does not, or use torch.where"
    elif "kwarg" in text or "unexpected keyword" in text:
        way = "check the example inputs"
    else:
        way = "capture the submodule that does the work, or change that line to tensor operations"
    return f"{type(model).__name__} cannot be captured in {_mode(training)} mode{where}: {lines[0]}. Way out: {way}"


def _cumulative_norms(model: nn.Module) -> list[str]:
    """Return the batch norms whose running statistics weigh every batch alike."""
    return [
        path or type(module).__name__
        for path, module in model.named_modules()
        if getattr(module, "momentum", 0.0) is None and getattr(module, "num_batches_tracked", None) is not None
    ]


def _is_data_dependent(error: Exception) -> bool:
    return "GuardOnDataDependent" in type(error).__name__ or "data-dependent" in str(error)


def _is_machinery(filename: str) -> bool:
    inside = filename.replace("\\", "/")
    if "/torch/" in inside or "/torchopt_passes/" in inside or inside.startswith("<"):
        return True
    return inside.startswith(_STDLIB) and "/site-packages/" not in inside


def _mode(training: bool) -> str:
    return "train" if training else "eval"


def _open_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Batch, and the length of sequences: of token ids and masks, of waveforms, of embedded sequences."""
    return tuple(range(min(tensor.ndim, 2 if tensor.ndim <= 3 else 1)))


def _every_dim(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(tensor.ndim))


def _batch_dim(tensor: torch.Tensor) -> tuple[int, ...]:
    return (0,) if tensor.ndim else ()


def _shapes(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], choose: Any) -> Any:
    auto = torch.export.Dim.AUTO

    def spec(value: Any) -> Any:
        return dict.fromkeys(choose(value), auto) if isinstance(value, torch.Tensor) else None

    positional, named = pytree.tree_map(spec, args), pytree.tree_map(spec, kwargs)
    if not kwargs:
        return tuple(positional)
    return dict(zip(names, positional, strict=False)) | named


def _without_batch_of_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, (args, kwargs))


def _dynamic_dims(exported: torch.export.ExportedProgram) -> dict[str, tuple[int, ...]]:
    inputs = exported.graph_signature.user_inputs
    found: dict[str, tuple[int, ...]] = {}
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor):
            found[node.name] = tuple(d for d, size in enumerate(value.shape) if not is_concrete_int(size))
    return found


@contextmanager
def no_cache(model: nn.Module) -> Generator[None]:
    """A decoder's cache is state between calls, which a graph has none of: switch ``use_cache`` off meanwhile."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def _symbolic_len(model: nn.Module) -> Generator[None]:
    """Give the model's code a ``len`` whose result need not be an int: for an int, export would fix that size.

    Only the modules (files) that define the model's classes see it, and only while tracing.
    """

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else builtins.len(value)

    files = {type(module).__module__ for module in model.modules()}
    scopes = [vars(sys.modules[name]) for name in files if name in sys.modules and not name.startswith("torch.")]
    scopes = [scope for scope in scopes if "len" not in scope]
    for scope in scopes:
        scope["len"] = length
    try:
        yield
    finally:
        for scope in scopes:
            scope.pop("len", None)


@contextmanager
def _own_random_state() -> Generator[Callable[[], bool]]:
    """Keep every random state as it was, and tell whether Python or numpy numbers were drawn."""
    import numpy as np

    ours: Any = random.getstate()
    theirs: Any = np.random.get_state()

    def drawn() -> bool:
        now: Any = np.random.get_state()
        return random.getstate() != ours or now[2] != theirs[2] or bool((now[1] != theirs[1]).any())

    with torch.random.fork_rng():
        try:
            yield drawn
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)


def _where_drawn(model: nn.Module, call: Call, drawn: Callable[[], bool]) -> str:
    """Run the model once more, line by line, and return the line of its own code that draws a number outside of torch.

    Numpy's generators are compiled code that no profiler sees; their state after each line tells.
    """
    found: list[str] = []
    last: dict[Any, int] = {}

    def watch(frame: Any, event: str, _: Any) -> Any:
        if found or _is_machinery(frame.f_code.co_filename) or _is_library(frame):
            return None
        if event in ("line", "return") and frame in last and drawn():
            found.append(f", at {frame.f_code.co_filename}:{last[frame]}")
        last[frame] = frame.f_lineno
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        with torch.no_grad(), contextlib.suppress(Exception):
            model(*call.args, **call.kwargs)
    finally:
        sys.settrace(before)
    return found[0] if found else ""


def _is_library(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("random", "numpy")


def _caller() -> str:
    frame = next(f for f in reversed(traceback.extract_stack()) if not _is_machinery(f.filename))
    return f"{frame.filename}:{frame.lineno}"


class _Layerdrop(TorchFunctionMode):
    """Decide ``torch.rand([]) < p`` where p is 0: Transformers asks so for every layer in training.

    A random number in [0, 1) is never below 0; export leaves the draw out of the graph, since nothing reads it. Layer
    drop with another probability chooses in Python which layers run, which no graph can.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[torch.Tensor] = []
        self._compared: list[tuple[torch.Tensor, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("lt", "__lt__") and any(args[0] is drawn for drawn in self._drawn):
            probability = float(args[1])
            if probability <= 0:
                return False
            compared = func(*args, **(kwargs or {}))
            self._compared.append((compared, probability))
            return compared
        if func is torch.Tensor.__bool__:
            for compared, probability in self._compared:
                if args[0] is compared:
                    raise CaptureError(
                        f"layer drop with probability {probability} decides in Python which layers run, at "
                        f"{_caller()}: a graph cannot; set layerdrop=0 in the model's config"
                    )
        value = func(*args, **(kwargs or {}))
        if func is torch.rand and value.ndim == 0:
            self._drawn.append(value)
        return value


def _layerdrop(training: bool) -> contextlib.AbstractContextManager[Any]:
    return _Layerdrop() if training else contextlib.nullcontext()
