"""capture: from a model to a trainable ATen graph with the same parameters, names, signature and behaviour."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchopt_passes._compat import share_codegen
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.modes import mark_known, set_mode

__all__ = ["CapturedModule", "capture", "release"]


class CapturedModule(fx.GraphModule):
    """A captured model: an ``fx.GraphModule`` that is trained, evaluated, copied and rewritten like the source."""

    def train(self, mode: bool = True) -> CapturedModule:
        """Switch every mode-dependent op of the graph; returns self."""
        set_mode(self, mode)
        return self

    def eval(self) -> CapturedModule:
        """Switch to evaluation mode; returns self."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        for name in ("_in_spec", "_out_spec"):  # shared: nobody changes them, and copying a leaf warns
            spec = self.__dict__.get(name)
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)  # pyright: ignore[reportReturnType]

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("meta", {}).get("attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)


def _take_state(target: nn.Module, source: nn.Module) -> None:
    """Give a module the tree, parameters and buffers of another: the same tensors, the same names."""
    for table in ("_parameters", "_buffers"):
        own = getattr(target, table)
        taken = getattr(source, table)
        setattr(target, table, {**taken, **{k: v for k, v in own.items() if k not in taken}})
    target._non_persistent_buffers_set = source._non_persistent_buffers_set | {
        name for name in target._buffers if name not in source._buffers
    }
    modules = dict(target._modules)
    target._modules.clear()
    for name, child in source._modules.items():
        if child is not None:
            target._modules[name] = modules.get(name) or nn.Module()
            _take_state(target._modules[name], child)
    for name, child in modules.items():
        target._modules.setdefault(name, child)


_ATTRIBUTES = ("config", "main_input_name", "can_return_loss")


def capture(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, dynamic: Any = "auto"
) -> CapturedModule:
    """Capture a model as a trainable graph."""
    kwargs = dict(kwargs or {})
    was = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    if use_cache:
        config.use_cache = False  # pyright: ignore
    shapes = pytree.tree_map(
        lambda t: {i: torch.export.Dim.AUTO for i in range(t.dim())} if isinstance(t, torch.Tensor) else None,
        (args, kwargs),
    )
    names = list(dict(model.named_parameters()))
    dynamic_shapes = (tuple(shapes[0]) if not kwargs else None) if args else shapes[1]
    if args and kwargs:
        import inspect

        bound = inspect.signature(model.forward).bind(*shapes[0], **shapes[1])
        dynamic_shapes = dict(bound.arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            exported = torch.export.export(
                model.train(), args, kwargs, dynamic_shapes=dynamic_shapes if dynamic == "auto" else None, strict=False
            )
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured: {error}") from error
    finally:
        for module, mode in was.items():
            module.training = mode
        if use_cache:
            config.use_cache = use_cache  # pyright: ignore
    graph_module = exported.module(check_guards=False)
    graph = graph_module.graph
    for node in graph.nodes:
        node.meta.pop("from_node", None)
    mark_known(graph)
    share_codegen(graph)
    captured = CapturedModule(graph_module, graph, class_name=type(model).__name__)
    _take_state(captured, model)
    captured.meta["example_inputs"] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    captured.meta["attributes"] = {n: getattr(model, n) for n in _ATTRIBUTES if hasattr(model, n)} | {
        "accepts_loss_kwargs": False
    }
    captured.meta["source"] = model
    del names
    return captured.train(was[model])


def release(graph_module: fx.GraphModule) -> nn.Module:
    """Return the source module of a captured graph, with the graph's parameters and buffers."""
    return graph_module.meta["source"]
