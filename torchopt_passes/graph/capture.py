"""Capture: a model becomes a trainable graph of ATen operations, with the very parameters of the model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.align import merge_modes
from torchopt_passes.graph.capture_proof import prove_capture
from torchopt_passes.graph.captured import FACTS, CapturedModule, build_captured
from torchopt_passes.graph.guards import parse_guard
from torchopt_passes.graph.modes import set_mode
from torchopt_passes.graph.tensors import find_owner
from torchopt_passes.graph.tracing import Call, trace

__all__ = ["CapturedModule", "capture", "release"]

Dynamic = Literal["auto", "all", False] | dict[str, Any]


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic: Dynamic = "auto",
    prove: bool = True,
) -> CapturedModule:
    """Capture a model as a trainable graph of ATen operations.

    Args:
        model: the model; it is left as it was.
        args: positional example inputs, such as ``(x,)`` with x float32 ``(N, C, H, W)``.
        kwargs: keyword example inputs, such as a batch with ``labels``; what is not given is no input of the graph.
        dynamic: ``"auto"`` keeps the batch, and the length of sequences, open where the model allows it
            (``meta["dynamic_dims"]`` tells which); ``"all"`` tries every size, of images too; False fixes every size;
            a dict is ``torch.export``'s ``dynamic_shapes`` by input name.
        prove: run model and graph on the example inputs, in both modes, and compare; False for models too large to
            run here.

    Returns:
        The graph, in the mode (train or eval) of the model and of each of its submodules, until the next ``train()``.

    Raises:
        CaptureError: the model cannot be captured, or the graph does not compute what the model does; names the line
            of the user's code, and a way out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.5))
        >>> graph_module = capture(model, (torch.ones(3, 4),))
        >>> graph_module.get_parameter("0.weight") is model[0].weight
        True
        >>> x = torch.ones(5, 4)
        >>> bool((graph_module.eval()(x) == model.eval()(x)).all())
        True
    """
    call = Call.of(model, args, kwargs or {}, dynamic)
    train = trace(model, call, training=True)
    evaluation = trace(model, call, training=False)
    merge_modes(train.module, evaluation.module)
    dims = {k: tuple(d for d in v if d in evaluation.dynamic_dims[k]) for k, v in train.dynamic_dims.items()}
    codes = dict.fromkeys((*_fixed_sizes(call, dims), *train.guards, *evaluation.guards))
    meta = {
        "source": model,
        "example_inputs": pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {})),
        "signature": call.signature,
        "dynamic_dims": dims,
        "guards": tuple(guard for code in codes if (guard := parse_guard(code)) is not None),
        "facts": {name: getattr(model, name) for name in FACTS if hasattr(model, name)},
    }
    root = _same_state(model)
    _add_constants(root, train.module)
    captured = build_captured(root, train.module.graph, type(model).__name__, meta)
    if prove:
        prove_capture(model, captured, call)
    set_mode(captured.graph, lambda node: model.get_submodule(_module_of(node)).training)
    captured.recompile()
    return captured


def release(graph_module: CapturedModule) -> nn.Module:
    """Return the source module, holding the parameters and buffers of the captured graph.

    They are shared from the start; what ``.to()`` or a pass replaced in the graph is put into the source here. Where
    channels were removed the source gets the smaller tensors; its attributes (``out_features``, ``num_heads``) are made
    to fit by applying the plan of the removal to the source instead: ``plan.apply(module)``.

    Args:
        graph_module: a captured module.

    Returns:
        The module that was captured, in the graph's mode.

    Raises:
        CaptureError: a pass has taken state out of the graph that the source computes with (a folded batch norm, say);
            nothing was changed.
    """
    source = graph_module.source
    ours, theirs = _tensors(graph_module), _tensors(source)
    gone = [name for name in theirs if name not in ours]
    if gone:
        raise CaptureError(
            f"the graph has no {gone[0]!r} any more ({len(gone)} names): a pass folded or replaced it, so the source "
            "cannot compute what the graph does; apply the plan of that pass to the source, or keep the graph"
        )
    for fqn, tensor in theirs.items():
        if ours[fqn] is not tensor:
            owner, name = find_owner(source, fqn)
            table = owner._parameters if name in owner._parameters else owner._buffers
            table[name] = ours[fqn]  # pyright: ignore[reportArgumentType]
    return source.train(graph_module.training)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _module_of(node: fx.Node) -> str:
    """Return the path of the module whose forward made a node: what the user froze with ``eval()`` starts frozen."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values())), "")


def _same_state(module: nn.Module, made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Return a tree of bare modules with the names, tensors, modes and shared modules of a module's tree."""
    made = {} if made is None else made
    if module not in made:
        twin = made[module] = nn.Module()
        twin._parameters = dict(module._parameters)
        twin._buffers = dict(module._buffers)
        twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        twin.training = module.training
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _same_state(child, made)
    return made[module]


def _add_constants(root: nn.Module, exported: fx.GraphModule) -> None:
    """Add what tracing made besides the model's own state; none of it belongs to the state dict."""
    own = _tensors(root)
    for node in exported.graph.find_nodes(op="get_attr"):
        fqn = str(node.target)
        if fqn not in own:
            path, _, name = fqn.rpartition(".")
            tensor: Any = getattr(exported.get_submodule(path), name)
            root.get_submodule(path).register_buffer(name, tensor, persistent=False)
            own[fqn] = tensor


def _fixed_sizes(call: Call, dynamic_dims: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the conditions that the sizes of the example, where they did not stay open, are those of every call."""
    given = dict(zip(call.signature.positional, call.args, strict=True)) | call.kwargs
    return [
        f"L['{name}'].size()[{dim}] == {size}"
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
        for dim, size in enumerate(value.shape)
        if dim not in dynamic_dims.get(name, ())
    ]
