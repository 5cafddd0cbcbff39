"""torch-pruning in the quality benchmark, used the way its own examples use it, with the help that it needs.

As in its ``reproduce/main.py`` one pruner of many small steps is stepped until the target is met, and the classifier is
ignored; as in its ``examples/transformers`` it is told the heads of each attention, and removes features of every head.
Gradients of Taylor importances come from the same batches as ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.quality_data import Budget, Split, train
from benchmarks.quality_models import Attention, Classifier, Layer, count_macs, example

STEPS, SLACK = 200, 0.02
REGULARIZATION = 5e-4  # of its reproduce/main.py


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Options of torch-pruning.

    Args:
        scope: rank inside each layer, over all layers, or over layers of the same structure (isomorphic).
        normalizer: of the scores of a group, before they are ranked together with those of others.
        inner: leave the residual stream alone ("bottleneck" in its examples).
        sparsity_learning: the first half of the fine-tuning budget goes to training with the pruner's regularizer.
    """

    importance: Literal["group_norm", "bn_scale", "taylor"]
    scope: Literal["local", "global", "isomorphic"] = "global"
    normalizer: str = "mean"
    inner: bool = False
    sparsity_learning: bool = False


def make_pruner(model: Classifier, options: Peer) -> Any:
    ignored: list[nn.Module] = [model.head]
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads |= dict.fromkeys((module.query, module.key, module.value), module.heads)
            ignored += [module.out] if options.inner else []
        if isinstance(module, Layer) and options.inner:
            ignored.append(module.down)
    importance: Any = {
        "group_norm": tp.importance.GroupMagnitudeImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }[options.importance](normalizer=options.normalizer)
    kind: Any = {"group_norm": tp.pruner.GroupNormPruner, "bn_scale": tp.pruner.BNScalePruner}.get(
        options.importance, tp.pruner.BasePruner
    )
    extra: dict[str, Any] = {} if kind is tp.pruner.BasePruner else {"reg": REGULARIZATION}
    return kind(
        model,
        example()["pixels"],
        importance=importance,
        global_pruning=options.scope != "local",
        isomorphic=options.scope == "isomorphic",
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=ignored,
        num_heads=heads,
        in_channel_groups={},  # its defaults are shared between pruners of one process
        out_channel_groups={},
        prune_num_heads=False,  # its default: features of every head go; whole heads in small steps fail in 1.6.1
        prune_head_dims=True,
        output_transform=lambda output: output["logits"],
        **extra,
    )


def accumulate_gradients(model: nn.Module, calibration: Sequence[Mapping[str, torch.Tensor]]) -> None:
    model.eval()
    model.zero_grad()
    for batch in calibration:
        model(**batch)["loss"].backward()


def walk(
    base: Classifier,
    options: Peer,
    targets: Sequence[int],
    calibration: Sequence[Mapping[str, torch.Tensor]],
    by_group: bool,
) -> Iterator[tuple[nn.Module, float]]:
    """Step a pruner through the targets; yield the first model that fits each, and the processor seconds so far."""
    seconds, started = 0.0, time.process_time()
    model = copy.deepcopy(base).eval()
    pruner = make_pruner(model, options)
    if options.importance == "taylor":
        accumulate_gradients(model, calibration)
    remaining = list(targets)
    for _ in range(STEPS):
        for group in pruner.step(interactive=True):
            group.prune()
            while by_group and remaining and count_macs(model) <= remaining[0]:
                seconds += time.process_time() - started
                yield copy.deepcopy(model), seconds
                started = time.process_time()
                remaining.pop(0)
        while remaining and count_macs(model) <= remaining[0]:
            seconds += time.process_time() - started
            yield copy.deepcopy(model), seconds
            started = time.process_time()
            remaining.pop(0)
        if not remaining:
            return
    raise RuntimeError(f"torch-pruning reached {count_macs(model)} MACs, not {remaining[0]}")


def prune(
    base: Classifier, options: Peer, targets: Sequence[int], calibration: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[nn.Module, float]]:
    """Yield for each target, in MACs and descending, a pruned model and the processor seconds that it took.

    Whole steps, as in its own script; where such a step goes more than `SLACK` past the target, group by group.
    """
    for target, (model, seconds) in zip(targets, list(walk(base, options, targets, calibration, False)), strict=True):
        if count_macs(model) < (1 - SLACK) * target:
            ((model, seconds),) = walk(base, options, [target], calibration, True)
        model.zero_grad()
        yield model, seconds


def learn_sparsity(
    base: Classifier, options: Peer, split: Split, budget: Budget, seed: int
) -> tuple[Classifier, Budget]:
    """Train with the pruner's regularizer for half of the budget; return the model and the budget that is left."""
    half = replace(budget, epochs=budget.epochs / 2)
    model = copy.deepcopy(base)
    train(model, split, half, seed, regularize=make_pruner(model, options).regularize)
    return model.eval(), half
