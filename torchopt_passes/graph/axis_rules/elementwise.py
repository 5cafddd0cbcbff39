"""Operations that compute each element from the elements at the same place, and those that make a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchopt_passes.graph.axes import AxisLabels, Call, Rule

__all__ = ["ELEMENTWISE", "elementwise"]


def elementwise(call: Call) -> AxisLabels:
    """Unify the axes that are broadcast together."""
    return call.align([call.of(node) for node in call.tensors], call.out_shape)


def _like_first(call: Call) -> AxisLabels:
    return call.of(call.tensors[0])


def _into_first(call: Call) -> AxisLabels:
    """An in-place write whose value may be broadcast."""
    first, *others = (call.of(node) for node in call.tensors)
    call.align([first, *others], call.out_shape)
    return first


def _nothing(call: Call) -> Any:
    return [] if call.axes.sizes[call.node] is None else _like_first(call)


def _factory(call: Call) -> AxisLabels:
    """A tensor of one value, or of noise, may have any size: new atoms, which take on what they meet."""
    return tuple(call.table.fresh(n) if n > 1 else np.zeros(n, np.int64) for n in call.out_shape)


def _counted(call: Call) -> AxisLabels:
    return tuple(np.zeros(n, np.int64) for n in call.out_shape)


def _prelu(call: Call) -> AxisLabels:
    x, slopes = (call.of(node) for node in call.tensors)
    if len(slopes[0]) > 1:
        call.unify(x[1 if len(x) > 1 else 0], slopes[0])
    return x


def _glu(call: Call) -> AxisLabels:
    """The first half of an axis, gated by the second."""
    labels = call.of(call.tensors[0])
    dim = int(call.number("dim")) % len(labels)
    half = len(labels[dim]) // 2
    call.unify(labels[dim][:half], labels[dim][half:])
    return tuple(ids[:half] if axis == dim else ids for axis, ids in enumerate(labels))


def _size(call: Call) -> None:
    """A size that is read while the model runs is no constant that could be made to fit."""
    labels = call.of(call.tensors[0])
    dim = call.number("dim")
    call.lock(labels if dim is None else labels[int(dim)], "reads the size of the axis")


_SAME = (
    *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone", "detach"),
    *("alias", "lift_fresh_copy", "lift_fresh", "lift", "full_like", "zeros_like", "ones_like", "rand_like"),
    *("randn_like", "empty_like", "zero", "bernoulli", "fill", "type_as", "view_as_real_copy", "normal", "uniform"),
    *("to", "_to_copy", "_conj", "resolve_conj", "resolve_neg", "celu", "selu", "rrelu", "requires_grad"),
)
_MADE = ("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")

ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _like_first),
    **dict.fromkeys(_MADE, _factory),
    **dict.fromkeys(("arange", "linspace", "scalar_tensor", "eye", "randperm"), _counted),
    **dict.fromkeys(("__and__", "__or__", "__xor__", "rsub", "relu6", "hardswish", "hardtanh", "logit"), elementwise),
    **dict.fromkeys(("add", "sub", "mul", "div", "relu", "silu", "gelu", "where", "masked_fill"), elementwise),
    "copy": _into_first,
    "_assert_tensor_metadata": _nothing,
    "prelu": _prelu,
    "glu": _glu,
    **dict.fromkeys(("sym_size", "sym_numel"), _size),
    "_prelu_kernel": elementwise,
}
