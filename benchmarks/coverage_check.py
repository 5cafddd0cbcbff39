"""A check of channel removal that knows nothing of the tool: the original, with what was removed set to zero.

`masked_outputs` runs the original model in float64 with every removed slice of every parameter zeroed. Zeroing is the
same as removing except where a statistic spans the removed channels; there the statistic is taken over the channels
that stay: in `layer_norm`, `rms_norm` and `group_norm`, in a mean or variance that a module with removed parameters
computes by hand (the RMS norms of Transformers, the GRN of ConvNeXt-V2), and in weight standardisation. `wide` adds
statistics over channels in other modules (spatial attention) and the scale of attention that states none.
`plain_outputs` runs the pruned model in float64, and `distance` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Removed", "alive", "distance", "main_outputs", "masked_outputs", "plain_outputs", "zero_removed"]

Removed = dict[str, dict[int, Sequence[int]]]
"""fqn of a parameter or buffer -> dimension -> the indices that left, in the original's numbering."""

_REDUCED = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_STATISTICS = {Tensor.mean, torch.mean, Tensor.var, torch.var, torch.var_mean, Tensor.std, torch.std}
_STATISTICS |= {Tensor.amax, torch.amax, Tensor.amin, torch.amin, Tensor.max, torch.max, Tensor.min, torch.min}


