"""Matrix products: axes that are summed over together, in the words of einsum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from torchopt_passes.graph.axes import AxisLabels, Call, Rule
from torchopt_passes.graph.labels import DIM, HEADS, Ids

__all__ = ["CONTRACTIONS", "contract"]


def contract(call: Call, operands: Sequence[tuple[AxisLabels, str]], out: str) -> AxisLabels:
    """Unify the axes of the same letter, and return those of the result.

    Args:
        call: the operation.
        operands: labels and letters of each operand, one letter an axis.
        out: letters of the result; a letter that is missing there is summed over.
    """
    found: dict[str, Ids] = {}
    uses: dict[str, int] = {}
    for labels, letters in operands:
        if len(set(letters)) < len(letters):
            raise ValueError("a diagonal")
        for ids, letter in zip(labels, letters, strict=True):
            uses[letter] = uses.get(letter, 0) + 1
            known = found.get(letter)
            if known is None or len(known) < len(ids):  # size 1 is broadcast
                found[letter] = ids
            elif len(known) == len(ids):
                call.unify(known, ids)
    for letter, ids in found.items():
        if letter not in out and uses[letter] == 1:
            call.lock(ids, "sums over the axis")
    call.count(list(found.values()))
    return tuple(found[letter] for letter in out)


def _linear(call: Call) -> AxisLabels:
    x, weight, bias = call.of(call.tensors[0]), call.labels("weight"), call.labels("bias")
    if weight is None:
        raise ValueError("a linear needs a weight")
    letters = "abcdefgh"[: len(x) - 1]
    result = contract(call, [(x, letters + "i"), (weight, "oi"[-len(weight) :])], letters + "o"[: len(weight) - 1])
    if bias is not None:
        call.unify(result[-1], bias[0])
    return result


def _matmul(call: Call) -> AxisLabels:
    left, right = (call.of(node) for node in _two(call))
    batch = "abcdefgh"[: max(len(left), len(right), 2) - 2]
    rows, columns = "m"[: len(left) - 1], "n"[: len(right) - 1]
    first = batch[len(batch) - max(len(left) - 2, 0) :] + rows + "k"
    second = batch[len(batch) - max(len(right) - 2, 0) :] + "k" + columns
    return contract(call, [(left, first), (right, second)], batch + rows + columns)


def _two(call: Call) -> tuple[fx.Node, fx.Node]:
    left, right = call.node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        raise ValueError("a product of two tensors")
    return left, right


def _with_sum(call: Call) -> AxisLabels:
    """``addmm``, ``baddbmm``: a product, and a tensor that is broadcast to it."""
    added, left, right = (call.of(node) for node in call.node.args[:3] if isinstance(node, fx.Node))
    batch = "ab"[: len(left) - 2]
    product = contract(call, [(left, batch + "mk"), (right, batch + "kn")], batch + "mn")
    return call.align([product, added], call.out_shape)


def _einsum(call: Call) -> AxisLabels:
    equation = str(call.arg("equation")).replace(" ", "")
    inputs, _, out = equation.partition("->")
    tensors = call.arg("tensors")
    free = [c for c in "ABCDEFGH" if c not in equation]
    operands: list[tuple[AxisLabels, str]] = []
    widest = ""
    for node, letters in zip(tensors, inputs.split(","), strict=True):
        labels = call.of(node)
        dots = "".join(free[: len(labels) - len(letters.replace("...", ""))][::-1]) if "..." in letters else ""
        widest = max(widest, dots, key=len)
        operands.append((labels, letters.replace("...", dots)))
    if "->" not in equation:
        letters = inputs.replace("...", "").replace(",", "")
        out = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return contract(call, operands, out.replace("...", widest))


def _outer(call: Call) -> AxisLabels:
    left, right = (call.of(node) for node in _two(call))
    return (left[0], right[0])


def _attention(call: Call) -> AxisLabels:
    """softmax(q k / sqrt(E)) v: batch and heads come before the last two axes; under GQA k and v have fewer heads."""
    q, k, v, mask = (call.labels(name) for name in ("query", "key", "value", "attn_mask"))
    if q is None or k is None or v is None:
        raise ValueError("attention needs query, key and value")
    call.lock(k[-2], "a softmax over the axis needs every index")
    call.unify(k[-2], v[-2])
    call.unify(q[-1], k[-1])
    for ids in q[:-2]:
        call.table.mark(ids, HEADS)
    for ids in (q[-1], v[-1]):
        call.table.mark(ids, DIM)
    if mask is not None:
        call.align([(*q[:-2], q[-2], k[-2]), mask], [len(ids) for ids in (*q[:-2], q[-2], k[-2])])
    if call.arg("enable_gqa") and len(q[-3]) != len(k[-3]):
        blocks, _ = call.split(q[-3], len(k[-3]), len(q[-3]) // len(k[-3]))
        call.table.mark(blocks, HEADS)
        for other in (k, v):
            call.unify(blocks, other[-3])
            call.align([q[:-3], other[:-3]], [len(ids) for ids in q[:-3]])
    else:
        shape = call.out_shape[:-2]
        call.align([q[:-2], k[:-2], v[:-2]], shape)
    heads = tuple(
        np.zeros(n, np.int64) if len(ids) != n else ids for ids, n in zip(q[:-2], call.out_shape, strict=False)
    )
    for width in (q[-1], v[-1]):
        call.count([*heads, q[-2], k[-2], width])
    return (*heads, q[-2], v[-1])


CONTRACTIONS: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _with_sum),
    "einsum": _einsum,
    "outer": _outer,
    "scaled_dot_product_attention": _attention,
}
