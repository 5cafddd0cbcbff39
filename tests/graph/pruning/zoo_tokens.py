"""The zoo's models of tokens without attention, and the groups that must be found in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.graph.pruning.branches import Residual, Twice
from tests.graph.pruning.bridges import Pooled
from tests.graph.pruning.common_blocks import Activation
from tests.graph.pruning.mixtures import Mixture, Recurrent
from tests.graph.pruning.norms import LayerNorm
from tests.graph.pruning.parameter_blocks import DIRECT, Direct, TiedLinears
from tests.graph.pruning.random_networks import Classifier, Ids, Sequence
from tests.graph.pruning.token_blocks import MLP, ClassToken, Linear, Positions, TimeConv, TokenNorm
from tests.graph.pruning.zoo_case import Case, any_kind, case, channels, generated

__all__ = ["TOKENS"]

INPUT = Sequence(length=5, width=4)
RELU = Activation("relu")
LAST = Linear(3)


def recurrent(kind: str, gates: int, **options: bool | int) -> Case:
    """Make a case of a recurrent layer: a unit is one hidden feature, in every gate (and in every layer)."""
    rnn = "blocks.1.rnn"
    hidden = any_kind(
        4,
        f"{rnn}.weight_ih_l0:0*{gates}",
        f"{rnn}.weight_hh_l0:0*{gates}",
        f"{rnn}.weight_hh_l0:1*1",
        f"{rnn}.bias_ih_l0:0*{gates}",
        f"{rnn}.bias_hh_l0:0*{gates}",
        "blocks.2.weight:1",
    )
    inputs = channels(6, "blocks.0.weight:0*1", f"{rnn}.weight_ih_l0:1*1")
    return case(INPUT, (Linear(6), Recurrent(kind, 4, **options), LAST), hidden, inputs)


def direct(form: str) -> Case:
    """Make a case of a parameter used directly: its rows are what the linear before gives, or the other way round."""
    weight = "blocks.1.weight"
    into, out = (0, 1) if form == "matmul" else (1, 0)
    given = channels(8, "blocks.0.weight:0*1", f"{weight}:{into}*1")
    if form == "columns":  # two of its ten columns are read by nothing
        given = channels(8, "blocks.0.weight:0*1", f"{weight}:1*1", "blocks.0.bias:0*1")
    made = channels(6, f"{weight}:{out}*1", "blocks.3.weight:1*1")
    body = (Linear(8), Direct(form, 6), RELU, LAST)
    if form == "cat":  # six rows of one parameter, two of another
        return case(INPUT, body, given, made, channels(2, "blocks.1.other:0*1", "blocks.3.weight:1*1"))
    if form == "low_rank":
        return case(INPUT, body, given, made, channels(4, "blocks.1.up:1*1", "blocks.1.down:0*1"))
    return case(INPUT, body, given, made)


def mixture(form: str) -> Case:
    experts = "blocks.1.experts"
    hidden = channels(4, "blocks.1.up:2*1", "blocks.1.down:1*1")
    stream = channels(8, "blocks.0.weight:0*1", "blocks.1.router.weight:1*1", "blocks.1.up:1*1")
    if form == "loop":
        hidden = channels(4, f"{experts}.1.0.weight:0*1", f"{experts}.1.2.weight:1*1")
        stream = channels(8, "blocks.0.weight:0*1", "blocks.1.router.weight:1*1", f"{experts}.0.0.weight:1*1")
    made = channels(8, "blocks.1.down:2*1" if form != "loop" else f"{experts}.0.2.weight:0*1", "blocks.2.weight:1*1")
    return case(INPUT, (Linear(8), Mixture(3, 4, form), LAST), hidden, stream, made)


class Bag(nn.Module):
    """An embedding bag, and two linears."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.middle, self.last = nn.EmbeddingBag(7, 8, mode=mode), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.bag(x)).relu())


class Gather(nn.Module):
    """Features read by ``gather`` at constant indices."""

    index: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("index", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y.gather(-1, self.index.expand(y.shape[0], y.shape[1], 8)))


class Between(nn.Module):
    """A function of tokens between two linears; `module` is what the function may call."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], module: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.function, self.module = function, module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.module, self.first(x)))


def merged(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Batch norm over tokens (LeViT)."""
    return norm(x.flatten(0, 1)).reshape_as(x)


