"""Shapes and dtypes of every value of a graph, computed anew: what `torch.export` leaves in ``node.meta["val"]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchopt_passes._compat import fake_tensor_mode, flat_inputs

__all__ = ["fill_values"]


def fill_values(graph_module: fx.GraphModule) -> None:
    """Give every node its ``val``, a tensor without data, from the graph's example inputs.

    Args:
        graph_module: a captured graph; it computes nothing real, and no state changes.
    """
    flat = flat_inputs(graph_module, *graph_module.meta["example_inputs"])
    mode = fake_tensor_mode()
    inputs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, flat)
    with torch.no_grad(), mode:
        _Recorder(graph_module, mode).run(*inputs, enable_io_processing=False)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: Any) -> None:
        super().__init__(module)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value
