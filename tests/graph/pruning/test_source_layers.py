"""After a cut every layer of torch.nn tells its new sizes, and computes what the masked layer computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchopt_passes as top
from tests.graph.pruning.source_plans import plan_of, remove

D = torch.float64


def images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 6, 6, dtype=D)


def apply(layer: nn.Module, *edits: Any) -> None:
    plan_of(*edits).apply(layer)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_linear_bilinear_and_the_shape_of_norms() -> None:
    bilinear = nn.Bilinear(4, 5, 6, dtype=D)
    apply(bilinear, remove("weight", 0, (0,), 6), remove("bias", 0, (0,), 6), remove("weight", 2, (1, 2), 5))
    assert (bilinear.in1_features, bilinear.in2_features, bilinear.out_features) == (4, 3, 5)
    assert bilinear(torch.ones(2, 4, dtype=D), torch.ones(2, 3, dtype=D)).shape == (2, 5)
    for norm in (nn.LayerNorm(6, dtype=D), nn.RMSNorm(6, dtype=D)):
        apply(norm, *(remove(name, 0, (0, 3), 6) for name, _ in norm.named_parameters()))
        assert norm.normalized_shape == (4,) and norm(torch.randn(2, 4, dtype=D)).shape == (2, 4)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_norms_of_channels(kind: Any) -> None:
    norm = kind(6, affine=True, track_running_stats=True).double().eval()
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(6))
    x, before = images(6), copy.deepcopy(norm)
    gone = (1, 2)
    apply(norm, *(remove(n, 0, gone, 6) for n in ("weight", "bias", "running_mean", "running_var")))
    assert norm.num_features == 4
    keep = [0, 3, 4, 5]
    assert close(norm(x[:, keep]), before(x)[:, keep])


@pytest.mark.parametrize(
    ("gone", "groups"),
    [((2, 3, 6, 7), 2), ((0, 2, 4, 6), 4), ((0, 1, 2, 4, 6), 3)],
    ids=["whole groups", "the same place of each", "both"],
)
def test_group_norm(gone: tuple[int, ...], groups: int) -> None:
    norm = nn.GroupNorm(4, 8, dtype=D)
    apply(norm, remove("weight", 0, gone, 8), remove("bias", 0, gone, 8))
    assert (norm.num_groups, norm.num_channels) == (groups, 8 - len(gone))
    assert norm(images(8 - len(gone))).shape[1] == 8 - len(gone)


def test_groups_of_unequal_sizes_are_refused() -> None:
    norm, conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1, groups=4)
    with pytest.raises(top.PlanError, match="unequal sizes"):
        apply(norm, remove("weight", 0, (0,), 8), remove("bias", 0, (0,), 8))
    with pytest.raises(top.PlanError, match="unequal sizes"):
        apply(nn.Sequential(conv), remove("0.weight", 0, (0,), 8), remove("0.bias", 0, (0,), 8))
    assert norm.weight.shape == (8,) and conv.weight.shape == (8, 2, 1, 1) and conv.groups == 4


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(multiplier: int) -> None:
    conv = nn.Conv2d(6, 6 * multiplier, 3, padding=1, groups=6, dtype=D)
    before, x = copy.deepcopy(conv), images(6)
    gone = [multiplier * channel + place for channel in (1, 4) for place in range(multiplier)]
    apply(conv, remove("weight", 0, gone, 6 * multiplier), remove("bias", 0, gone, 6 * multiplier))
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 4, 4 * multiplier)
    keep = [i for i in range(6 * multiplier) if i not in gone]
    assert close(conv(x[:, [0, 2, 3, 5]]), before(x)[:, keep])


def test_grouped_convolution_loses_groups_or_places() -> None:
    conv, x = nn.Conv1d(6, 9, 3, groups=3, dtype=D), torch.randn(2, 6, 8, dtype=D)
    whole, places = copy.deepcopy(conv), copy.deepcopy(conv)
    apply(whole, remove("weight", 0, (3, 4, 5), 9), remove("bias", 0, (3, 4, 5), 9))
    assert (whole.groups, whole.in_channels, whole.out_channels) == (2, 4, 6)
    assert close(whole(x[:, [0, 1, 4, 5]]), conv(x)[:, [0, 1, 2, 6, 7, 8]])
    apply(places, remove("weight", 0, (0, 3, 6), 9), remove("bias", 0, (0, 3, 6), 9), remove("weight", 1, (1,), 2))
    assert (places.groups, places.in_channels, places.out_channels) == (3, 3, 6)
    cut = x.clone()
    cut[:, [1, 3, 5]] = 0
    assert close(places(x[:, [0, 2, 4]]), conv(cut)[:, [1, 2, 4, 5, 7, 8]])


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, dtype=D)
    x, before = images(4), copy.deepcopy(conv)
    if groups == 1:
        apply(conv, remove("weight", 0, (0,), 4), remove("weight", 1, (1, 2), 6), remove("bias", 0, (1, 2), 6))
        x[:, 0] = 0
        assert close(conv(x[:, 1:]), before(x)[:, [0, 3, 4, 5]])
    else:
        apply(conv, remove("weight", 0, (0, 1), 4), remove("bias", 0, (0, 1, 2), 6))
        assert close(conv(x[:, 2:]), before(x)[:, 3:])
    assert (conv.groups, conv.in_channels, conv.out_channels) == ((1, 3, 4) if groups == 1 else (1, 2, 3))


def test_embedding_rows_move_the_padding_index() -> None:
    embedding = nn.Embedding(6, 4, padding_idx=3, dtype=D)
    apply(embedding, remove("weight", 0, (0, 4), 6), remove("weight", 1, (2,), 4))
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (4, 3, 2)
    assert not embedding(torch.tensor([2])).any()
    with pytest.raises(top.PlanError, match="padding_idx=3"):
        apply(nn.EmbeddingBag(6, 4, padding_idx=3), remove("weight", 0, (3,), 6))


def test_prelu_and_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    prelu, conv = nn.PReLU(4), Conv1D(6, 4).double()
    apply(prelu, remove("weight", 0, (0,), 4))
    assert prelu.num_parameters == 3
    apply(conv, remove("weight", 1, (0, 5), 6), remove("bias", 0, (0, 5), 6), remove("weight", 0, (3,), 4))
    assert (conv.nf, conv.nx) == (4, 3) and conv(torch.ones(2, 3, dtype=D)).shape == (2, 4)


def test_a_layer_of_the_users_own_with_the_usual_names() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(torch.randn(6, 4))

    layer = Scaled()
    apply(layer, remove("weight", 0, (0,), 6))
    assert (layer.in_features, layer.out_features) == (4, 5)


def test_a_parametrized_layer() -> None:
    conv = parametrizations.weight_norm(nn.Conv1d(4, 6, 3, dtype=D))
    before, x = copy.deepcopy(conv), torch.randn(2, 4, 8, dtype=D)
    both = (remove(f"parametrizations.weight.original{i}", 0, (1, 2), 6) for i in (0, 1))
    apply(conv, *both, remove("bias", 0, (1, 2), 6))
    assert conv.out_channels == 4 and close(conv(x), before(x)[:, [0, 3, 4, 5]])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_lose_hidden_units(kind: Any, gates: int, bidirectional: bool) -> None:
    layer = kind(3, 5, num_layers=2, bidirectional=bidirectional, batch_first=True).double()
    before, x = copy.deepcopy(layer), torch.randn(2, 6, 3, dtype=D)
    gone, directions = (0, 3), 2 if bidirectional else 1
    rows = [5 * gate + unit for gate in range(gates) for unit in gone]
    columns = [5 * direction + unit for direction in range(directions) for unit in gone]
    edits: list[Any] = []
    for depth in range(2):
        for suffix in ("", "_reverse")[:directions]:
            end = f"l{depth}{suffix}"
            edits += [remove(f"{name}_{end}", 0, rows, 5 * gates) for name in ("weight_ih", "bias_ih", "bias_hh")]
            edits += [remove(f"weight_hh_{end}", 0, rows, 5 * gates), remove(f"weight_hh_{end}", 1, gone, 5)]
            if depth:
                edits.append(remove(f"weight_ih_{end}", 1, columns, 5 * directions))
            with torch.no_grad():  # the masked layer: nobody reads the units that leave
                before.get_parameter(f"weight_hh_{end}")[:, list(gone)] = 0
                if depth:
                    before.get_parameter(f"weight_ih_{end}")[:, columns] = 0
    apply(layer, *edits)
    assert layer.hidden_size == 3 and layer.input_size == 3
    keep = [i for i in range(5 * directions) if i not in columns]
    assert close(layer(x)[0], before(x)[0][..., keep])


def test_recurrent_layers_that_would_differ_are_refused() -> None:
    lstm, one, names = nn.LSTM(3, 5, num_layers=2), nn.LSTM(3, 5), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    edits = [remove(f"{name}_l1", 0, (0, 5, 10, 15), 20) for name in names]
    with pytest.raises(top.PlanError, match="unequal hidden sizes"):
        apply(lstm, *edits, remove("weight_hh_l1", 1, (0,), 5))
    edits = [remove(f"{name}_l0", 0, (0, 6, 10, 15), 20) for name in names]
    with pytest.raises(top.PlanError, match="same units of each of its 4 gates"):
        apply(one, *edits, remove("weight_hh_l0", 1, (0,), 5))
    assert lstm.hidden_size == one.hidden_size == 5


def test_cells() -> None:
    cell = nn.GRUCell(3, 4, dtype=D)
    rows = (0, 4, 8)
    edits = [remove(name, 0, rows, 12) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    apply(cell, *edits, remove("weight_hh", 1, (0,), 4))
    assert cell.hidden_size == 3 and cell(torch.ones(2, 3, dtype=D)).shape == (2, 3)