def prefixed(scale: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """No prefix tokens beside those that are scaled (timm's rotary attention without a class token)."""
    return torch.cat([x[:, :0], scale(x[:, 0:])], 1)


def windowed(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Overlapping windows over tokens (halo attention)."""
    return x.unfold(1, 2, 1).sum(-1)


def positions(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A grouped convolution under weight norm over time (wav2vec 2.0)."""
    return x + conv(x.transpose(1, 2)).transpose(1, 2)


def within(
    function: Callable[[nn.Module, torch.Tensor], torch.Tensor], module: Callable[[], nn.Module], *cuts: str
) -> Case:
    """Make a case of a function between two linears: the 8 features of the first go through it."""
    stream = any_kind(8, "first.weight:0*1", *cuts, "last.weight:1*1")
    return Case(lambda: Between(function, module()), generated(5, 4), (stream,))


def ids(batch: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, 7, (batch, 5), generator=torch.Generator().manual_seed(batch)),)


BAG = (channels(8, "bag.weight:1*1", "middle.weight:1*1"), channels(6, "middle.weight:0*1", "last.weight:1*1"))
STREAM = channels(8, "blocks.0.weight:0*1", "blocks.2.weight:1*1")


def between(block: object, *cuts: str) -> Case:
    """Make a case of a block between two linears: the 8 features of the first go through it."""
    return case(INPUT, (Linear(8), block, LAST), channels(8, "blocks.0.weight:0*1", *cuts, "blocks.2.weight:1*1"))  # pyright: ignore


TOKENS: dict[str, Case] = {
    "linear": case(INPUT, (Linear(8), RELU, LAST), STREAM),
    "conv1d": case(
        INPUT, (TimeConv(8), RELU, TimeConv(6)), channels(8, "blocks.0.inner.weight:0*1", "blocks.2.inner.weight:1*1")
    ),
    "depthwise_conv1d": case(
        INPUT, (Linear(8), TimeConv(depthwise=True), LAST), any_kind(8, "blocks.1.inner.weight:0*1")
    ),
    "mlp": case(INPUT, (MLP(8), LAST), channels(8, "blocks.0.up.weight:0*1", "blocks.0.down.weight:1*1")),
    "gated_mlp": case(
        INPUT,
        (MLP(8, "silu", "two"), LAST),
        channels(8, "blocks.0.up.weight:0*1", "blocks.0.gate.weight:0*1", "blocks.0.down.weight:1*1"),
    ),
    "packed_gated_mlp": case(
        INPUT,
        (MLP(8, "silu", "packed"), LAST),
        channels(8, "blocks.0.up.weight:0*2", "blocks.0.up.bias:0*2", "blocks.0.down.weight:1*1"),
    ),
    "token_layer_norm": between(TokenNorm("layer"), "blocks.1.weight:0*1", "blocks.1.bias:0*1"),
    "layer_norm_without_weight": case(
        INPUT, (Linear(8), TokenNorm("plain"), LAST), channels(8, "blocks.0.weight:0*1", "blocks.1.linear.weight:1*1")
    ),
    "token_rms_norm": between(TokenNorm("rms"), "blocks.1.weight:0*1"),
    "token_manual_rms_norm": between(TokenNorm("manual_rms"), "blocks.1.weight:0*1"),
    "batch_norm_1d": between(TokenNorm("batch"), "blocks.1.inner.running_mean:0*1"),
    "class_token": between(ClassToken(), "blocks.1.token:2*1"),
    "position_parameter": between(Positions("parameter"), "blocks.1.table:2*1"),
    "position_sines": between(Positions("sines"), "blocks.1.sines:1*1"),
    "position_embedding": between(Positions("embedding"), "blocks.1.embed.weight:1*1"),
    "embedding": case(Ids(5, 8), (LAST,), channels(8, "embed.weight:1*1", "blocks.0.weight:1*1")),
    "tied_embedding": case(
        Ids(5, 8),
        (Residual((Linear(6), RELU)),),
        channels(8, "embed.weight:1*1", "blocks.0.inner.0.0.weight:1*1", "blocks.0.inner.1.weight:0*1"),
        channels(6, "blocks.0.inner.0.0.weight:0*1", "blocks.0.inner.1.weight:1*1"),
        head=Classifier(tied=True),
    ),
    "embedding_bag_mean": Case(lambda: Bag("mean"), ids, BAG),
    "embedding_bag_sum": Case(lambda: Bag("sum"), ids, BAG),
    "gather": Case(Gather, generated(5, 4)),
    "reshape_as": within(merged, lambda: nn.BatchNorm1d(8), "module.weight:0*1"),
    "empty_prefix": within(prefixed, lambda: LayerNorm(8), "module.weight:0*1"),
    "unfold": within(windowed, nn.Identity),
    "weight_norm": Case(
        lambda: Between(positions, weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)),
        generated(5, 4),
        (any_kind(4, "first.weight:0*2", "module.bias:0*2", "last.weight:1*2"),),
    ),
    "lstm": recurrent("lstm", 4),
    "lstm_two_layers_both_ways": recurrent("lstm", 4, layers=2, bidirectional=True),
    "gru": recurrent("gru", 3),
    "gru_both_ways": recurrent("gru", 3, bidirectional=True, batch_first=False),
    "rnn_two_layers": recurrent("rnn", 1, layers=2),
    "tied_linears": case(INPUT, (Linear(8), TiedLinears(), LAST), channels(8, "blocks.1.first.weight:0*1")),
    "tied_transposed": case(
        INPUT,
        (Linear(8), TiedLinears(transposed=True, hidden=6), LAST),
        channels(6, "blocks.1.first.weight:0*1", "blocks.1.first.bias:0*1"),
        channels(8, "blocks.0.weight:0*1", "blocks.1.first.weight:1*1", "blocks.1.bias:0*1", "blocks.2.weight:1*1"),
    ),
    "linear_twice": case(
        INPUT,
        (Linear(8), Twice((Linear(6), RELU)), LAST),
        channels(6, "blocks.1.inner.0.0.weight:0*1", "blocks.1.inner.1.weight:1*1"),
    ),
    "pooled_tokens": case(INPUT, (Linear(8), Pooled("mean"), LAST), STREAM),
    **{f"direct_{form}": direct(form) for form in DIRECT},
    **{f"mixture_{form}": mixture(form) for form in ("einsum", "bmm", "loop")},
}
