"""Weights that a graph stores as integers stay integers in a file: runtimes fold what is computed from constants alone.

An embedding gathers integers and scales the rows that it reads; a linear becomes ONNX Runtime's product with a packed
weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.graph.state import erase_unused, free_name, get_state, remove_unused_state, store
from torchopt_passes.graph.tensors import get_tensor

__all__ = [
    "MATMUL_NBITS",
    "Stored",
    "find_stored",
    "gather_integers",
    "matmul_nbits",
    "multiply_packed",
    "onnx_translations",
]

MATMUL_NBITS = "torchopt_passes.matmul_nbits.default"
"""The name of the operator `matmul_nbits`, as a node's target has it."""

_aten = torch.ops.aten
_BLOCKS = (256, 128, 64, 32, 16)  # that the kernels take
_DOMAIN = "com.microsoft"
_SUFFIXES = ("packed", "packed_scale", "packed_zero_point")


@dataclass(frozen=True)
class Stored:
    """A weight as `StoreIntegers` writes it: w = s (q - z), for groups of columns.

    Args:
        integers: the node of q, int8, shape [rows, columns].
        scale: the node of s, shape [rows, groups, 1].
        zero_point: the node of z, same shape; None for 0.
        group_size: columns of a group.
        dtype: of the computed weight.
    """

    integers: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    group_size: int
    dtype: torch.dtype


def find_stored(node: Any) -> Stored | None:
    """Return what the operations that end in a node compute a weight from, None when they are others."""
    found: list[fx.Node] = []
    for target in (_aten.view.default, _aten.mul.Tensor, _aten.sub.Tensor, _aten.view.default, _aten.to.dtype):
        if target is _aten.sub.Tensor and getattr(node, "target", None) is not target:
            continue
        if not isinstance(node, fx.Node) or node.target is not target:
            return None
        found.append(node)
        node = node.args[0]
    constants = [n.args[1] for n in found if n.target in (_aten.mul.Tensor, _aten.sub.Tensor)]
    read = [node, *constants]
    if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in read):
        return None
    scale, zero_point, group_size = constants[0], (*constants, None)[1], found[-2].args[1][-1]  # pyright: ignore
    return Stored(node, scale, zero_point, group_size, found[-1].args[1])  # pyright: ignore


def gather_integers(graph_module: fx.GraphModule) -> dict[str, str]:
    """Let embeddings with stored weights gather integers, in place: the rows that are read are scaled, not the table.

    Args:
        graph_module: an inference graph of ours alone.

    Returns:
        Facts for the report: how many there are.
    """
    graph, before, count = graph_module.graph, get_state(graph_module), 0
    for node in graph.find_nodes(op="call_function", target=_aten.embedding.default):
        weight = find_stored(node.args[0])
        if weight is None:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(_aten.embedding.default, (weight.integers, *node.args[1:]))
            value = graph.call_function(_aten.to.dtype, (rows, weight.dtype))
            groups = get_tensor(graph_module, str(weight.scale.target)).shape[1]
            if groups > 1:
                value = graph.call_function(_aten.unflatten.int, (value, -1, [groups, weight.group_size]))
            for op, table in ((_aten.sub.Tensor, weight.zero_point), (_aten.mul.Tensor, weight.scale)):
                if table is not None:
                    name = free_name(graph_module, f"{table.target}_rows".replace(".", "_"))
                    store(graph_module, name, get_tensor(graph_module, str(table.target)).squeeze(-1), parameter=False)
                    steps = graph.call_function(_aten.embedding.default, (graph.get_attr(name), *node.args[1:]))
                    steps = graph.call_function(_aten.unsqueeze.default, (steps, -1)) if groups > 1 else steps
                    value = graph.call_function(op, (value, steps))
            if groups > 1:
                value = graph.call_function(_aten.flatten.using_ints, (value, -2))
        value.meta.update(node.meta)
        node.replace_all_uses_with(value)
        erase_unused(node)
        count += 1
    remove_unused_state(graph_module, before)
    graph_module.recompile()
    return {"stored as integers": f"{count} embeddings"} if count else {}


def multiply_packed(graph_module: fx.GraphModule) -> dict[str, str]:
    """Let linears with stored weights read packed integers, in place: ONNX Runtime has a kernel for that product.

    Codes of 2 to 4 bits are packed two a byte, wider ones one a byte; groups longer than a kernel's blocks repeat their
    scale. A weight whose groups are no multiple of 16 columns is left as it is.

    Args:
        graph_module: an inference graph of ours alone.

    Returns:
        Facts for the report: how many there are.
    """
    graph, before, count = graph_module.graph, get_state(graph_module), 0
    packed: dict[str, tuple[list[str | None], int]] = {}
    for node in graph.find_nodes(op="call_function", target=_aten.linear.default):
        weight = find_stored(node.args[1])
        block = next((size for size in _BLOCKS if weight and weight.group_size % size == 0), 0)
        if weight is None or not block or weight.dtype is not torch.float32:
            continue
        fqn = str(weight.integers.target)
        if fqn not in packed:  # a layer that is called twice has one weight
            packed[fqn] = _store_packed(graph_module, weight, block)
        names, bits = packed[fqn]
        with graph.inserting_before(node):
            arguments = [name and graph.get_attr(name) for name in names]
            product = graph.call_function(_product(), (node.args[0], *arguments, bits, block))
            if len(node.args) > 2 and node.args[2] is not None:
                product = graph.call_function(_aten.add.Tensor, (product, node.args[2]))
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        erase_unused(node)
        count += 1
    remove_unused_state(graph_module, before)
    graph_module.recompile()
    return {"packed weights": f"{count} linears"} if count else {}


