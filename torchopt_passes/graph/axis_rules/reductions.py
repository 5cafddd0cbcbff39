"""Operations that compute one number from an axis, normalise it, or look at windows of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchopt_passes.graph.axes import AxisLabels, Call, Rule
from torchopt_passes.graph.labels import HEADS

__all__ = ["REDUCTIONS"]


def _dims(call: Call, rank: int, name: str = "dim") -> tuple[int, ...]:
    dims = call.number(name)
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims))


def _without(labels: AxisLabels, dims: tuple[int, ...], rank: int) -> AxisLabels:
    if len(labels) == rank:  # keepdim
        return tuple(np.zeros(1, np.int64) if axis in dims else ids for axis, ids in enumerate(labels))
    return tuple(ids for axis, ids in enumerate(labels) if axis not in dims)


def _statistic(call: Call) -> Any:
    """A mean, a variance, a norm: of those that stay."""
    labels = call.of(call.tensors[0])
    dims = _dims(call, len(labels))
    spanned = tuple(d for d in dims if labels[d].any())
    if spanned:
        call.axes.statistics[call.node] = spanned
    sizes = call.axes.sizes[call.node]
    outputs = sizes if isinstance(sizes, list | tuple) else [sizes]
    made = [_without(labels, dims, out.ndim) for out in outputs]
    return made if isinstance(sizes, list | tuple) else made[0]


def _whole(call: Call) -> Any:
    """What depends on every index of the axis in a way that no index can leave."""
    labels = call.of(call.tensors[0])
    dims = _dims(call, len(labels))
    call.lock([labels[d] for d in dims], "needs every index of the axis")
    sizes = call.axes.sizes[call.node]
    outputs = sizes if isinstance(sizes, list | tuple) else [sizes]
    made = [_without(labels, dims, out.ndim) for out in outputs]
    return made if isinstance(sizes, list | tuple) else made[0]


def _softmax(call: Call) -> AxisLabels:
    labels = call.of(call.tensors[0])
    dim = int(call.number("dim")) % max(len(labels), 1)
    call.lock(labels[dim], "a softmax over the axis needs every index")
    for axis, ids in enumerate(labels):
        if axis != dim:
            call.table.mark(ids, HEADS)
    return labels


def _loss(call: Call) -> AxisLabels:
    for node in call.tensors:
        call.lock(call.of(node), "a loss needs every index")
    return tuple(np.zeros(n, np.int64) for n in call.out_shape)


def _batch_norm(call: Call) -> Any:
    """Statistics of each channel over all else: of what stays, also where a weight is standardized so (NFNets)."""
    x = call.of(call.tensors[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        labels = call.labels(name)
        if labels is not None:
            call.unify(x[1], labels[0])
    spanned = tuple(axis for axis, ids in enumerate(x) if axis != 1 and ids.any())
    if spanned:
        call.axes.statistics[call.node] = spanned
    return x


def _instance_norm(call: Call) -> AxisLabels:
    x = _batch_norm(call)
    call.lock(x[2:], "a statistic over places")
    return x


def _layer_norm(call: Call) -> AxisLabels:
    x = call.of(call.tensors[0])
    count = len(call.number("normalized_shape"))
    for name in ("weight", "bias"):
        labels = call.labels(name)
        for mine, theirs in zip(x[-count:], labels or x[-count:], strict=True):
            call.unify(mine, theirs)
    spanned = tuple(axis for axis in range(len(x) - count, len(x)) if x[axis].any())
    if spanned:
        call.axes.statistics[call.node] = spanned
    return x


def _group_norm(call: Call) -> AxisLabels:
    x = call.of(call.tensors[0])
    for name in ("weight", "bias"):
        labels = call.labels(name)
        if labels is not None:
            call.unify(x[1], labels[0])
    groups = int(call.number("num_groups"))
    call.lock(x[2:], "a statistic over places")
    if x[1].any():
        blocks, inside = call.split(x[1], groups, len(x[1]) // groups)
        call.axes.groups[call.node] = blocks
        if inside.any():
            call.axes.statistics[call.node] = (1,)
    return x


def _weight_norm(call: Call) -> AxisLabels:
    """W = g v / |v|, the norm over all axes but one: of what stays, since what is zero adds nothing to it."""
    v, g = (call.of(node) for node in call.tensors)
    dim = int(call.number("dim")) % len(v)
    call.unify(v[dim], g[dim])
    return v


def _windows(call: Call) -> Any:
    """Pooling, resizing, padding by the image's own values: the last axes are places, the others pass."""
    labels = call.of(call.tensors[0])
    name = str(call.node.target)
    places = next(int(digit) for digit in ("1", "2", "3") if f"{digit}d" in name)
    call.lock(labels[-places:], "windows over places")
    sizes = call.axes.sizes[call.node]
    outputs = sizes if isinstance(sizes, list | tuple) else [sizes]
    made = [(*labels[:-places], *(np.zeros(int(n), np.int64) for n in out.shape[-places:])) for out in outputs]
    return made if isinstance(sizes, list | tuple) else made[0]


_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "reflection_pad", "replication_pad")
_RESIZES = ("nearest", "linear", "bilinear", "bicubic", "trilinear")
_OVER_WINDOWS = (
    *(f"{name}{d}d" for name in _POOLS for d in (1, 2, 3)),
    *(f"{name}{d}d_with_indices" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)),
    *(f"upsample_{name}{d}d" for name in (*_RESIZES, "nearest_exact") for d in (1, 2, 3)),
    *(f"_upsample_{name}{d}d_aa" for name in _RESIZES for d in (1, 2, 3)),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)

REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(("mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"), _statistic),
    **dict.fromkeys(("amax", "amin", "norm"), _statistic),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "prod", "any", "all", "logsumexp", "aminmax"), _whole),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"), _loss),
    **dict.fromkeys(_OVER_WINDOWS, _windows),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "_weight_norm": _weight_norm,
}