class Double(TorchFunctionMode):
    """Casts to a smaller floating type that a model makes go to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda d: torch.float64 if d in _REDUCED else d, (args, kwargs or {})
        )
        return self.call(Tensor.double if func in _CASTS else func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class KeptStatistics(Double):
    """Statistics over the channels that stay.

    Args:
        removed: the parameters and buffers (objects) that were cut, each with a 0/1 tensor of its shape: 1 stays.
        wide: two more are taken over what stays, where what is zero everywhere counts as removed: the scale of
            attention that states none, and statistics over one axis in modules that own no removed parameter.
    """

    def __init__(self, removed: dict[int, Tensor], *, wide: bool) -> None:
        super().__init__()
        self.removed, self.wide = removed, wide
        self.owners: list[nn.Module] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if special := _SPECIAL.get(func):
            return special(self, *args, **kwargs)
        if func in _STATISTICS:
            return self.statistic(func, args, kwargs)
        return func(*args, **kwargs)

    def kept(self, weight: Tensor | None, shape: Sequence[int], slices: Tensor) -> Tensor:
        """Return 1 for what stays: by the weight; by the module's other parameters; by what is zero everywhere."""
        if weight is not None and id(weight) in self.removed:
            return self.removed[id(weight)]
        for parameter in self.owned():
            if tuple(parameter.shape) == tuple(shape):
                return self.removed[id(parameter)]
        return torch.ones_like(slices) if weight is not None else (slices != 0).to(slices.dtype)

    def owned(self) -> list[Tensor]:
        own = self.owners[-1].parameters(recurse=False) if self.owners else ()
        return [parameter for parameter in own if id(parameter) in self.removed]

    def layer_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float | None = 1e-5, *_: Any, centred: bool = True,
    ) -> Tensor:  # fmt: skip
        dims = tuple(range(-len(shape), 0))
        kept = self.kept(weight, shape, x.abs().reshape(-1, *shape).amax(0))
        mean = (x * kept).sum(dims, keepdim=True) / kept.sum() if centred else torch.zeros_like(x[..., :1])
        variance = ((x - mean).square() * kept).sum(dims, keepdim=True) / kept.sum()
        out = (x - mean) * torch.rsqrt(variance + (torch.finfo(x.dtype).eps if eps is None else eps)) * kept
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def rms_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return self.layer_norm(x, shape, weight, None, eps, centred=False)

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:  # fmt: skip
        kept = self.kept(weight, x.shape[1:2], x.abs().amax([d for d in range(x.dim()) if d != 1]))
        values = x.reshape(len(x), num_groups, x.shape[1] // num_groups, -1)
        mask = kept.view(1, num_groups, -1, 1).expand_as(values)
        count = mask.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (values * mask).sum((2, 3), keepdim=True) / count
        variance = ((values - mean).square() * mask).sum((2, 3), keepdim=True) / count
        out = ((values - mean) * torch.rsqrt(variance + eps) * mask).reshape(x.shape)
        channels = (-1, *[1] * (x.dim() - 2))
        out = out if weight is None else out * weight.view(channels)
        return out if bias is None else out + bias.view(channels)

    def batch_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Weight standardisation calls batch norm on the weight, (1, out, in * kernel), with no running statistics."""
        own = [p for p in self.owned() if p.numel() == x.numel() and p.dim() > 1]
        if not own or any(isinstance(value, Tensor) for value in args[:2]):
            return functional.batch_norm(x, *args, **kwargs)
        _, _, weight, bias, _, _, eps = (*args, *(None,) * 7)[:7]
        weight, bias, eps = kwargs.get("weight", weight), kwargs.get("bias", bias), kwargs.get("eps", eps or 1e-5)
        mask = self.removed[id(own[0])].reshape(x.shape)
        count = mask.sum(2, keepdim=True).clamp(min=1)
        mean = (x * mask).sum(2, keepdim=True) / count
        out = (x - mean) * torch.rsqrt(((x - mean).square() * mask).sum(2, keepdim=True) / count + eps)
        out = out if weight is None else out * weight.view(1, -1, 1)
        return (out if bias is None else out + bias.view(1, -1, 1)) * mask

    def statistic(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A mean, variance or extreme over one axis: of a module's removed parameters' size, or (wide) with zeros."""
        x, *rest = args
        dim = kwargs.get("dim", rest[0] if rest else None)
        axis = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if isinstance(axis, int) and not isinstance(axis, bool) and x.is_floating_point():
            kept = self.kept_along(x, axis)
            if kept is not None:
                return func(x.index_select(axis, kept.nonzero().flatten()), *rest, **kwargs)
        return func(*args, **kwargs)

    def kept_along(self, x: Tensor, axis: int) -> Tensor | None:
        for parameter in self.owned():
            kept = self.removed[id(parameter)]
            if x.shape[axis] == kept.numel() == max(kept.shape):
                return kept.flatten()
        slices = x.abs().transpose(0, axis).flatten(1).amax(1) if self.wide and x.numel() and x.dim() > 1 else None
        return None if slices is None or not bool((slices == 0).any()) or not bool((slices != 0).any()) else slices

    def attention(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wide and kwargs.get("scale") is None:
            features = (query.abs().flatten(0, -2).amax(0) > 0) | (key.abs().flatten(0, -2).amax(0) > 0)
            kwargs["scale"] = 1 / math.sqrt(max(1, int(features.sum())))
        return functional.scaled_dot_product_attention(query, key, *args, **kwargs)


_SPECIAL: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: KeptStatistics.layer_norm,
    torch.layer_norm: KeptStatistics.layer_norm,
    functional.rms_norm: KeptStatistics.rms_norm,
    torch.rms_norm: KeptStatistics.rms_norm,
    functional.group_norm: KeptStatistics.group_norm,
    torch.group_norm: KeptStatistics.group_norm,
    functional.batch_norm: KeptStatistics.batch_norm,
    functional.scaled_dot_product_attention: KeptStatistics.attention,
}


def zero_removed(model: nn.Module, removed: Removed) -> dict[int, Tensor]:
    """Zero every removed slice of the floating parameters and buffers; return what stays of each, by object."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    kept: dict[int, Tensor] = {}
    with torch.no_grad():
        for fqn, cuts in removed.items():
            tensor = tensors[fqn]
            if not tensor.is_floating_point():
                continue
            mask = kept.setdefault(id(tensor), torch.ones_like(tensor))
            for dim, indices in cuts.items():
                mask.index_fill_(dim, torch.as_tensor(list(indices), dtype=torch.long), 0)
            if not fqn.endswith("running_var"):
                tensor.mul_(mask)
    return kept


def masked_outputs(model: nn.Module, removed: Removed, args: Any, kwargs: Any, *, wide: bool = False) -> list[Tensor]:
    """Run the original (it is changed: float64, zeroed) as if what was removed were not there."""
    with _in_double(model):
        mode = KeptStatistics(zero_removed(model, removed), wide=wide)
        handles = [handle for module in model.modules() for handle in _follow(module, mode)]
        try:
            with torch.no_grad(), mode:
                return main_outputs(model(*_double(args), **_double(kwargs)))
        finally:
            for handle in handles:
                handle.remove()


def plain_outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """Run a model in float64, whatever smaller types it casts to."""
    with _in_double(model), torch.no_grad(), Double():
        return main_outputs(model(*_double(args), **_double(kwargs)))


def main_outputs(output: Any) -> list[Tensor]:
    """Return the floating tensors of an output; of a named output only losses and logits, when it has them."""
    if isinstance(output, dict):
        chosen = {name: value for name, value in output.items() if "logits" in name or "loss" in name}
        output = chosen or output
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return max|a - b| / max|b|, the largest over the outputs; None when shapes differ; inf for lost finite values."""
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return None
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if not b.numel() or torch.equal(a, b):
            continue
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def alive(outputs: Sequence[Tensor]) -> bool:
    """Return whether the samples of the batch have different outputs: a network that died gives the same for all."""
    return any(t.dim() == 0 or t.shape[0] < 2 or bool((t[0] != t[1]).any()) for t in outputs if t.numel())


def _follow(module: nn.Module, mode: KeptStatistics) -> Iterator[Any]:
    """Yield hooks that tell the mode which module with removed parameters is running."""
    if any(id(parameter) in mode.removed for parameter in module.parameters(recurse=False)):
        yield module.register_forward_pre_hook(lambda m, _: mode.owners.append(m))
        yield module.register_forward_hook(lambda *_: mode.owners.__delitem__(-1))


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model.double()
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _double(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, values)
