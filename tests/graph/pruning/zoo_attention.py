"""The zoo's models with attention, and the groups that must be found in them."""

from __future__ import annotations

from dataclasses import replace

from tests.graph.pruning.attention_blocks import Attention, TorchAttention
from tests.graph.pruning.branches import Residual
from tests.graph.pruning.bridges import Windows
from tests.graph.pruning.conv_blocks import Conv
from tests.graph.pruning.random_networks import Images, Sequence
from tests.graph.pruning.token_blocks import Linear, TokenNorm
from tests.graph.pruning.zoo_case import Case, Expected, case, channels, features, heads

__all__ = ["ATTENTION"]

INPUT = Sequence(length=5, width=4)
SEPARATE = Attention(heads=4, features=4, scale=True)


def within(block: Attention | TorchAttention, *expected: Expected) -> Case:
    """Make a case of a transformer's attention: linear, x + attention(norm(x)), linear."""
    inner = Residual((TokenNorm("layer"), block))
    return case(INPUT, (Linear(8), inner, Linear(3)), *(_named(e) for e in expected))


def _named(expected: Expected) -> Expected:
    cuts = tuple((f"blocks.1.inner.0.1.{fqn}", dim, count) for fqn, dim, count in expected.cuts)
    return replace(expected, cuts=cuts)


HEADS = heads(4, "q.weight:0*4", "q.bias:0*4", "k.weight:0*4", "v.weight:0*4", "out.weight:1*4")
VALUES = features(4, "v.weight:0*4", "v.bias:0*4", "out.weight:1*4")
KEYS = features(4, "q.weight:0*4", "k.weight:0*4", "k.bias:0*4")
GROUPS = heads(2, "q.weight:0*8", "k.weight:0*4", "v.weight:0*4", "out.weight:1*8")
GROUP_VALUES = features(4, "v.weight:0*2", "out.weight:1*4")
PACKED = (
    heads(4, "qkv.weight:0*12", "qkv.bias:0*12", "out.weight:1*4"),
    features(4, "qkv.weight:0*4", "out.weight:1*4"),
)
PAIRS = features(2, "q.weight:0*8", "k.weight:0*8", "cos:1*2", "sin:1*2")

ATTENTION: dict[str, Case] = {
    "attention_matmul": within(SEPARATE, HEADS, VALUES, KEYS),
    "attention_einsum": within(replace(SEPARATE, core="einsum"), HEADS, VALUES, KEYS),
    "attention_sdpa": within(replace(SEPARATE, core="sdpa", scale=False), HEADS, VALUES),
    "attention_sdpa_scale": within(replace(SEPARATE, core="sdpa"), HEADS, VALUES, KEYS),
    "gqa_expand": within(replace(SEPARATE, kv=2), GROUPS, GROUP_VALUES),
    "gqa_interleave": within(replace(SEPARATE, core="sdpa", kv=2, repeat="interleave"), GROUPS, GROUP_VALUES),
    "gqa_sdpa": within(replace(SEPARATE, core="sdpa", kv=2, repeat="gqa"), GROUPS, GROUP_VALUES),
    "gqa_einsum": within(replace(SEPARATE, core="einsum", kv=2, repeat="gqa"), GROUPS, GROUP_VALUES),
    "gqa_packed": within(
        replace(SEPARATE, core="sdpa", kv=2, packing="split"), heads(2, "qkv.weight:0*16", "out.weight:1*8")
    ),
    "mqa": within(replace(SEPARATE, kv=1), features(4, "v.weight:0*1", "out.weight:1*4")),
    "packed_view": within(  # one view splits q, k and v: they have as many features
        replace(SEPARATE, packing="view"), PACKED[0], features(4, "qkv.weight:0*12", "out.weight:1*4")
    ),
    "packed_chunk": within(replace(SEPARATE, packing="chunk", core="sdpa"), *PACKED),
    "packed_split": within(replace(SEPARATE, packing="split"), *PACKED),
    "packed_per_head": within(replace(SEPARATE, packing="per_head"), *PACKED),
    "multihead_module": within(
        TorchAttention(4), heads(4, "attention.in_proj_weight:0*6", "attention.out_proj.weight:1*2")
    ),
    "multihead_module_weights": within(
        TorchAttention(4, need_weights=True, batch_first=False),
        heads(4, "attention.in_proj_weight:0*6", "attention.in_proj_bias:0*6", "attention.out_proj.weight:1*2"),
    ),
    "rotary_half": within(replace(SEPARATE, rotary="half"), HEADS, VALUES, PAIRS),
    "rotary_pairs": within(replace(SEPARATE, rotary="pairs"), HEADS, VALUES, PAIRS),
    "rotary_of_frequencies": within(
        replace(SEPARATE, rotary="half", frequencies=True), HEADS, features(2, "q.weight:0*8", "inv_freq:0*1")
    ),
    "rotary_gqa": within(replace(SEPARATE, core="sdpa", kv=2, rotary="half"), GROUPS, GROUP_VALUES),
    "norm_of_each_head": within(
        replace(SEPARATE, qk_norm="rms"), HEADS, features(4, "q.weight:0*4", "q_norm.weight:0*1", "k_norm.weight:0*1")
    ),
    "norm_over_all_heads": within(
        replace(SEPARATE, qk_norm="all_heads"), replace(HEADS, cuts=(*HEADS.cuts, ("q_norm.weight", 0, 4)))
    ),
    "position_bias_table": within(
        replace(SEPARATE, bias_table=True), replace(HEADS, cuts=(*HEADS.cuts, ("table", 1, 1))), VALUES
    ),
    "position_bias_table_sdpa": within(
        replace(SEPARATE, bias_table=True, core="sdpa"), replace(HEADS, cuts=(*HEADS.cuts, ("table", 1, 1)))
    ),
    "attention_stream": case(
        INPUT,
        (Linear(8), Residual((TokenNorm("rms"), SEPARATE)), Linear(3)),
        channels(
            8,
            "blocks.0.weight:0*1",
            "blocks.1.inner.0.0.weight:0*1",
            "blocks.1.inner.0.1.q.weight:1*1",
            "blocks.1.inner.0.1.out.weight:0*1",
            "blocks.2.weight:1*1",
        ),
    ),
    "windows": case(
        Images(3, 4),
        (Conv(8), Windows((Attention(2, 4, bias_table=True),), shift=True), Conv(5)),
        channels(8, "blocks.0.weight:0*1", "blocks.1.inner.0.0.q.weight:1*1", "blocks.2.weight:1*1"),
        heads(2, "blocks.1.inner.0.0.q.weight:0*4", "blocks.1.inner.0.0.table:1*1"),
    ),
}
