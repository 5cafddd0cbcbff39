"""Which parameters are the weights of matrix operations, read from the graph, not guessed from module types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from torchopt_passes.graph.tensors import aliases

__all__ = ["MATRIX_OPS", "VIEW_OPS", "input_dim", "matrix_weights", "parameter_behind", "weight_uses"]

aten = torch.ops.aten

MATRIX_OPS: dict[object, tuple[int, ...]] = {
    aten.linear.default: (1,),
    aten.conv1d.default: (1,),
    aten.conv2d.default: (1,),
    aten.conv3d.default: (1,),
    aten.conv1d.padding: (1,),
    aten.conv2d.padding: (1,),
    aten.conv3d.padding: (1,),
    aten.convolution.default: (1,),
    aten.conv_transpose1d.default: (1,),
    aten.conv_transpose2d.input: (1,),
    aten.conv_transpose3d.input: (1,),
    aten.addmm.default: (2,),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
}
"""Matrix operations -> the positions of the arguments that may be weights."""

VIEW_OPS: frozenset[object] = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.detach.default,
        aten.alias.default,
    }
)
"""Operations after which a weight is still that weight, only shaped or typed otherwise."""


def parameter_behind(node: object) -> str | None:
    """Return the fqn of the parameter that a node is a view of, through a fake-quantizer too, or None.

    Args:
        node: an argument of a matrix operation.
    """
    while isinstance(node, fx.Node) and (node.op == "call_module" or node.target in VIEW_OPS):
        node = node.args[0]  # the only modules that a captured graph calls are fake-quantizers
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def weight_uses(
    graph_module: fx.GraphModule,
    operations: Mapping[object, tuple[int, ...]] = MATRIX_OPS,
    graph: fx.Graph | None = None,
) -> Iterator[tuple[str, fx.Node, int]]:
    """Yield each use of a parameter as a weight, in order: its first fqn, the operation, and the weight's position.

    Args:
        graph_module: owner of the parameters.
        operations: which operations have weights -> the positions of those.
        graph: the graph to look at; by default its own.
    """
    first = aliases(graph_module)
    parameters = {name for name, _ in graph_module.named_parameters()}
    for node in (graph or graph_module.graph).nodes:
        for position in operations.get(node.target, ()) if node.op == "call_function" else ():
            name = parameter_behind(node.args[position]) if position < len(node.args) else None
            fqn = first.get(name or "")
            if fqn in parameters:
                yield fqn, node, position


def matrix_weights(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return the fqn of every parameter used as the weight of a matrix operation -> the operations that use it.

    A tied parameter, and the parameter of a module that is called twice, is one entry with several uses.
    """
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for fqn, node, _ in weight_uses(graph_module):
        found[fqn].append(node)
    return dict(found)


def input_dim(node: fx.Node, fqn: str) -> int | None:
    """Return the dimension of weight `fqn` that a matrix operation sums over (its input dimension).

    1 for ``linear`` and convolutions, 0 for transposed convolutions; for plain matrix products it depends on the side
    and on transposes in between. None when a reshape hides it.
    """
    name = str(node.target)
    if "conv_transpose" in name:
        return 0
    if "linear" in name or "conv" in name:
        return 1
    position = next(p for p in MATRIX_OPS[node.target] if parameter_behind(node.args[p]) == fqn)
    ndim = node.args[position].meta["val"].ndim  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    dim = ndim - 1 if position == 0 else max(ndim - 2, 0)
    return _through_views(node.args[position], dim, ndim)


def _through_views(node: object, dim: int, ndim: int) -> int | None:
    """Follow one dimension from the end of a chain of views back to the parameter."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_module"):
        if node.target in (aten.t.default, aten.numpy_T.default):
            dim = ndim - 1 - dim
        elif node.target is aten.transpose.int:
            first, second = (int(d) % ndim for d in node.args[1:3])  # pyright: ignore[reportArgumentType]
            dim = {first: second, second: first}.get(dim, dim)
        elif node.target is aten.permute.default:
            dim = int(node.args[1][dim]) % ndim  # pyright: ignore
        elif node.target in (aten.view.default, aten.reshape.default):
            return None
        node = node.args[0]
    return dim
