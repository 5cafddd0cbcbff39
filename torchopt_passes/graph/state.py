"""Parameters and buffers of a rewritten graph: stored under free names, removed when nothing reads them."""

from __future__ import annotations

import torch
from torch import fx, nn

from torchopt_passes.graph.batch_norm import BatchNorm
from torchopt_passes.graph.tensors import find_owner

__all__ = [
    "erase_unused",
    "forget_batches",
    "free_name",
    "get_state",
    "remove_empty_modules",
    "remove_unused_state",
    "store",
]


def get_state(graph_module: fx.GraphModule) -> dict[str, int]:
    """Return the fqn of each parameter and buffer that the graph reads -> the identity of the tensor."""
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    return {name: id(tensor) for name, tensor in _tensors(graph_module) if name in read}


def remove_unused_state(graph_module: fx.GraphModule, read_before: dict[str, int]) -> list[str]:
    """Remove the parameters and buffers that the graph read before a rewrite and reads no more.

    Args:
        graph_module: the rewritten graph; nodes that read nothing any more are erased already.
        read_before: what `get_state` gave before the rewrite.

    Returns:
        Their fqns, every name of a tied one that nothing reads.
    """
    now = get_state(graph_module)
    tensors = set(read_before.values()) - set(now.values())
    names = [n for n, t in _tensors(graph_module) if id(t) in tensors or (n in read_before and n not in now)]
    for fqn in names:
        owner, name = find_owner(graph_module, fqn)
        owner._parameters.pop(name, None)
        owner._buffers.pop(name, None)
        owner._non_persistent_buffers_set.discard(name)
    return names


def remove_empty_modules(graph_module: fx.GraphModule, names: list[str]) -> None:
    """Remove the submodules that only held the removed tensors `names`, once new ones are stored."""
    for path in sorted({fqn.rpartition(".")[0] for fqn in names}, reverse=True):
        _remove_if_empty(graph_module, path)


def _remove_if_empty(module: nn.Module, path: str) -> None:
    """Remove a submodule that only held state and holds none any more."""
    owner: nn.Module | None = module
    for name in path.split("."):
        owner = owner._modules.get(name) if owner is not None else None
    if owner is None or type(owner) is not nn.Module or owner._parameters or owner._buffers or owner._modules:
        return
    parent, _, name = path.rpartition(".")
    del module.get_submodule(parent)._modules[name]
    _remove_if_empty(module, parent)


def free_name(module: nn.Module, fqn: str) -> str:
    """Return `fqn`, or `fqn` with the first free number, when its owner has something of that name.

    Example:
        >>> free_name(torch.nn.Linear(2, 2), "weight"), free_name(torch.nn.Linear(2, 2), "weight_scale")
        ('weight_1', 'weight_scale')
    """
    path, _, name = fqn.rpartition(".")
    owner = module.get_submodule(path)
    free, number = name, 1
    while hasattr(owner, free) and getattr(owner, free) is not None:
        free, number = f"{name}_{number}", number + 1
    return f"{path}.{free}" if path else free


def store(module: nn.Module, fqn: str, tensor: torch.Tensor, *, parameter: bool, requires_grad: bool = True) -> None:
    """Register a new parameter or buffer under a dotted name."""
    path, _, name = fqn.rpartition(".")
    owner = module.get_submodule(path)
    if parameter:
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=requires_grad))
    else:
        owner._parameters.pop(name, None)
        owner.register_buffer(name, tensor)


def erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing reads, and then what it alone read; what writes into state stays."""
    schema = getattr(node.target, "_schema", None)
    mutable = schema is not None and schema.is_mutable
    # a batch norm writes its statistics, yet is of no use when nothing reads its result
    written = mutable and node.target is not torch.ops.aten.batch_norm.default
    if node.users or node.op in ("placeholder", "output") or written:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for parent in inputs:
        erase_unused(parent)


def forget_batches(graph_module: fx.GraphModule, norm: BatchNorm) -> None:
    """Erase the op that counts the batches of a batch norm, before the batch norm goes."""
    if norm.var is None:
        return
    path = str(norm.var.target).rpartition(".")[0]
    counter = f"{path}.num_batches_tracked".removeprefix(".")
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if node.target == counter and not any(user.users for user in node.users):
            for user in list(node.users):
                graph_module.graph.erase_node(user)
            graph_module.graph.erase_node(node)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
