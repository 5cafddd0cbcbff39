"""Hypothesis strategies of blocks: plain ones are drawn most; simple ones come first, hypothesis shrinks to these."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.graph.pruning.attention_blocks import Attention, TorchAttention
from tests.graph.pruning.blocks import Block
from tests.graph.pruning.branches import Concat, Gate, Residual, Split, Twice
from tests.graph.pruning.bridges import AsTokens, Flatten, Patchify, PatchMerging, Pooled, Windows
from tests.graph.pruning.common_blocks import FUNCTIONS, Activation, ChannelOrder, Dropout, LayerScale, Reshape, Span
from tests.graph.pruning.conv_blocks import (
    ChannelShuffle,
    Conv,
    ConvTranspose,
    Depthwise,
    Downsample,
    ImageNorm,
    Pixels,
    Pool,
    Shift,
    SqueezeExcite,
)
from tests.graph.pruning.mixtures import Mixture, Recurrent
from tests.graph.pruning.norms import SPANNING
from tests.graph.pruning.parameter_blocks import DIRECT, Direct, TiedLinears
from tests.graph.pruning.token_blocks import (
    MLP,
    ClassToken,
    Linear,
    Positions,
    TimeConv,
    TimeShift,
    TokenNorm,
)

__all__ = ["images", "to_tokens", "to_vectors", "tokens", "vectors"]

Blocks = st.SearchStrategy[Block]
WIDTHS = st.sampled_from((8, 4, 6, 12, 16, 3, 2, 5))
GROUPS = st.sampled_from((1, 2, 4, 3))


def images(depth: int) -> Blocks:
    """Draw a block on images; it may hold others, `depth` deep."""
    conv = st.builds(Conv, WIDTHS, st.sampled_from((1, 3)), st.sampled_from((1, 1, 2)), GROUPS, st.booleans())
    depthwise = st.builds(Depthwise, st.sampled_from((1, 2)), st.sampled_from((1, 2)), st.booleans())
    norms = st.sampled_from(("batch", "batch", "group", "layer", "instance", "manual_layer", "rms", "manual_rms"))
    mostly = st.sampled_from((True, True, True, False))
    norm = st.builds(ImageNorm, norms, st.sampled_from((1, 2, 4)), tracks=mostly, affine=mostly)
    rare = st.one_of(
        st.builds(ConvTranspose, WIDTHS, st.booleans(), GROUPS, st.booleans()),
        st.builds(Pool, st.sampled_from(("max", "average", "adaptive"))),
        st.builds(ChannelShuffle, st.sampled_from((2, 3, 4)), st.booleans()),
        st.builds(Pixels, st.booleans(), st.booleans()),
        st.builds(Shift, st.sampled_from(("flip", "roll", "rot90"))),
        st.builds(
            SqueezeExcite,
            st.sampled_from((4, 2)),
            st.sampled_from(("conv", "linear")),
            st.sampled_from(("sigmoid", "hardsigmoid")),
        ),
        st.builds(PatchMerging, WIDTHS, st.booleans()),
        _any(),
    )
    if depth == 0:
        return st.one_of(conv, conv, depthwise, norm, _activation(), rare)
    inner, token = _list(images(depth - 1), 3), _list(tokens(0), 3)
    deep = st.one_of(
        _holding(inner),
        st.builds(Downsample, inner, WIDTHS, st.sampled_from(("conv", "pool", "pad"))),
        st.builds(AsTokens, token),
        st.builds(Windows, token, st.booleans(), st.booleans()),
    )
    return st.one_of(conv, conv, depthwise, norm, _activation(), rare, deep, deep)


def tokens(depth: int) -> Blocks:
    """Draw a block on tokens."""
    linear = st.builds(Linear, WIDTHS, st.booleans())
    rare = st.one_of(
        st.builds(TimeConv, WIDTHS, st.booleans()),
        st.builds(TimeShift, st.sampled_from(("flip", "roll", "mix"))),
        st.builds(Positions, st.sampled_from(("parameter", "sines", "embedding"))),
        st.builds(ClassToken),
        _any(),
    )
    big = st.one_of(_attention(), _attention(), _recurrent(), _mixture(), _mlp(), _direct())
    plain = (linear, _mlp(), _token_norm(), _activation(), rare, big, big)
    return st.one_of(*plain) if depth == 0 else st.one_of(*plain, _holding(_list(tokens(depth - 1), 3)))


def vectors(depth: int) -> Blocks:
    """Draw a block on vectors."""
    plain = (st.builds(Linear, WIDTHS, st.booleans()), _mlp(), _token_norm(), _activation(), _direct(), _any())
    return st.one_of(*plain) if depth == 0 else st.one_of(*plain, _holding(_list(vectors(depth - 1), 2)))


def to_tokens() -> Blocks:
    return st.builds(Patchify, st.sampled_from(("positions", "conv", "view")), WIDTHS)


def to_vectors() -> Blocks:
    return st.one_of(
        st.builds(Flatten, st.sampled_from(("flatten", "view", "reshape"))),
        st.builds(Pooled, st.sampled_from(("mean", "max"))),
    )


def _list(block: Blocks, most: int) -> st.SearchStrategy[tuple[Block, ...]]:
    return st.lists(block, max_size=most).map(tuple)


def _holding(inner: st.SearchStrategy[tuple[Block, ...]]) -> Blocks:
    fits = st.sampled_from(("linear", "pad"))
    forms = st.sampled_from(("chunk", "split", "slice", "narrow", "strided", "unbind", "index"))
    joins = st.sampled_from(("cat", "swap", "interleave", "stack", "add", "mul"))
    return st.one_of(
        st.builds(Residual, inner, st.sampled_from(("add", "add", "sub", "stack")), fits, st.booleans()),
        st.builds(Concat, st.lists(inner, min_size=1, max_size=2).map(tuple), st.booleans()),
        st.builds(Split, inner, inner, forms, joins, fits),
        st.builds(Gate, inner, inner, st.booleans(), fits),
        st.builds(Twice, inner, fits),
    )


def _any() -> Blocks:
    reshapes = ("shuffle", "scale_blocks", "scale_places", "max_blocks", "mean_blocks")
    return st.one_of(
        st.builds(LayerScale, st.booleans()),
        st.builds(Dropout, st.booleans()),
        st.builds(ChannelOrder, st.sampled_from(("index_select", "index", "flip", "roll", "repeat"))),
        st.builds(Reshape, st.sampled_from(reshapes), st.sampled_from((2, 3, 4))),
        st.builds(Span, st.sampled_from(tuple(SPANNING))),
    )


def _activation() -> Blocks:
    return st.builds(Activation, st.sampled_from((*FUNCTIONS, "prelu", "glu", "swiglu")))


def _token_norm() -> Blocks:
    return st.builds(TokenNorm, st.sampled_from(("layer", "rms", "manual_rms", "batch", "plain")), st.booleans())


def _mlp() -> Blocks:
    return st.builds(MLP, WIDTHS, st.sampled_from(("gelu", "relu", "silu")), st.sampled_from(("none", "packed", "two")))


def _direct() -> Blocks:
    return st.one_of(
        st.builds(Direct, st.sampled_from(DIRECT), WIDTHS),
        st.builds(TiedLinears, st.booleans(), WIDTHS),
    )


def _recurrent() -> Blocks:
    kinds = st.sampled_from(("lstm", "gru", "rnn"))
    return st.builds(Recurrent, kinds, st.integers(2, 6), st.integers(1, 2), st.booleans(), st.booleans())


def _mixture() -> Blocks:
    return st.builds(Mixture, st.integers(2, 3), st.integers(2, 6), st.sampled_from(("einsum", "bmm", "loop")))


def _attention() -> Blocks:
    rarely = st.sampled_from((False, False, True))
    by_hand = st.builds(
        Attention,
        heads=st.sampled_from((2, 4, 1, 3)),
        features=st.sampled_from((4, 2, 6)),
        core=st.sampled_from(("matmul", "sdpa", "einsum")),
        kv=st.sampled_from((0, 0, 1, 2)),
        repeat=st.sampled_from(("expand", "interleave", "gqa")),
        packing=st.sampled_from(("separate", "view", "chunk", "split", "per_head")),
        qk_norm=st.sampled_from(("none", "none", "none", "rms", "layer", "all_heads")),
        rotary=st.sampled_from(("none", "none", "half", "pairs")),
        frequencies=st.booleans(),
        bias_table=rarely,
        scale=rarely,
        bias=st.booleans(),
    )
    return st.one_of(
        by_hand, by_hand, st.builds(TorchAttention, st.sampled_from((2, 4, 1)), st.booleans(), st.booleans())
    )
