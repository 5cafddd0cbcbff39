"""NarrowMultiheadAttention: ``nn.MultiheadAttention`` whose heads are fewer or thinner than its width needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from torchopt_passes.errors import PlanError
from torchopt_passes.graph.pruning.slicing import Removal, blocks_of

__all__ = ["NarrowMultiheadAttention", "fit_attention", "narrow", "without_nested_tensors"]


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` after heads, or features of heads, have left; made of one by `narrow`.

    The original splits ``embed_dim`` into heads, so it cannot compute with fewer heads of the same size. It is called
    as the original; a mask for each head, of shape (N * heads, L, S), has the heads that stay. The mean of attention
    weights is over the heads that stay.

    Attributes:
        num_heads: heads that stay.
        head_dim: features of a head in queries and keys.
        value_dim: features of a head in values.
        scaled_dim: scores are divided by the square root of this: the features that a head had at first.
    """

    value_dim: int
    scaled_dim: int

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments, shapes and results are those of ``nn.MultiheadAttention``."""
        batched, by_batch = query.dim() == 3, query.dim() == 3 and self.batch_first
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is None")
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not by_batch:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, query)
        if mask is not None and mask.shape[-1] < k.shape[2]:  # bias_k and zero attention are seen by all
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout, scale = self.dropout if self.training else 0.0, self.scaled_dim**-0.5
        weights: torch.Tensor | None = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if by_batch else output.transpose(0, 1), weights

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, each (N, heads, length, features of a head)."""
        sizes = [self.num_heads * self.head_dim] * 2 + [self.num_heads * self.value_dim]
        own: Any = self  # torch's annotations leave out that these may be None
        packed, bias = own.in_proj_weight, own.in_proj_bias
        weights = [own.q_proj_weight, own.k_proj_weight, own.v_proj_weight] if packed is None else packed.split(sizes)
        biases = [None] * 3 if bias is None else bias.split(sizes)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return tuple(x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))

    def _mask(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, query: torch.Tensor
    ) -> torch.Tensor | None:
        """Return what is added to the scores, broadcastable to (N, heads, L, S)."""
        found: torch.Tensor | None = None
        if attn_mask is not None:
            found = _additive(attn_mask, query.dtype)
            if found.dim() == 3:
                if found.shape[0] != query.shape[0] * self.num_heads:
                    raise RuntimeError(
                        f"attn_mask has {found.shape[0]} masks for a batch of {query.shape[0]} and {self.num_heads} "
                        "heads: it must have those of the heads that stay"
                    )
                found = found.unflatten(0, (query.shape[0], self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query.dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found

    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("proj_weight"):
                nn.init.xavier_uniform_(parameter)
            elif name in ("bias_k", "bias_v"):
                nn.init.xavier_normal_(parameter)
            elif name != "out_proj.weight":
                nn.init.zeros_(parameter)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def narrow(attention: nn.MultiheadAttention) -> NarrowMultiheadAttention:
    """Make a `NarrowMultiheadAttention` of an attention, in place; it computes the same.

    It is the same object with the same parameters, under another class.

    Raises:
        PlanError: the attention is of a subclass with code of its own.
    """
    if isinstance(attention, NarrowMultiheadAttention):
        return attention
    if type(attention) is not nn.MultiheadAttention:
        raise PlanError(f"{type(attention).__name__} has code of its own, which splits embed_dim into heads")
    result: Any = attention
    result.__class__ = NarrowMultiheadAttention
    result.value_dim = result.scaled_dim = attention.head_dim
    # tells the fused kernels of nn.TransformerEncoderLayer, which split embed_dim into heads, to stay out
    result._qkv_same_embed_dim = False
    return result


def without_nested_tensors(module: nn.Module) -> None:
    """Keep every ``nn.TransformerEncoder`` with narrow attention from nested tensors, which only fused kernels take."""
    encoder: Any
    for encoder in module.modules():
        nests = isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False)
        if nests and any(isinstance(part, NarrowMultiheadAttention) for part in encoder.modules()):
            encoder.use_nested_tensor = False


def fit_attention(attention: nn.MultiheadAttention, cuts: Mapping[str, Removal]) -> dict[str, Any]:
    """Return the sizes of an attention whose tensors were cut; it becomes narrow when it must.

    Args:
        attention: after the cut, with the sizes of before.
        cuts: name -> what left it: ``in_proj_weight`` (or ``q_proj_weight``, ...), ``out_proj.weight``, ...

    Raises:
        PlanError: queries, keys, values and output do not lose the same heads, or heads lose different features.
    """
    heads, head_dim = attention.num_heads, attention.head_dim
    value_dim, scaled_dim = (
        getattr(attention, "value_dim", head_dim),
        getattr(attention, "scaled_dim", head_dim),
    )
    q, k, v = (_heads(rows, heads) for rows in _rows(cuts, [heads * head_dim, heads * head_dim, heads * value_dim]))
    output = cuts.get("out_proj.weight")
    read = output.kept(1) if output is not None else list(range(heads * value_dim))
    if q != k or q.keys() != v.keys() or v != _heads((read, heads * value_dim), heads):
        raise PlanError("queries, keys, values and the columns of out_proj must lose the same heads and features")
    if len(set(q.values())) != 1 or len(set(v.values())) != 1:
        raise PlanError("every head must lose the same features")
    heads, head_dim, value_dim = len(q), len(next(iter(q.values()))), len(next(iter(v.values())))
    packed: Any = getattr(attention, "in_proj_weight", None)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights: list[Any] = [getattr(attention, name) if packed is None else packed for name in names]
    width, key_width, value_width = (int(weight.shape[1]) for weight in weights)
    sizes: dict[str, Any] = {"embed_dim": width, "kdim": key_width, "vdim": value_width}
    sizes |= {"num_heads": heads, "head_dim": head_dim}
    usual = head_dim == value_dim == scaled_dim and heads * head_dim == width == attention.out_proj.weight.shape[0]
    if isinstance(attention, NarrowMultiheadAttention) or not usual:
        narrow(attention)
        sizes |= {"value_dim": value_dim, "scaled_dim": scaled_dim}
    return sizes


def _rows(cuts: Mapping[str, Removal], sizes: list[int]) -> list[tuple[list[int], int]]:
    """Return the rows of queries, keys and values that stay, and how many there were."""
    packed = cuts.get("in_proj_weight")
    found: list[tuple[list[int], int]] = []
    start = 0
    for name, size in zip("qkv", sizes, strict=True):
        own = cuts.get(f"{name}_proj_weight")
        if packed is not None:
            found.append(([row - start for row in packed.kept(0) if start <= row < start + size], size))
        else:
            found.append((own.kept(0) if own is not None else list(range(size)), size))
        start += size
    return found


def _heads(rows: tuple[list[int], int], heads: int) -> dict[int, tuple[int, ...]]:
    return blocks_of(rows[0], heads, rows[1])
