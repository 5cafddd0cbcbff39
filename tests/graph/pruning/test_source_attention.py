"""`nn.MultiheadAttention` with fewer or thinner heads: equal to the original, and to the masked original."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.pruning.source_plans import plan_of, remove
from torchopt_passes.graph.pruning.narrow_attention import NarrowMultiheadAttention, narrow

D = torch.float64


def attention(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(8, 4, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def call(layer: nn.Module, case: dict[str, Any], *, kdim: int = 8, vdim: int = 8) -> Any:
    torch.manual_seed(1)
    if case.get("unbatched"):
        shapes = [(5, 8), (6, kdim), (6, vdim)]
    elif getattr(layer, "batch_first", False):
        shapes = [(2, 5, 8), (2, 6, kdim), (2, 6, vdim)]
    else:
        shapes = [(5, 2, 8), (6, 2, kdim), (6, 2, vdim)]
    query, key, value = (torch.randn(*shape, dtype=D) for shape in shapes)
    kwargs = {name: item for name, item in case.items() if name != "unbatched"}
    return layer(query, key, value, **kwargs)


BOOL_MASK = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.3
BOOL_MASK[:, 0] = False
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "bool mask": {"attn_mask": BOOL_MASK},
    "float mask": {"attn_mask": torch.randn(5, 6, dtype=D), "need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": BOOL_MASK, "need_weights": False},
    "float padding": {"key_padding_mask": torch.zeros(2, 6, dtype=D).masked_fill(PADDING, -1e9)},
    "causal": {"attn_mask": ~torch.ones(5, 6).tril().bool(), "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": ~torch.ones(5, 6).tril().bool(), "is_causal": True},
    "causal with padding": {
        "attn_mask": ~torch.ones(5, 6).tril().bool(),
        "key_padding_mask": PADDING,
        "is_causal": True,
        "need_weights": False,
    },
    "unbatched": {"unbatched": True},
    "unbatched with padding": {"unbatched": True, "key_padding_mask": PADDING[1], "need_weights": False},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias of keys and values": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 7, "batch_first": True},
}


def equal(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True)
    return all((x is None and y is None) or torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in pairs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_narrow_attention_of_all_heads_is_the_original(options: str, case: str) -> None:
    layer = attention(**OPTIONS[options])
    widths = {"kdim": layer.kdim, "vdim": layer.vdim}
    expected = call(layer, CASES[case], **widths)
    parameters = dict(layer.named_parameters())
    assert narrow(layer) is layer and isinstance(layer, nn.MultiheadAttention)
    assert equal(call(layer, CASES[case], **widths), expected)
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())


def test_masks_of_each_head_and_batch() -> None:
    masks = torch.randn(8, 5, 6, dtype=D)
    layer = attention()
    expected = call(layer, {"attn_mask": masks})
    assert equal(call(narrow(layer), {"attn_mask": masks}), expected)
    head_edits(layer, (1,))
    with pytest.raises(RuntimeError, match="those of the heads that stay"):
        call(layer, {"attn_mask": masks})


def test_dropout_trains() -> None:
    layer = narrow(attention(dropout=0.5, batch_first=True))
    output, _ = call(layer.train(), {"need_weights": False})
    assert not torch.equal(output, call(layer.eval(), {"need_weights": False})[0])
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def head_edits(layer: nn.MultiheadAttention, heads: tuple[int, ...]) -> nn.Module:
    """Remove heads of two features from a layer, in place, and return the masked original."""
    reference = copy.deepcopy(layer)
    rows = [2 * head + place for head in heads for place in range(2)]
    packed = [8 * part + row for part in range(3) for row in rows]
    edits: list[Any] = [remove("out_proj.weight", 1, rows, 8)]
    if layer.in_proj_weight is None:
        edits += [remove(f"{name}_proj_weight", 0, rows, 8) for name in "qkv"]
    else:
        edits.append(remove("in_proj_weight", 0, packed, 24))
    if layer.in_proj_bias is not None:
        edits.append(remove("in_proj_bias", 0, packed, 24))
    if layer.bias_k is not None:
        edits += [remove(name, 2, rows, 8) for name in ("bias_k", "bias_v")]
    with torch.no_grad():
        reference.out_proj.weight[:, rows] = 0
    plan_of(*edits).apply(layer)
    return reference


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_removed_heads_equal_masked_heads(options: str, case: str) -> None:
    layer = attention(**OPTIONS[options])
    widths = {"kdim": layer.kdim, "vdim": layer.vdim}
    reference = head_edits(layer, (0, 2, 3))
    assert isinstance(layer, NarrowMultiheadAttention) and (layer.num_heads, layer.head_dim, layer.embed_dim) == (
        1,
        2,
        8,
    )
    (output, weights), expected = call(layer, CASES[case], **widths), call(reference, CASES[case], **widths)
    assert torch.allclose(output, expected[0], rtol=1e-9, atol=1e-12)
    if weights is not None and not CASES[case].get("average_attn_weights", True):
        assert torch.allclose(weights[:, 0], expected[1][:, 1])
    torch.manual_seed(0)
    copied = copy.deepcopy(layer)
    assert equal(call(copied, CASES[case], **widths), (output, weights))


def test_removed_features_of_every_head_keep_the_scale() -> None:
    """Queries and keys lose one place, values the other: scores are still divided by the old head's square root."""
    layer = attention(batch_first=True)
    queries, values = [0, 2, 4, 6], [1, 3, 5, 7]
    rows = [*queries, *(8 + row for row in queries), *(16 + row for row in values)]
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.in_proj_weight[queries], reference.in_proj_bias[queries] = 0, 0
        reference.out_proj.weight[:, values] = 0
    plan_of(
        remove("in_proj_weight", 0, rows, 24),
        remove("in_proj_bias", 0, rows, 24),
        remove("out_proj.weight", 1, values, 8),
    ).apply(layer)
    assert isinstance(layer, NarrowMultiheadAttention)
    assert (layer.num_heads, layer.head_dim, layer.value_dim, layer.scaled_dim) == (4, 1, 1, 2)
    assert equal(call(layer, {}), call(reference, {}))


