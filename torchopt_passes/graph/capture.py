"""Capture: a model becomes a trainable graph of ATen operations, with the very parameters of the model."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchopt_passes._compat import copy_graph
from torchopt_passes.graph.align import merge_modes
from torchopt_passes.graph.modes import set_mode
from torchopt_passes.graph.tensors import find_owner
from torchopt_passes.graph.tracing import Call, trace

__all__ = ["CapturedModule", "capture", "release"]

Dynamic = Literal["auto", False] | dict[str, Any]


class CapturedModule(fx.GraphModule):
    """A captured model: an ATen graph that trains, with the names and the very Parameter objects of the source.

    It is called as the source is, returns the source's output class, and goes wherever the source goes: ``Trainer``, DDP,
    ``deepcopy``, ``state_dict``. `train` and `eval` switch every mode-dependent operation. ``meta`` holds ``"source"`` (see
    `release`), ``"example_inputs"`` and ``"dynamic_dims"`` (input name -> dims that stayed dynamic).
    """

    def train(self, mode: bool = True) -> CapturedModule:
        """Switch to train mode (or to eval mode with ``mode=False``), in place, and return the module."""
        super().train(mode)
        if set_mode(self.graph, mode):
            self.recompile()
        return self

    def eval(self) -> CapturedModule:
        """Switch to eval mode, in place, and return the module."""
        return self.train(False)

    @property
    def source(self) -> nn.Module:
        """The module that was captured; it holds the same parameters."""
        return self.meta["source"]

    @property
    def config(self) -> Any:
        """The source's configuration, where it has one (Transformers)."""
        return self.source.config

    @property
    def main_input_name(self) -> str:
        """The first input that carries data, as Transformers' ``Trainer`` asks for it."""
        return getattr(self.source, "main_input_name", self.input_names[0])

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in the order of the graph."""
        return tuple(self.meta["input_names"])

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the captured forward takes ``num_items_in_batch`` (Transformers' ``Trainer`` asks)."""
        return "num_items_in_batch" in self.input_names

    @property
    def loss_type(self) -> str | None:
        """The source's kind of loss: Transformers' ``Trainer`` counts the labels of a causal language model by it."""
        return getattr(self.source, "loss_type", None)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer."""
        return next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        root = nn.Module()
        for table in ("_parameters", "_buffers", "_modules"):
            # one memo for all, so that tied parameters stay tied and the copied source shares them
            root.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        graph = copy_graph(self.graph)
        meta = copy.deepcopy({k: v for k, v in self.meta.items() if k not in _SHARED}, memo)
        shared = {k: v for k, v in self.meta.items() if k in _SHARED}
        other = _build(root, graph, type(self).__name__, meta | shared, self)
        memo[id(self)] = other
        modes = {name: child.training for name, child in self.named_modules()}
        for name, twin in other.named_modules():
            twin.training = modes[name]
        return other


_SHARED = ("example_inputs", "dynamic_dims", "input_names")


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic: Dynamic = "auto",
) -> CapturedModule:
    """Capture a model as a trainable graph of ATen operations.

    Args:
        model: the model; it is left as it was.
        args: positional example inputs, such as ``(x,)`` with x float32 ``(N, C, H, W)``.
        kwargs: keyword example inputs, such as a batch with ``labels``; what is not given here is not an input of the graph.
        dynamic: ``"auto"`` keeps the batch, and the length of sequences, open where the model allows it (``meta["dynamic_dims"]``
            tells which); False fixes every size; a dict is ``torch.export``'s ``dynamic_shapes`` by input name.

    Returns:
        The graph, in the mode (train or eval) of the model.

    Raises:
        CaptureError: the model cannot be captured; names the line of the user's code, and a way out.

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
    meta = {
        "source": model,
        "example_inputs": pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {})),
        "input_names": call.signature.names,
        "dynamic_dims": train.dynamic_dims,
    }
    captured = _build(train.module, train.module.graph, type(model).__name__, meta, model)
    captured.train(model.training)
    for name, child in model.named_modules():
        if name in dict(captured.named_modules()):
            captured.get_submodule(name).training = child.training
    return captured


def release(graph_module: CapturedModule) -> nn.Module:
    """Return the source module, holding the parameters and buffers of the captured graph.

    Parameters are shared from the start; what ``.to()`` or a pass replaced in the graph is put into the source here.

    Args:
        graph_module: a captured module.

    Returns:
        The module that was captured, in the graph's mode.

    Raises:
        PlanError: the graph has a parameter that the source has no place for.
    """
    source = graph_module.source
    own = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    tensors = [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]
    for fqn, tensor in tensors:
        if fqn in own and own[fqn] is not tensor:
            owner, name = find_owner(source, fqn)
            table = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
            table[name] = tensor  # pyright: ignore[reportArgumentType]
    return source.train(graph_module.training)


def _build(root: nn.Module, graph: fx.Graph, name: str, meta: dict[str, Any], names: nn.Module) -> CapturedModule:
    """Make a captured module of a graph and all tensors of `root`; `names` says which are in the state dict."""
    module = CapturedModule(root, graph, name)
    persistent = set(names.state_dict())
    parameters = dict(names.named_parameters(remove_duplicate=False))
    tensors = {
        **dict(names.named_buffers(remove_duplicate=False) if names is not module else []),
        **parameters,
        **dict(root.named_buffers(remove_duplicate=False)),
        **dict(root.named_parameters(remove_duplicate=False)),
    }
    for fqn, tensor in tensors.items():
        owner, leaf = _owner(module, fqn)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner._buffers.pop(leaf, None)
            owner.__dict__.pop(leaf, None)
            owner.register_buffer(leaf, tensor, persistent=fqn in persistent)
    module.meta = meta
    return module


def _owner(module: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    path, _, leaf = fqn.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    return owner, leaf
