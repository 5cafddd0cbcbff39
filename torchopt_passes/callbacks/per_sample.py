"""A weight that stands for itself, with gates on what it reads that differ from sample to sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchopt_passes.errors import CallbackError

__all__ = ["READS", "SampleGatedWeight"]

aten = torch.ops.aten

_FEATURES_LAST = {nn.functional.linear, aten.linear.default}
_FEATURES_SECOND = {
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}

READS: frozenset[object] = frozenset({*_FEATURES_LAST, *_FEATURES_SECOND})
"""Operations that can read with a gate for each sample: those that keep the samples apart, as the first dimension."""


_ASIDE = {"grad", "_base"}
"""Attributes that torch looks at, and no model computes with; shape, dtype and the like are no tensors."""


class SampleGatedWeight(torch.Tensor):
    """Stands in for a weight; the operation that reads with it gets its input gated, and the weight itself.

    A gate for each sample cannot be multiplied into a weight, which all samples share: it belongs on the input.
    """

    weight: torch.Tensor
    gates: Callable[[int], torch.Tensor]

    @staticmethod
    def of(weight: torch.Tensor, gates: Callable[[int], torch.Tensor]) -> SampleGatedWeight:
        """Return a stand-in for a weight.

        Args:
            weight: the parameter.
            gates: number of samples -> (samples, channels) gates of what the weight reads; the same at each call.
        """
        made: Any = weight.detach().as_subclass(SampleGatedWeight)
        made.weight, made.gates = weight, gates
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if func in READS and isinstance(weight, SampleGatedWeight):
            x: torch.Tensor = args[0] if args else kwargs.pop("input")
            rest = args[2:]
            kwargs.pop("weight", None)
            return func(_gated(func, x, weight), weight.weight, *rest, **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and getattr(getattr(func, "__self__", None), "__name__", "") not in _ASIDE:
            raise CallbackError(
                f"a weight of shape {tuple(result.shape)} is computed with by {getattr(func, '__name__', func)}, where "
                'samples cannot be gated one by one: take noise="step", or leave the layer out with skip='
            )
        return result


def _gated(func: Any, x: torch.Tensor, weight: SampleGatedWeight) -> torch.Tensor:
    """Multiply the channels of each sample of `x` by their gates."""
    place = x.ndim - 1 if func in _FEATURES_LAST else x.ndim - (weight.weight.ndim - 1)
    samples = x.shape[0] if place > 0 else 1
    gates = weight.gates(samples).to(x)
    channels = x.shape[place]
    gates = gates.repeat(1, channels // gates.shape[1])  # each block of a grouped convolution reads alike
    shape = [1] * x.ndim
    shape[place] = channels
    if place > 0:
        shape[0] = samples
    return x * gates.view(shape)