def test_heads_are_removed_again() -> None:
    layer = attention(batch_first=True)
    reference = head_edits(layer, (0,))
    with torch.no_grad():
        reference.out_proj.weight[:, [4, 5]] = 0  # head 2, the second of those that stay
    rows = [2, 3]
    packed = [6 * part + row for part in range(3) for row in rows]
    plan_of(
        remove("in_proj_weight", 0, packed, 18),
        remove("in_proj_bias", 0, packed, 18),
        remove("out_proj.weight", 1, rows, 6),
    ).apply(layer)
    assert layer.num_heads == 2 and torch.allclose(call(layer, {})[0], call(reference, {})[0], rtol=1e-9)


def test_a_width_that_follows_the_heads_stays_the_plain_class() -> None:
    layer = attention()
    packed = [8 * part + row for part in range(3) for row in (0, 1, 2, 3)]
    plan_of(
        remove("in_proj_weight", 0, packed, 24),
        remove("in_proj_bias", 0, packed, 24),
        remove("in_proj_weight", 1, (4, 5, 6, 7), 8),
        remove("out_proj.weight", 1, (0, 1, 2, 3), 8),
        remove("out_proj.weight", 0, (4, 5, 6, 7), 8),
        remove("out_proj.bias", 0, (4, 5, 6, 7), 8),
    ).apply(layer)
    assert type(layer) is nn.MultiheadAttention and (layer.embed_dim, layer.num_heads, layer.kdim) == (4, 2, 4)
    x = torch.randn(5, 2, 4, dtype=D)
    assert layer(x, x, x)[0].shape == (5, 2, 4)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([remove("in_proj_weight", 0, [0, 1, 8, 9, 16, 17], 24)], "must lose the same heads"),
        (
            [remove("in_proj_weight", 0, [0, 1, 10, 11, 16, 17], 24), remove("out_proj.weight", 1, [0, 1], 8)],
            "same heads",
        ),
        ([remove("in_proj_weight", 0, [0, 8, 16], 24), remove("out_proj.weight", 1, [0], 8)], "unequal sizes"),
    ],
)
def test_heads_that_do_not_leave_whole_are_refused(edits: list[Any], says: str) -> None:
    layer = attention()
    with pytest.raises(top.PlanError, match=says):
        plan_of(*edits).apply(layer)
    assert type(layer) is nn.MultiheadAttention and layer.in_proj_weight.shape == (24, 8)


def test_a_failed_plan_gives_the_class_back() -> None:
    layer = nn.Sequential(attention())
    rows = [0, 1, 8, 9, 16, 17]
    edits = [remove(f"0.in_proj_{kind}", 0, rows, 24) for kind in ("weight", "bias")]
    bad = top.MaskWeights(target="0.out_proj.bias", reason="", mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(top.PlanError, match="its mask"):
        plan_of(*edits, remove("0.out_proj.weight", 1, [0, 1], 8), bad).apply(layer)
    assert type(layer[0]) is nn.MultiheadAttention and layer[0].num_heads == 4
    x = torch.randn(5, 2, 8, dtype=D)
    assert layer[0](x, x, x)[0].shape == (5, 2, 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the masked original takes that path
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_transformer_encoder_without_its_fast_path(norm_first: bool, which: int) -> None:
    """In eval mode torch's fused kernels would split `embed_dim` into heads; with padding they nest tensors."""
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of norm_first, for which there is no fast path
        model = nn.TransformerEncoder(layer, 2).double()
    rows, path = [0, 1, 4, 5], f"layers.{which}"
    packed = [8 * part + row for part in range(3) for row in rows]
    plan = plan_of(
        remove(f"{path}.self_attn.in_proj_weight", 0, packed, 24),
        remove(f"{path}.self_attn.in_proj_bias", 0, packed, 24),
        remove(f"{path}.self_attn.out_proj.weight", 1, rows, 8),
        remove(f"{path}.linear1.weight", 0, (0, 5), 16),
        remove(f"{path}.linear1.bias", 0, (0, 5), 16),
        remove(f"{path}.linear2.weight", 1, (0, 5), 16),
    )
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.layers[which].self_attn.out_proj.weight[:, rows] = 0
        reference.layers[which].linear2.weight[:, [0, 5]] = 0
    plan.apply(model)
    x, padding = torch.randn(2, 6, 8, dtype=D), PADDING
    for training in (True, False):
        for each in (model, reference):
            each.train(training)
            for module in each.modules():
                if isinstance(module, nn.Dropout | nn.MultiheadAttention):
                    module.training = False
        with torch.set_grad_enabled(training):
            assert torch.allclose(model(x), reference(x), rtol=1e-9, atol=1e-12)
            got, expected = (each(x, src_key_padding_mask=padding) for each in (model, reference))
            assert torch.allclose(got[~padding], expected[~padding], rtol=1e-9, atol=1e-12)
    assert top.capture(model, (x,)).eval()(x).shape == x.shape
