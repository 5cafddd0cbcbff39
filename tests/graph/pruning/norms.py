"""What spans channels (norms, softmax, ...), each able to run on a kept set: what removed channels would leave.

`Keeping.kept` is None in every model under test; only the oracle sets it, on its own copy of the unpruned model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

__all__ = [
    "SPANNING",
    "ChannelsLast",
    "GroupNorm",
    "Keeping",
    "LayerNorm",
    "ManualLayerNorm",
    "ManualRMSNorm",
    "RMSNorm",
    "Spanning",
]


class Keeping(nn.Module):
    """A module that computes over all channels, or over `kept` ones alone (then it gives 0 for the others)."""

    kept: torch.Tensor | None = None

    def axis(self) -> tuple[torch.Tensor, int]:
        """Return the parameter, and the dimension of it, whose removed indices are the channels that left."""
        raise NotImplementedError


class _LastDim(Keeping):
    """A `Keeping` over the last dimension with one weight per channel: `on` computes from what it is given."""

    weight: torch.Tensor

    def axis(self) -> tuple[torch.Tensor, int]:
        return self.weight, 0

    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, bias = self.kept, getattr(self, "bias", None)
        if kept is None:
            return self.on(x, self.weight, bias)
        bias = None if bias is None else bias[kept]
        return torch.zeros_like(x).index_copy(-1, kept, self.on(x[..., kept], self.weight[kept], bias))


class LayerNorm(_LastDim, nn.LayerNorm):
    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)


class RMSNorm(_LastDim, nn.RMSNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class ManualRMSNorm(_LastDim):
    """RMSNorm written as Llama's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class ManualLayerNorm(_LastDim):
    """LayerNorm over dimension 1 of images, written as ConvNeXt's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept
        if kept is None:
            return self.on(x, self.weight, self.bias)
        return torch.zeros_like(x).index_copy(1, kept, self.on(x[:, kept], self.weight[kept], self.bias[kept]))

    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is not None
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return weight[:, None, None] * x + bias[:, None, None]


class GroupNorm(Keeping, nn.GroupNorm):
    def axis(self) -> tuple[torch.Tensor, int]:
        return self.weight, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept
        if kept is None:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        y, size = torch.zeros_like(x), self.num_channels // self.num_groups
        for group in range(self.num_groups):
            inside = kept[(kept // size) == group]
            if len(inside):
                normed = F.group_norm(x[:, inside], 1, self.weight[inside], self.bias[inside], self.eps)
                y = y.index_copy(1, inside, normed)
        return y


class ChannelsLast(nn.Module):
    """Permute images to channels-last, normalise there, permute back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SPANNING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "sum": lambda x: x + x.sum(-1, keepdim=True),
    "max": lambda x: x - x.amax(-1, keepdim=True),
    "norm": lambda x: F.normalize(x, dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
}


class Spanning(_LastDim):
    """A function in which every channel depends on all, then a weight per channel (it tells which channels left).

    A library that prunes here must compute what the kept channels give alone, or lock.
    """

    def __init__(self, form: str, channels: int) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.ones(channels))

    def on(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return SPANNING[self.form](x) * weight

    def extra_repr(self) -> str:
        return self.form
