"""What is deployed, in the one form every target reads: an exported inference program, and its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from torchopt_passes.deploy.calls import (
    batch_size,
    cause_of,
    eval_mode,
    example_call,
    named_inputs,
    resize_batch,
    run_source,
    without_cache,
)
from torchopt_passes.deploy.grids import clip_to_grids
from torchopt_passes.deploy.layers import count_layers, is_quantized
from torchopt_passes.deploy.metadata import TensorSpec
from torchopt_passes.deploy.stored_weights import gather_integers
from torchopt_passes.errors import ConfigError, ExportError, TorchOptError
from torchopt_passes.graph.inference import to_inference
from torchopt_passes.graph.verify import Inputs

__all__ = ["Dynamic", "Program", "precision_of", "read_program"]

Dynamic = bool | str | Mapping[str, Any]
"""``"auto"``, ``"batch"``, False (all sizes fixed), or the dynamic dims of each input by name, as ``torch.export``
takes them."""

Prepare = Callable[[fx.GraphModule], dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model ready to be written by a target.

    Args:
        source: the module that the artefact must equal.
        exported: the inference program: tensors by position in, a tuple of tensors out.
        example: a call of the source, as ``(args, kwargs)``.
        inputs: the program's inputs, in order.
        outputs: the program's outputs, in order.
        dropped_inputs: inputs of the source that the kept outputs do not depend on.
        dropped_outputs: outputs of the source that were left out.
        precision: ``"int8"`` or the dtype of the weights.
        device: ``"cpu"`` or ``"cuda"``.
        layers: how many layers are quantized and how many float, by kind.
        facts: what a target did to the graph, for the report.
        calibration: calls of the source, for a target that measures ranges itself.
    """

    source: nn.Module
    exported: ExportedProgram
    example: Inputs
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dropped_inputs: tuple[str, ...]
    dropped_outputs: tuple[str, ...]
    precision: str
    device: str
    layers: dict[str, int]
    facts: dict[str, str] = field(default_factory=dict[str, str])
    calibration: tuple[Inputs, ...] = ()

    def select(self, call: Inputs) -> list[torch.Tensor]:
        """Return the tensors of a call of the source that the program takes, in order."""
        named = named_inputs(self.source, call)
        return [named[spec.name] for spec in self.inputs]


def read_program(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic: Dynamic = "auto",
    outputs: tuple[str, ...] | None = None,
    prepare: Prepare | None = None,
) -> Program:
    """Export a module, captured graph or converted graph for inference; it is left as it was.

    Args:
        module: what to deploy.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            may be left out for a captured graph, which remembers its own.
        dynamic: ``"auto"`` leaves open the batch (dim 0 of every tensor, when all agree) and the length of integer
            sequences (dim 1 of integer tensors); image sizes stay fixed, for speed. ``"batch"`` leaves the batch open
            alone, False fixes everything.
        outputs: which outputs to keep; all but ``loss`` when None.
        prepare: rewrites the inference graph for a target, and returns facts for the report.

    Raises:
        ConfigError: example inputs are missing or do not fit the module's ``forward``.
        ExportError: ``torch.export`` cannot trace the module.
    """
    call = example_call(module, example_inputs)
    own: Program | None = None
    for roomy in _roomy(call) if dynamic in ("auto", "batch") else ():
        try:
            program = _read(module, roomy, dynamic, outputs, prepare)
        except TorchOptError:
            if roomy is call:
                raise
            continue
        if any("batch" in spec.shape for spec in program.inputs):
            return program
        own = program if roomy is call else own
    return own or _read(module, call, dynamic, outputs, prepare)