def _store_packed(graph_module: fx.GraphModule, weight: Stored, block: int) -> tuple[list[str | None], int]:
    """Store codes, scales and zero points; returns their names (None for zero points that are 0), and the bits."""
    integers, scale = (get_tensor(graph_module, str(n.target)) for n in (weight.integers, weight.scale))
    zeros = weight.zero_point and get_tensor(graph_module, str(weight.zero_point.target))
    bits = 4 if int(integers.min()) >= -8 and int(integers.max()) <= 7 else 8
    names: list[str | None] = []
    for suffix, tensor in zip(_SUFFIXES, _pack(integers, scale, zeros, bits, block), strict=True):
        names.append(None)
        if tensor is not None:
            names[-1] = free_name(graph_module, f"{weight.integers.target}_{suffix}".replace(".", "_"))
            store(graph_module, names[-1], tensor, parameter=False)
    return names, bits


def _pack(
    integers: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, bits: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes, uint8 [rows, blocks, bytes], low half first; scales and zero points, [rows, blocks]."""
    rows, columns = integers.shape
    half = 2 ** (bits - 1)
    codes = (integers.short() + half).to(torch.uint8).view(rows, columns // block, block)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    times = columns // block // scale.shape[1]
    scales = scale.squeeze(-1).repeat_interleave(times, 1)
    offsets = None if zeros is None else zeros.squeeze(-1).repeat_interleave(times, 1) + half
    return codes.contiguous(), scales.contiguous(), offsets


def matmul_nbits(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    block_size: int,
) -> torch.Tensor:
    """Return x times the transposed weight that is packed: what ``com.microsoft.MatMulNBits`` computes.

    Args:
        x: float, shape [..., columns].
        packed: uint8, shape [rows, blocks, block_size * bits / 8], the first code in the low bits of a byte.
        scales: float, shape [rows, blocks].
        zero_points: float, same shape; None for 2^(bits - 1).
        bits: 4 or 8.
        block_size: columns that share a scale.

    Source:
        The operator's documentation in ONNX Runtime (contrib operators).

    Example:
        >>> one = torch.tensor([[[0x98] * 8]], dtype=torch.uint8)  # sixteen codes: 8 and 9, the values 0 and 1
        >>> matmul_nbits(torch.ones(1, 16), one, torch.tensor([[0.5]]), None, 4, 16)
        tensor([[4.]])
    """
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2) if bits == 4 else packed
    zero: Any = 2 ** (bits - 1) if zero_points is None else zero_points.unsqueeze(-1)
    weight = (codes.to(x.dtype) - zero) * scales.unsqueeze(-1)
    return x @ weight.view(weight.shape[0], -1)[:, : x.shape[-1]].t()


def _product() -> Callable[..., Any]:
    """Return `matmul_nbits` as one operator of a graph; it exists from the first use on."""
    if not hasattr(torch.ops.torchopt_passes, "matmul_nbits"):
        definition = torch.library.custom_op("torchopt_passes::matmul_nbits", matmul_nbits, mutates_args=())
        definition.register_fake(matmul_nbits)
    return operator.attrgetter(MATMUL_NBITS)(torch.ops)


def onnx_translations() -> dict[Any, Any]:
    """Return what ``torch.onnx`` writes for our operators, for ``custom_translation_table``."""
    from onnx.defs import OpSchema
    from onnxscript import values

    given, kinds = OpSchema.FormalParameter, {"F": ["tensor(float)"], "U": ["tensor(uint8)"]}
    product = OpSchema(
        "MatMulNBits",
        _DOMAIN,
        1,
        inputs=[
            *(given(name, kind) for name, kind in (("A", "F"), ("B", "U"), ("scales", "F"))),
            given("zero_points", "F", param_option=OpSchema.FormalParameterOption.Optional),
        ],
        outputs=[given("Y", "F")],
        type_constraints=[(name, types, "") for name, types in kinds.items()],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in ("K", "N", "bits", "block_size")],
    )
    multiply: Any = values.Op(values.Opset(_DOMAIN, 1), "MatMulNBits", product)

    def translate(x: Any, packed: Any, scales: Any, zero_points: Any, bits: int, block_size: int) -> Any:
        rows, blocks, _ = packed.shape
        sizes = {"K": blocks * block_size, "N": rows, "bits": bits, "block_size": block_size}
        return multiply(x, packed, scales, zero_points, **sizes)

    return {_product(): translate}
