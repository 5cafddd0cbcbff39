"""Lowering: fake-quantizers become quantize and dequantize ops, weights become integers, batch norms are folded.

The ops are those of PT2E (``torch.ops.quantized_decomposed``), which Inductor, ONNX and the other exporters read.
torchao's own `convert_pt2e` is not called: it rebuilds the module, leaves its input unusable, takes away train() and
eval(), and rewrites every convolution and batch norm by a pattern with eps 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import decomposed_ops
from torchopt_passes.errors import PassError
from torchopt_passes.functional.affine import along, quantize
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer
from torchopt_passes.graph.quantization.folding import (
    can_be_linear,
    fold_shift,
    make_linear,
    norms_behind,
    operations_behind,
    scale_of,
    split_bias,
    static_value,
)
from torchopt_passes.graph.quantization.lower_values import lower_fitted_activation, lower_fitted_weight
from torchopt_passes.graph.quantization.operations import is_static, weight_name
from torchopt_passes.graph.quantization.value_quantizer import ValueQuantizer
from torchopt_passes.graph.state import (
    erase_unused,
    free_name,
    get_state,
    remove_empty_modules,
    remove_unused_state,
    store,
)
from torchopt_passes.graph.verify import in_eval_mode

__all__ = ["lower"]


@dataclass
class _Stored:
    """Tensors to be stored once the old ones are gone: then a converted weight gets the name of its float one."""

    items: list[tuple[fx.Node, str, torch.Tensor, bool]] = field(default_factory=list[Any])

    def add(self, graph: fx.Graph, name: str, value: torch.Tensor, *, parameter: bool = False) -> fx.Node:
        # a name that nothing has: until it is stored, the float tensor of that name counts as read no more
        node = graph.create_node("get_attr", f"new.{len(self.items)}", name=name.replace(".", "_"))
        node.meta["val"] = value
        self.items.append((node, name, value, parameter))
        return node


def lower(graph_module: fx.GraphModule, names: Sequence[str], *, fold_weights: bool) -> None:
    """Lower fake-quantizers of a prepared graph, in place.

    Args:
        graph_module: a prepared graph.
        names: the fake-quantizers to lower, such as ``"fake_quant.conv1_weight"``.
        fold_weights: store weights as integers; else keep them as floats that the graph rounds.
    """
    graph, wanted = graph_module.graph, set(names)
    before = get_state(graph_module)
    stored = _Stored()
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in wanted:
            continue
        quantizer = graph_module.get_submodule(str(node.target))
        if not isinstance(quantizer, FakeQuantizer):
            raise PassError(f"{node.target} is no fake-quantizer")
        value = node.args[0]
        if quantizer.exact and isinstance(value, fx.Node) and is_static(value):
            _lower_weight(graph_module, node, quantizer, stored, fold_weights=fold_weights)
        else:
            _lower_activation(graph, node, quantizer)
    for name in wanted:
        owner, _, child = name.rpartition(".")
        del graph_module.get_submodule(owner)._modules[child]
    _drop_empty(graph_module, {name.split(".", maxsplit=1)[0] for name in wanted})
    removed = remove_unused_state(graph_module, before)
    for node, name, tensor, parameter in stored.items:
        # a float tensor of that name is still read (a tied embedding): then the integers stand beside it
        taken = not tensor.is_floating_point() and free_name(graph_module, name) != name
        node.target = free_name(graph_module, f"{name}_{str(tensor.dtype).removeprefix('torch.')}" if taken else name)
        store(graph_module, str(node.target), tensor, parameter=parameter)
    remove_empty_modules(graph_module, removed)


def _lower_activation(graph: fx.Graph, node: fx.Node, quantizer: FakeQuantizer) -> None:
    """One quantize op, and a dequantize op for each user: the patterns of the compilers want one user each."""
    if isinstance(quantizer, ValueQuantizer):
        rounded = lower_fitted_activation(node, quantizer)
        rounded.meta |= _meta(node)
        node.replace_all_uses_with(rounded)
        graph.erase_node(node)
        return
    ops = decomposed_ops()
    grid = (
        float(quantizer.scale),
        int(quantizer.zero_point),
        quantizer.quant_min,
        quantizer.quant_max,
        quantizer.dtype,
    )
    with graph.inserting_before(node):
        rounded = graph.call_function(ops.quantize_per_tensor.default, (node.args[0], *grid))
    rounded.meta = _meta(node, quantizer.dtype)
    for user in list(node.users):
        with graph.inserting_before(node):
            back = graph.call_function(ops.dequantize_per_tensor.default, (rounded, *grid))
        back.meta = _meta(node)
        user.replace_input_with(node, back)
    graph.erase_node(node)


def _lower_weight(
    graph_module: fx.GraphModule, node: fx.Node, quantizer: FakeQuantizer, stored: _Stored, *, fold_weights: bool
) -> None:
    graph, source = graph_module.graph, node.all_input_nodes[0]
    with in_eval_mode(graph_module) if source.op != "get_attr" else nullcontext():
        weight = static_value(graph_module, source)
    norms = norms_behind(node) if len(node.args) > 1 else []
    operations = operations_behind(node)
    dim = quantizer.channel_dim
    if operations and dim != 0 and all(can_be_linear(operation, node) for operation in operations):
        weight, dim = weight.t().contiguous(), None if dim is None else 0
        for operation in operations:
            make_linear(operation)
    if norms:
        scale = along(scale_of(graph_module, norms[0][1]), weight.ndim, quantizer.weight_dim)
        weight = (weight.double() * scale).to(weight.dtype)
    weight = quantizer.on_grid(weight, dim)
    name = weight_name(source)
    if isinstance(quantizer, ValueQuantizer):

        def store_weight(fqn: str, tensor: torch.Tensor) -> fx.Node:
            with graph.inserting_before(node):
                return stored.add(graph, fqn, tensor, parameter=not fold_weights)

        node.replace_all_uses_with(
            lower_fitted_weight(node, name, weight, dim or 0, quantizer, store_weight, fold_weights=fold_weights)
        )
    for user in list(node.users):
        with graph.inserting_before(node):
            back = _rounded_weight(graph, node, name, weight, dim, quantizer, stored, fold_weights=fold_weights)
        user.replace_input_with(node, back)
    for operation, norm in norms:
        fold_shift(
            graph_module, operation, norm, owner=name.rpartition(".")[0], add=partial(stored.add, graph, parameter=True)
        )
    for operation in operations if quantizer.bias_apart else ():
        split_bias(operation)
    erase_unused(node)


def _rounded_weight(
    graph: fx.Graph,
    node: fx.Node,
    name: str,
    weight: torch.Tensor,
    dim: int | None,
    quantizer: FakeQuantizer,
    stored: _Stored,
    *,
    fold_weights: bool,
) -> fx.Node:
    ops = decomposed_ops()
    low, high, dtype = quantizer.quant_min, quantizer.quant_max, quantizer.dtype
    shared = next((n for n, other, _, _ in stored.items if other == name and n.meta.get("source") is node), None)
    if shared is None:
        integers = quantize(weight, quantizer.scale, quantizer.zero_point, low, high, dim).to(dtype)
        shared = stored.add(graph, name, integers if fold_weights else weight.clone(), parameter=not fold_weights)
        shared.meta["source"] = node
        if dim is not None:
            scale = stored.add(graph, f"{name}_scale", quantizer.scale.clone())
            zero_point = stored.add(graph, f"{name}_zero_point", quantizer.zero_point.to(torch.int64))
            shared.meta["grid"] = (scale, zero_point, dim, low, high, dtype)
        else:
            shared.meta["grid"] = (float(quantizer.scale), int(quantizer.zero_point), low, high, dtype)
    grid = shared.meta["grid"]
    kind = "per_tensor" if dim is None else "per_channel"
    rounded = shared
    if not fold_weights:
        rounded = graph.call_function(getattr(ops, f"quantize_{kind}").default, (shared, *grid))
        rounded.meta = _meta(node, dtype)
    back = graph.call_function(getattr(ops, f"dequantize_{kind}").default, (rounded, *grid))
    back.meta = _meta(node) | {"val": weight}
    return back


def _meta(node: fx.Node, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the meta data of a value on an edge: the same shape and place in the source."""
    meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    value = node.meta.get("val")
    if value is not None:
        meta["val"] = value if dtype is None else value.to(dtype)
    return meta


def _drop_empty(graph_module: nn.Module, containers: set[str]) -> None:
    for name in containers:
        if name in graph_module._modules and not graph_module.get_submodule(name)._modules:
            del graph_module._modules[name]