def _read(
    module: nn.Module, call: Inputs, dynamic: Dynamic, outputs: tuple[str, ...] | None, prepare: Prepare | None
) -> Program:
    # one object passed twice would be taken for one input
    call = cast("Inputs", pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), call))
    named = named_inputs(module, call)
    graph = module if isinstance(module, fx.GraphModule) else _trace(module, call, dynamic)
    inference = to_inference(graph, outputs)
    facts = clip_to_grids(inference) | gather_integers(inference) | (prepare(inference) if prepare is not None else {})
    names: tuple[str, ...] = inference.meta["input_names"]
    tensors = tuple(named.get(name) for name in names)
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"input {name!r} of {type(module).__name__} needs an example tensor; given: {sorted(named)}"
            )
    examples = cast("tuple[torch.Tensor, ...]", tensors)
    batch = batch_size(call)
    shapes = tuple(_dims(name, tensor, batch, dynamic) for name, tensor in zip(names, examples, strict=True))
    exported = _export(inference, examples, {}, shapes, type(module).__name__)
    nodes = exported.graph.find_nodes(op="placeholder")[-len(names) :]
    (output,) = exported.graph.find_nodes(op="output")
    results = run_source(module, call)
    symbols: dict[str, str] = {}
    kept: tuple[str, ...] = inference.meta["output_names"]
    devices = {tensor.device.type for tensor in examples}
    return Program(
        source=module,
        exported=exported,
        example=call,
        inputs=tuple(
            _spec(name, node, tensor, symbols, batch) for name, node, tensor in zip(names, nodes, examples, strict=True)
        ),
        outputs=tuple(
            _spec(name, node, results[name], symbols, batch) for name, node in zip(kept, output.args[0], strict=True)
        ),
        dropped_inputs=inference.meta["dropped_inputs"],
        dropped_outputs=inference.meta["dropped_outputs"],
        precision=precision_of(inference),
        device="cuda" if "cuda" in devices else "cpu",
        layers=count_layers(inference),
        facts=facts,
    )


def _trace(module: nn.Module, call: Inputs, dynamic: Dynamic) -> fx.GraphModule:
    signature = inspect.signature(module.forward)
    batch = batch_size(call)
    shapes = {
        name: pytree.tree_map_with_path(
            lambda path, leaf, name=name: _dims(_leaf_name(name, path), leaf, batch, dynamic), value
        )
        for name, value in signature.bind(*call[0], **call[1]).arguments.items()
    }
    with eval_mode(module), without_cache(module):
        exported = _export(module, call[0], call[1], shapes, type(module).__name__)
    return exported.module(check_guards=False)


def _leaf_name(name: str, path: Any) -> str:
    """Return the name `leaf_names` gives to the leaf at `path` of the argument `name`."""
    return "_".join([name, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)])


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, name: str
) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {name}: {cause_of(error)}. Ways out: dynamic=False, other example inputs, or "
            "deploying a submodule"
        ) from error


def _dims(name: str, value: Any, batch: int | None, dynamic: Dynamic) -> dict[int, Any] | None:
    """Return the dynamic dims of one input as ``torch.export`` takes them."""
    if not isinstance(value, torch.Tensor) or dynamic is False:
        return None
    if isinstance(dynamic, Mapping):
        return dynamic.get(name)
    if dynamic is not True and dynamic not in ("auto", "batch"):
        raise ConfigError(f'dynamic is "auto", "batch", False or a dict of dims by input name, not {dynamic!r}')
    dims: dict[int, Any] = {}
    if value.ndim > 0 and value.shape[0] == batch:
        dims[0] = Dim.AUTO
    if dynamic != "batch" and value.ndim > 1 and not value.is_floating_point():
        dims[1] = Dim.AUTO
    return dims


def _roomy(call: Inputs) -> list[Inputs]:
    """Return calls whose batch ``torch.export`` can leave open: it fixes sizes of 1, and any it takes for another.

    With strides of 48 n and 96, say, a batch of n = 2 is what makes them equal, and it stays 2; a prime is rarely met.
    """
    size = batch_size(call)
    if size is None:
        return [call]
    return [resize_batch(call, 2) if size == 1 else call, resize_batch(call, 7)]


def _spec(name: str, node: Any, example: torch.Tensor, symbols: dict[str, str], batch: int | None) -> TensorSpec:
    """Describe an input or output; open sizes are ``batch`` or called after the first input (``input_ids_1``)."""
    shape: list[int | str] = []
    for dim, size in enumerate(node.meta["val"].shape):
        is_batch = dim == 0 and example.shape[0] == batch
        default = "batch" if is_batch else f"{name}_{dim}"
        shape.append(int(size) if is_concrete_int(size) else symbols.setdefault(str(size), default))
    return TensorSpec(
        name=name,
        dtype=str(example.dtype).removeprefix("torch."),
        shape=tuple(shape),
        example=tuple(example.shape),
    )


def precision_of(module: nn.Module) -> str:
    """Return ``"int8"`` for a graph that is quantized, else the dtype of the module's first float tensor.

    Example:
        >>> precision_of(nn.Linear(2, 2).bfloat16())
        'bfloat16'
    """
    if isinstance(module, fx.GraphModule) and is_quantized(module):
        return "int8"
    dtypes = [tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return str(dtypes[0] if dtypes else torch.float32).removeprefix("torch.")
