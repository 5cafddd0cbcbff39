"""What each weight matters for its layer's output: the diagonal of the Hessian of the output error, from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.tensors import aliases
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode
from torchopt_passes.graph.weights import MATRIX_OPS, weight_uses
from torchopt_passes.progress import track

__all__ = ["EMBEDDING_OPS", "input_moments"]

aten = torch.ops.aten
EMBEDDING_OPS: dict[object, tuple[int, ...]] = {aten.embedding.default: (0,)}
"""Embedding lookups -> the position of the weight."""

_ACTIVATION = {0: 1, 1: 0, 2: 1}  # position of the weight of a matrix operation -> of what it multiplies


def input_moments(graph_module: fx.GraphModule, batches: Iterable[Any] | None) -> dict[str, torch.Tensor]:
    """Return, for each weight, the mean square of the inputs that it multiplies.

    Formula: with y = W x, the error of the output is sum_i (dw_i . x)^2, whose Hessian has the diagonal
        h_ij = 2 E[x_j^2];
    returned is E[x_j^2], summed over the positions of the output that a weight takes part in and over its uses (tied,
    called twice), divided by the number of batches. For a convolution each place of the kernel has its own. An
    embedding's x is one-hot: h counts how often a row was read.

    Args:
        graph_module: a captured graph; it runs in eval mode and is as before afterwards.
        batches: of the context's `calibration`; they stream, one sum for each weight is kept.

    Returns:
        fqn -> shape of the weight, float32.

    Source:
        LeCun et al. 1990, "Optimal brain damage", section 2.2 (the diagonal); Frantar and Alistarh 2022, "Optimal brain
        compression", section 3 (of the layer's output error).

    Raises:
        ConfigError: there are no batches.
    """
    if batches is None:
        raise ConfigError("weighting by activations needs data: PassContext(calibration=[batch, ...])")
    count = 0
    with in_eval_mode(graph_module):
        watcher = _Watcher(graph_module, in_one_mode(graph_module.graph, training=False))
        with buffers_kept(graph_module):
            for batch in track(batches, "Watching inputs"):
                watcher.run(*flat_inputs(graph_module, *as_call(batch)), enable_io_processing=False)
                count += 1
    if not count:
        raise ConfigError("context.calibration is empty (a generator that was used up?)")
    return {fqn: total / count for fqn, total in watcher.moments.items()}


class _Watcher(fx.Interpreter):
    """Run a graph; where a weight is used, add d/dW of sum(op(x^2, W)), which is the sum of the x^2 it multiplies."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.moments: dict[str, torch.Tensor] = {}
        self._uses: dict[fx.Node, list[tuple[str, int]]] = {}
        self._leaves: dict[str, torch.Tensor] = {}
        self._first = aliases(module)
        self._views: set[fx.Node] = set()
        for fqn, node, position in weight_uses(module, MATRIX_OPS | EMBEDDING_OPS, graph):
            self._uses.setdefault(node, []).append((fqn, position))
            view = node.args[position]
            while isinstance(view, fx.Node):
                self._views.add(view)
                view = view.args[0] if view.args else None

    def run_node(self, n: fx.Node) -> Any:
        if n in self._views:  # from the parameter to where it is used: gradients come back on this way
            with torch.enable_grad():
                return super().run_node(n)
        for fqn, position in self._uses.get(n, ()):
            self._add(n, fqn, position)
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        fqn = self._first.get(str(target), str(target))
        if not isinstance(value, torch.nn.Parameter) or not value.is_floating_point():
            return value
        if fqn not in self._leaves:
            self._leaves[fqn] = value.detach().requires_grad_()
        return self._leaves[fqn]

    def _add(self, node: fx.Node, fqn: str, position: int) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in MATRIX_OPS:
            other = _ACTIVATION[position]
            args = tuple(a.detach().square() if i == other else a for i, a in enumerate(args))
        with torch.enable_grad():
            total: Any = node.target(*args, **kwargs).sum()  # pyright: ignore[reportCallIssue]
        (moment,) = torch.autograd.grad(total, self._leaves[fqn])
        moment = moment.float()
        self.moments[fqn] = self.moments[fqn] + moment if fqn in self.moments else moment
