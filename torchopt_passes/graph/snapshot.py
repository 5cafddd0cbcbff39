"""A snapshot of a module: what a failed pass is rolled back to, and the truth about what a pass changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import copy_graph

__all__ = ["Snapshot"]

_TABLES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """The state of a module at one moment: tree, attributes, tensors (values and objects), gradients, graph.

    Args:
        module: any module; for an ``fx.GraphModule`` the graph is kept too. Configurations that its parts share (plain
            objects with attributes) are kept one level deep.
        optimizer: an optimizer whose state is kept too; its tensors are not copied, so they must be replaced, not
            changed in place.
        values: whether to keep the values of tensors; without them, tensors must be replaced, not changed in place.

    Memory: one copy of every parameter and buffer, for as long as the snapshot lives, where it keeps the values.
    """

    def __init__(self, module: nn.Module, optimizer: Any = None, *, values: bool = True) -> None:
        self._module = module
        self._attributes = {child: _attributes(child) for child in module.modules()}
        self._classes = {child: type(child) for child in self._attributes}
        configs = {id(c): c for attributes in self._attributes.values() for c in attributes.values() if _is_config(c)}
        self._configs = [(config, dict(vars(config))) for config in configs.values()]
        self._optimizer = optimizer
        self._optimizer_state = {} if optimizer is None else {p: dict(s) for p, s in optimizer.state.items()}
        self._optimized = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
        tensors = {id(t): t for child in module.modules() for t in _tensors(child)}
        self._tensors = [
            (t, t.detach().clone() if values else t.detach(), t.requires_grad, t.grad) for t in tensors.values()
        ]
        self._graph = copy_graph(module.graph) if isinstance(module, fx.GraphModule) else None
        self._names = _names(module)

    def restore(self) -> None:
        """Put the module back: the same tensor objects with the same values, the same tree, the same graph."""
        for child, saved in self._attributes.items():
            for name in set(child.__dict__) - set(saved):
                del child.__dict__[name]
            child.__dict__.update({name: _thaw(name, value) for name, value in saved.items()})
            if type(child) is not self._classes[child]:
                child.__class__ = self._classes[child]
        for config, saved in self._configs:
            now = vars(config)
            if now.keys() != saved.keys() or any(now[name] is not value for name, value in saved.items()):
                now.clear()
                now.update(saved)
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._optimizer.state.update({parameter: dict(saved) for parameter, saved in self._optimizer_state.items()})
            for group, parameters in zip(self._optimizer.param_groups, self._optimized, strict=True):
                group["params"] = list(parameters)
        with torch.no_grad():
            for tensor, value, requires_grad, grad in self._tensors:
                if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                    tensor.data = value.clone()
                elif not torch.equal(tensor, value):
                    tensor.data.copy_(value)
                tensor.requires_grad_(requires_grad)
                tensor.grad = grad
        if isinstance(self._module, fx.GraphModule) and self._graph is not None:
            self._module.graph = copy_graph(self._graph)

    def changes(self) -> list[str]:
        """Return what differs now, by name: tensors added, removed or changed, and ``"graph"``."""
        found: list[str] = []
        values = {id(tensor): value for tensor, value, _, _ in self._tensors}
        now = _names(self._module)
        found += [f"{name} (removed)" for name in self._names if name not in now]
        for name, tensor in now.items():
            if name not in self._names:
                found.append(f"{name} (added)")
                continue
            before = values[id(self._names[name])]
            same = before.shape == tensor.shape and before.dtype == tensor.dtype
            if not same or not torch.equal(before, tensor):
                found.append(name)
        if self._graph is not None and _signature(self._graph) != _signature(self._module.graph):  # pyright: ignore
            found.append("graph")
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    skip = ("_graph", "_code") if isinstance(module, fx.GraphModule) else ()
    return {
        name: dict(value) if name in _TABLES else value for name, value in module.__dict__.items() if name not in skip
    } | ({"_non_persistent_buffers_set": set(module._non_persistent_buffers_set)})


def _thaw(name: str, value: Any) -> Any:
    """Copy what later edits would change in place, so that a snapshot can be restored twice."""
    return copy.copy(value) if name in _TABLES or name == "_non_persistent_buffers_set" else value


def _is_config(value: Any) -> bool:
    """Return whether a module's attribute is an object of settings, which other modules may share."""
    if isinstance(value, nn.Module | torch.Tensor | torch.dtype | torch.device | fx.Graph) or callable(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not type(value).__module__.startswith("torch.")


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]


def _names(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _signature(graph: fx.Graph) -> list[tuple[str, str, str, str]]:
    return [(n.name, n.op, str(n.target), f"{n.args}{n.kwargs}") for n in graph.nodes]
