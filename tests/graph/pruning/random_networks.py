"""Random networks: descriptions that hypothesis draws and shrinks, and the modules they describe.

>>> from tests.graph.pruning.conv_blocks import Conv
>>> network = Network(Images(channels=3, size=4), (Conv(out=6, kernel=3),), head=Classifier())
>>> model, inputs = build(network)
>>> tuple(model(*inputs).shape)
(2, 3)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.graph.pruning import block_strategies as draw
from tests.graph.pruning.blocks import Block, Shape, chain, channels, fit
from tests.graph.pruning.bridges import Flatten, Pooled
from torchopt_passes.graph.channels import ChannelGroup

__all__ = [
    "Classifier",
    "Ids",
    "Images",
    "Network",
    "Sequence",
    "build",
    "draw_keep",
    "inputs_of",
    "networks",
    "randomise",
]

VOCABULARY = 7


@dataclass(frozen=True)
class Images:
    channels: int = 3
    size: int = 4

    @property
    def shape(self) -> Shape:
        return (self.channels, self.size, self.size)


@dataclass(frozen=True)
class Sequence:
    length: int = 4
    width: int = 4

    @property
    def shape(self) -> Shape:
        return (self.length, self.width)


@dataclass(frozen=True)
class Ids:
    """Token ids, and the embedding in front."""

    length: int = 4
    width: int = 8

    @property
    def shape(self) -> Shape:
        return (self.length, self.width)


@dataclass(frozen=True)
class Classifier:
    """What makes 3 outputs; `tied` (of ids) instead reads tokens by the embedding's weight."""

    pool: Literal["mean", "max", "first", "flatten"] = "mean"
    tied: bool = False


@dataclass(frozen=True)
class Network:
    """A network: its input, its blocks, its head (None: the output is what the last block gives).

    Args:
        early: also return what the first block gives.
    """

    source: Images | Sequence | Ids
    blocks: tuple[Block, ...]
    head: Classifier | None = None
    batch: int = 2
    early: bool = False


class RandomNetwork(nn.Module):
    """The module that a `Network` describes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        shape = network.source.shape
        self.early = network.early
        self.embed = nn.Embedding(VOCABULARY, channels(shape)) if isinstance(network.source, Ids) else None
        self.blocks, shape = chain(network.blocks, shape)
        self.head, self.to_width = nn.Identity(), None
        if network.head is not None:
            if network.head.tied and self.embed is not None and len(shape) == 2:
                self.to_width = fit("linear", shape, network.source.shape)
            else:
                pool = Flatten() if network.head.pool == "flatten" else Pooled(network.head.pool)
                pooled = pool.make(shape) or nn.Identity()
                width = prod(shape) if network.head.pool == "flatten" else channels(shape)
                self.head = nn.Sequential(pooled, nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = x if self.embed is None else self.embed(x)
        first = None
        for block in self.blocks:
            y = block(y)
            first = y if first is None else first
        if self.embed is not None and self.to_width is not None:
            y = F.linear(self.to_width(y), self.embed.weight)
        y = self.head(y)
        return (y, first) if self.early and first is not None else y


def inputs_of(network: Network, batch: int) -> tuple[torch.Tensor]:
    """Return example inputs: normal numbers, or ids."""
    generator = torch.Generator().manual_seed(batch)
    if isinstance(network.source, Ids):
        return (torch.randint(0, VOCABULARY, (batch, network.source.length), generator=generator),)
    return (torch.randn(batch, *network.source.shape, generator=generator),)


def build(network: Network) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Return the module in train mode, with random weights, and its example inputs."""
    return randomise(RandomNetwork(network)), inputs_of(network, network.batch)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all state with numbers that keep outputs near 1 and tell every index from every other; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
                parameter.normal_(0.0, (parameter[0].numel()) ** -0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.3, generator=generator)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                norm_or_scale = parameter.dim() == 1 and name == "weight"
                if norm_or_scale or name == "gamma":
                    parameter.uniform_(0.5, 1.5, generator=generator)
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0.1, 0.5, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.train()


def draw_keep(data: st.DataObject, groups: Iterable[ChannelGroup]) -> dict[str, tuple[int, ...]]:
    """Draw the units that stay, by group; at least as many as must, and groups that stay whole are left out."""
    keep: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if group.locked is None:
            leaves = data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size), label=group.name)
            must_stay = max(0, group.constraints.min_units - leaves.count(False))
            stay = {unit for unit, leaf in enumerate(leaves) if not leaf}
            stay |= set([unit for unit, leaf in enumerate(leaves) if leaf][:must_stay])
            if len(stay) < group.size:
                keep[group.name] = tuple(sorted(stay))
    return keep


def _heads(pools: tuple[str, ...], tied: st.SearchStrategy[bool]) -> st.SearchStrategy[Classifier | None]:
    made = st.builds(Classifier, pool=st.sampled_from(pools), tied=tied)
    return st.one_of(made, made, made, st.none())


def networks() -> st.SearchStrategy[Network]:
    """Draw networks of images, of tokens, and from images to tokens."""
    images = st.builds(Images, st.sampled_from((3, 4, 8)), st.sampled_from((4, 8, 6, 5)))
    sequences = st.builds(Sequence, st.integers(3, 6), st.sampled_from((4, 8, 6)))
    ids = st.builds(Ids, st.integers(3, 6), st.sampled_from((8, 4, 12)))
    several = {"batch": st.integers(2, 3), "early": st.sampled_from((False, False, False, True))}
    no = st.just(False)

    def network(source: object, blocks: object, head: object) -> st.SearchStrategy[Network]:
        return st.builds(Network, source, blocks, head, **several)  # pyright: ignore

    conv = draw.images(2)
    token = draw.tokens(2)
    across = st.tuples(_some(conv, 3), draw.to_tokens(), _some(token, 4)).map(lambda p: (*p[0], p[1], *p[2]))
    down = st.tuples(_some(conv, 4), draw.to_vectors(), _some(draw.vectors(1), 3)).map(lambda p: (*p[0], p[1], *p[2]))
    return st.one_of(
        network(images, _some(conv, 6), _heads(("mean", "max", "flatten", "first"), no)),
        network(sequences, _some(token, 5), _heads(("mean", "max", "flatten", "first"), no)),
        network(ids, _some(token, 5), _heads(("mean", "first"), st.booleans())),
        network(images, across, _heads(("mean", "first", "flatten"), no)),
        network(images, down, _heads(("mean",), no)),
    )


def _some(block: st.SearchStrategy[Block], most: int) -> st.SearchStrategy[tuple[Block, ...]]:
    return st.lists(block, min_size=1, max_size=most).map(tuple)
