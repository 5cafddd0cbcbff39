"""Attention, written in the ways models write it, on tokens (N, T, C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning.blocks import Block, Shape
from tests.graph.pruning.norms import LayerNorm, RMSNorm

__all__ = ["Attention", "TorchAttention"]


@dataclass(frozen=True)
class Attention(Block):
    """Multihead attention.

    Args:
        core: how it is computed.
        kv: heads of keys and values, as far as it divides `heads`: fewer is GQA, one is MQA.
        repeat: how these are repeated; ``gqa`` leaves it to SDPA (or to a grouped einsum).
        packing: linears of their own, or one for q, k and v, taken apart in one of several ways.
        qk_norm: a norm over the features of each head of q and k, or over all heads.
        rotary: in halves or in pairs; cosines in buffers, or computed from a buffer of frequencies.
        bias_table: a table of relative positions x heads, read at constant indices.
        scale: one of its own, instead of 1 / sqrt(features).
    """

    heads: int = 2
    features: int = 4
    core: Literal["matmul", "sdpa", "einsum"] = "matmul"
    kv: int = 0
    repeat: Literal["expand", "interleave", "gqa"] = "expand"
    packing: Literal["separate", "view", "chunk", "split", "per_head"] = "separate"
    qk_norm: Literal["none", "rms", "layer", "all_heads"] = "none"
    rotary: Literal["none", "half", "pairs"] = "none"
    frequencies: bool = False
    bias_table: bool = False
    scale: bool = False
    bias: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        return _Attention(*shape, self) if len(shape) == 2 else None


class _Attention(nn.Module):
    index: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    inv_freq: torch.Tensor

    def __init__(self, length: int, width: int, wish: Attention) -> None:
        super().__init__()
        self.wish, heads, features = wish, wish.heads, wish.features
        self.heads, self.features = heads, features
        self.kv = wish.kv if wish.kv and heads % wish.kv == 0 else heads
        self.packing = "split" if wish.packing in ("view", "per_head", "chunk") and self.kv < heads else wish.packing
        inner, inner_kv = heads * features, self.kv * features
        if self.packing == "separate":
            self.q = nn.Linear(width, inner, bias=wish.bias)
            self.k = nn.Linear(width, inner_kv, bias=wish.bias)
            self.v = nn.Linear(width, inner_kv, bias=wish.bias)
        else:
            self.qkv = nn.Linear(width, inner + 2 * inner_kv, bias=wish.bias)
        self.out = nn.Linear(inner, width)
        self.scale = 0.7 if wish.scale else features**-0.5
        if wish.qk_norm != "none":
            norm = LayerNorm if wish.qk_norm == "layer" else RMSNorm
            whole = wish.qk_norm == "all_heads"
            self.q_norm, self.k_norm = norm(inner if whole else features), norm(inner_kv if whole else features)
        self.rotary = wish.rotary if features % 2 == 0 else "none"
        if self.rotary != "none":
            inv_freq = 10.0 ** (-torch.arange(0, features, 2) / features)
            if wish.frequencies:
                self.register_buffer("inv_freq", inv_freq)
            else:
                cos, sin = self.angles(length, inv_freq)
                self.register_buffer("cos", cos)
                self.register_buffer("sin", sin, persistent=False)
        if wish.bias_table:
            self.table = nn.Parameter(torch.zeros(2 * length - 1, heads))
            positions = torch.arange(length)
            self.register_buffer("index", positions[:, None] - positions[None] + length - 1)

    def angles(self, length: int, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(length, dtype=inv_freq.dtype), inv_freq)
        angles = torch.cat((angles, angles), -1) if self.rotary == "half" else angles.repeat_interleave(2, -1)
        return angles.cos(), angles.sin()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, heads, T, features)."""
        if self.rotary == "none":
            return x
        cos, sin = self.angles(x.shape[2], self.inv_freq) if self.wish.frequencies else (self.cos, self.sin)
        if self.rotary == "half":
            half = self.features // 2
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        else:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, v, each (N, T, its heads, features)."""
        n, t, _ = x.shape
        heads, kv, features = self.heads, self.kv, self.features
        if self.packing == "separate":
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.packing == "view":
            q, k, v = self.qkv(x).view(n, t, 3, heads, features).unbind(2)
        elif self.packing == "per_head":
            q, k, v = self.qkv(x).view(n, t, heads, 3 * features).split(features, -1)
        elif self.packing == "chunk":
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).split([heads * features, kv * features, kv * features], -1)
        if self.wish.qk_norm == "all_heads":
            q, k = self.q_norm(q.reshape(n, t, -1)), self.k_norm(k.reshape(n, t, -1))
        shapes = ((n, t, heads, features), (n, t, kv, features), (n, t, kv, features))
        q, k, v = (y.reshape(shape) for y, shape in zip((q, k, v), shapes, strict=True))
        if self.wish.qk_norm in ("rms", "layer"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def repeated(self, x: torch.Tensor) -> torch.Tensor:
        """(N, kv, T, features) to (N, heads, T, features)."""
        n, kv, t, features = x.shape
        if kv == self.heads:
            return x
        if self.wish.repeat == "interleave":
            return x.repeat_interleave(self.heads // kv, 1)
        x = x[:, :, None].expand(n, kv, self.heads // kv, t, features)
        return x.reshape(n, self.heads, t, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (y.transpose(1, 2) for y in self.project(x))
        q, k = self.rotate(q), self.rotate(k)
        bias = None
        if self.wish.bias_table:
            bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
        a = self.attend(q, k, v, bias)
        return self.out(a.transpose(1, 2).reshape(n, t, self.heads * self.features))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        grouped = self.kv < self.heads and self.wish.repeat == "gqa"
        if self.wish.core == "sdpa":
            if not grouped:
                k, v = self.repeated(k), self.repeated(v)
            scale = self.scale if self.wish.scale else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
        if self.wish.core == "einsum" and grouped:
            q = q.unflatten(1, (self.kv, -1))
            scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * self.scale
            if bias is not None:
                scores = scores + bias.unflatten(1, (self.kv, -1))
            return torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v).flatten(1, 2)
        k, v = self.repeated(k), self.repeated(v)
        if self.wish.core == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k) * self.scale
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        p = F.dropout(F.softmax(scores, -1), 0.1, self.training)
        return torch.einsum("bhts,bhsd->bhtd", p, v) if self.wish.core == "einsum" else torch.matmul(p, v)


@dataclass(frozen=True)
class TorchAttention(Block):
    """``nn.MultiheadAttention``."""

    heads: int = 2
    need_weights: bool = False
    batch_first: bool = True

    def make(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 2 or shape[1] % self.heads:
            return None
        return _TorchAttention(shape[1], self)


class _TorchAttention(nn.Module):
    def __init__(self, width: int, wish: TorchAttention) -> None:
        super().__init__()
        self.need_weights, self.batch_first = wish.need_weights, wish.batch_first
        self.attention = nn.MultiheadAttention(width, wish.heads, dropout=0.1, batch_first=wish.batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=self.need_weights)[0]
        return y if self.batch_first else y.transpose(0, 1)
