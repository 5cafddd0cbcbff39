"""Reconstruction: learn the rounding of a block's weights so that the block gives what it gave before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.adaround import SoftRounding, beta_at, rounding_loss
from torchopt_passes.graph.quantization.rounding import PreparedLayer
from torchopt_passes.graph.quantization.targets import FUSED_ACTIVATIONS, KINDS
from torchopt_passes.graph.quantization.walk import Walk

__all__ = ["Block", "Learning", "layer_block", "reconstruct"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A stretch of the graph whose weights are rounded together.

    Args:
        name: for reports.
        first: its first node.
        last: its last node.
        layers: the layers in it.
    """

    name: str
    first: fx.Node
    last: fx.Node
    layers: tuple[PreparedLayer, ...]


@dataclass(frozen=True)
class Learning:
    """How rounding is learned.

    Args:
        steps: of Adam; each reconstructs one calibration batch.
        learning_rate: of Adam, on V.
        regularization: weight of the term that makes roundings decide, next to an output error of 1 for nearest.
        seed: of the order of batches.
    """

    steps: int
    learning_rate: float
    regularization: float
    seed: int

    def check(self, name: str) -> None:
        """Refuse numbers that are none; `name` is the pass's."""
        if self.steps < 1 or self.learning_rate <= 0 or self.regularization < 0:
            raise ConfigError(f"{name}: steps >= 1, learning_rate > 0 and regularization >= 0")


def layer_block(walk: Walk, prepared: PreparedLayer) -> Block:
    """Return the block of one layer: its operation, the batch norm and the activation that alone read the result."""
    tail = prepared.layer.operation
    for wanted in ({aten.batch_norm.default}, FUSED_ACTIVATIONS):
        readers = [user for user in tail.users if user.target is not aten.sym_size.int]
        if len(readers) == 1 and readers[0].target in wanted:
            tail = readers[0]
    start, stop = walk.position[prepared.layer.operation], walk.position[tail]
    if any(node.target in KINDS for node in walk.nodes[start + 1 : stop]):
        tail = prepared.layer.operation  # another layer comes before its activation: stretches must not overlap
    return Block(prepared.layer.fqn, prepared.layer.operation, tail, (prepared,))


def reconstruct(
    float_walk: Walk, walk: Walk, block: Block, learning: Learning, *, fisher: bool = False
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Learn the rounding of a block; both walks stand at its start and, where they overlap, go on from there.

    Formula: min over V of ||F^(1/2) (f(x) - f~(x~))||^2 / (the same for nearest) + lambda mean(1 - |2 h(V) - 1|^beta),
    with x and f of the float model, x~ what the rounded layers before give, f~ with soft weights and rounded
    activations, and F ones, or the diagonal Fisher information of the outputs.

    Args:
        float_walk: with fake-quantizers off.
        walk: with fake-quantizers on, and the layers before rounded.
        block: the stretch.
        learning: steps and rates.
        fisher: weigh each output by its squared gradient.

    Returns:
        The rounded weights (folded), and the errors of nearest and learned relative to the outputs; when nearest is
        the better one, it is what comes back.

    Source:
        Nagel et al. 2020, "Up or Down?", equation 25; Li et al. 2021, "BRECQ", equation 10 (Fisher).
    """
    walk.advance(block.first)
    float_walk.advance(float_walk.twin(block.last).next)
    outputs = _outputs(walk, block)
    targets = [[values[node] for node in map(float_walk.twin, outputs)] for values in float_walk.values]
    weights = [[torch.ones(())] * len(outputs)] * len(targets)
    if fisher:
        weights = [_fisher(float_walk, batch, block, outputs) for batch in range(len(targets))]
    soft = [
        SoftRounding(p.folded, p.quantizer.scale, p.quantizer.quant_min, p.quantizer.quant_max, p.dim)
        for p in block.layers
    ]
    nearest = [prepared.round(prepared.folded.float()) for prepared in block.layers]

    def loss(batch: int, folded: Sequence[torch.Tensor]) -> torch.Tensor:
        instead = {
            p.layer.rounding: (w / p.factor).to(p.weight.dtype)
            for p, w in zip(block.layers, folded, strict=True)
            if p.layer.rounding is not None
        }
        values = walk.run(batch, block.first, block.last, instead)
        terms = zip(outputs, targets[batch], weights[batch], strict=True)
        return torch.stack([((values[n] - target).float().square() * w).sum() for n, target, w in terms]).sum()

    def total(folded: Sequence[torch.Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss(batch, folded)) for batch in range(len(targets)))

    before = total(nearest)
    size = sum(
        float((t.float().square() * w).sum()) for b in range(len(targets)) for t, w in _pairs(targets, weights, b)
    )
    if before > 0:
        _learn(soft, loss, before / len(targets), len(targets), learning)
    learned = [one.hard() for one in soft]
    after = total(learned)
    numbers = {"error_nearest": before / max(size, 1e-30), "error": min(before, after) / max(size, 1e-30)}
    return (learned if after < before else nearest), numbers


def _learn(soft: Sequence[SoftRounding], loss: Any, unit: float, batches: int, learning: Learning) -> None:
    optimizer = torch.optim.Adam([one.v for one in soft], lr=learning.learning_rate)
    generator = torch.Generator().manual_seed(learning.seed)
    order: list[int] = []
    count = sum(one.v.numel() for one in soft)
    for step in range(learning.steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        with torch.enable_grad():
            error = loss(order.pop(), [one() for one in soft]) / unit
            beta = beta_at(step, learning.steps)
            if beta is not None:
                undecided = torch.stack([rounding_loss(one.h(), beta) for one in soft]).sum()
                error = error + learning.regularization * undecided / count
            optimizer.zero_grad()
            error.backward()
        optimizer.step()


def _outputs(walk: Walk, block: Block) -> list[fx.Node]:
    """Return the floating values that leave a block and that its layers have a part in."""
    stretch = walk.nodes[walk.position[block.first] : walk.position[block.last] + 1]
    inside, touched = set(stretch), {prepared.layer.operation for prepared in block.layers}
    for node in stretch:
        if any(parent in touched for parent in node.all_input_nodes):
            touched.add(node)
    return [n for n in stretch if n in touched and any(u not in inside for u in n.users) and _is_floating(n)]


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _pairs(targets: list[Any], weights: list[Any], batch: int) -> Any:
    return zip(targets[batch], weights[batch], strict=True)


def _fisher(walk: Walk, batch: int, block: Block, outputs: list[fx.Node]) -> list[torch.Tensor]:
    """Return (dL/dz)^2 of each output, with mean 1; L is the negative log-likelihood of the float model's answer."""
    twins = [walk.twin(node) for node in outputs]
    with torch.enable_grad():
        leaves = {node: walk.values[batch][node].detach().requires_grad_() for node in twins}
        logits = walk.finish(batch, leaves)
        if not isinstance(logits, torch.Tensor) or not logits.requires_grad or logits.ndim < 1:
            raise ConfigError(f"{block.name}: Fisher weights need a model whose first output is logits")
        likelihood = torch.log_softmax(logits.float(), -1).amax(-1).sum()
        gradients: Any = torch.autograd.grad(likelihood, list(leaves.values()), allow_unused=True)
    found: list[torch.Tensor] = []
    for node, gradient in zip(twins, gradients, strict=True):
        squared = torch.zeros_like(leaves[node]) if gradient is None else gradient.float().square()
        mean = squared.mean()
        found.append((squared / mean if float(mean) > 0 else torch.ones_like(squared)).detach())
    return found
