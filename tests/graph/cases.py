"""Every registered pass: how the battery makes it and what it starts from; ``name:what`` is another way to run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import fx

import torchopt_passes as top
from tests.models import OTHERS, ZOO, build
from torchopt_passes.graph.fusion import FuseBatchNorm
from torchopt_passes.graph.quantization import (
    AbsorbHighBias,
    Calibrate,
    ConvertQuantized,
    CorrectBias,
    EqualizeLayers,
    InsertFakeQuant,
    ReestimateBatchNorm,
    ScaleOutputs,
    ScaleWeights,
    SmoothActivations,
    SplitOutliers,
)
from torchopt_passes.graph.quantization.cluster_weights import ClusterWeights
from torchopt_passes.graph.quantization.learn_steps import LearnSteps


@dataclass(frozen=True, kw_only=True)
class PassCase:
    """How the battery runs one pass.

    Args:
        make: makes the pass.
        before: passes that must have run already.
        models: the zoo models on which it finds something to do.
        calibrated: whether it needs batches.
        idempotent: whether a second run finds nothing to do.
        keeps_objects: whether parameters that keep their name stay the same objects.
        bad: options that must be refused.
    """

    make: Callable[[], top.GraphPass]
    before: tuple[Callable[[], top.GraphPass], ...] = ()
    models: tuple[str, ...] = tuple(ZOO)
    calibrated: bool = False
    keeps_objects: bool = True
    bad: tuple[dict[str, object], ...] = field(default=({"no_such_option": 1},))

    def start(self, model: str) -> tuple[fx.GraphModule, top.PassContext]:
        """Return the captured model with the earlier passes applied, and the context."""
        graph_module = copy.deepcopy(_prepared(model, self.before))
        return graph_module, top.PassContext(calibration=_calibration(model))


@cache
def _prepared(model: str, before: tuple[Callable[[], top.GraphPass], ...]) -> fx.GraphModule:
    """Return a graph that many tests copy: capture and calibration take longer than what they test."""
    source, inputs = build(model)
    graph_module = top.capture(source, inputs)
    for make in before:
        make()(graph_module, top.PassContext(calibration=_calibration(model)))
    return graph_module


def _calibration(model: str) -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    return [(ZOO | OTHERS)[model][1](n) for n in (2, 3)]


def _prune() -> top.GraphPass:
    return top.PruneWeights(sparsity=0.5)


def _prepare() -> top.GraphPass:
    return InsertFakeQuant(target="onnx", qat=False)


def _prepare_4_bits() -> top.GraphPass:
    return InsertFakeQuant(target="onnx", qat=False, weight_bits=4, activation_bits=4)


def _calibrate() -> top.GraphPass:
    return Calibrate()


def _learn(method: Literal["dorefa", "pact", "wrpn"]) -> PassCase:
    # DoReFa's weights have the odd levels of 2^b - 1 on either side: 8 bits of them do not fit in int8
    return PassCase(
        make=lambda: LearnSteps(method=method), before=(_prepare_4_bits, _calibrate), models=("conv_residual",)
    )


CASES: dict[str, PassCase] = {
    "prune_weights": PassCase(
        make=_prune,
        bad=({"sparsity": 1.0}, {"sparsity": "0.5"}, {"sparsity": 0.5, "threshold": 0.1}, {"sparsty": 0.5}, {}),
    ),
    # a number of parameters, so that a second run finds nothing to do; smaller tensors are new objects, as in folding
    "prune_channels": PassCase(
        make=lambda: top.PruneChannels(params=400),
        models=("conv_residual", "attention"),
        keeps_objects=False,
        bad=(
            {},
            {"ratio": 0.5, "macs": 0.5},
            {"ratio": 1.0},
            {"macs": 0},
            {"params": 1.5},
            {"ratio": 0.5, "importance": "lp:0"},
            {"ratio": 0.5, "scope": "world"},
            {"ratio": 0.5, "round_to": 0},
            {"ratio": 0.5, "overrides": {"fc": 2.0}},
            {"ratio": 0.5, "kinds": ("rows",)},
            {"keep": {"a": (1,)}, "steps": 2},
        ),
    ),
    # folding makes new tensors: the captured graph shares the old ones with the source, which stays as it is
    "fuse_batch_norm": PassCase(make=FuseBatchNorm, models=("conv_residual",), keeps_objects=False),
    "insert_fake_quant": PassCase(
        make=lambda: InsertFakeQuant(target="onnx"),
        bad=({"target": "tpu"}, {"weight_bits": 9}, {"activation_bits": 1}, {"momentum": 0.0}, {"qat": 1}),
    ),
    "insert_fake_quant:litert": PassCase(make=lambda: InsertFakeQuant(target="litert"), models=("conv_residual",)),
    "calibrate": PassCase(
        make=_calibrate,
        before=(_prepare,),
        calibrated=True,
        bad=({"method": "guess"}, {"max_batches": 0}),
    ),
    "convert_quantized": PassCase(
        make=ConvertQuantized, before=(_prepare, _calibrate), keeps_objects=False, bad=({"fold_weights": 1},)
    ),
    # repair passes make new tensors too, so that the source stays as it is
    "reestimate_batch_norm": PassCase(
        make=ReestimateBatchNorm,
        models=("conv_residual",),
        calibrated=True,
        keeps_objects=False,
        bad=({"order": "backwards"}, {"max_batches": 0}),
    ),
    "equalize_layers": PassCase(
        make=EqualizeLayers,
        models=("conv_residual",),
        keeps_objects=False,
        bad=({"relu6": "gelu"}, {"max_sweeps": 0}),
    ),
    "absorb_high_bias": PassCase(
        make=AbsorbHighBias, models=("high_bias",), keeps_objects=False, bad=({"deviations": -1.0},)
    ),
    "correct_bias": PassCase(
        make=CorrectBias,
        before=(_prepare, _calibrate),
        calibrated=True,
        keeps_objects=False,
        bad=({"max_batches": 0},),
    ),
    "smooth_activations": PassCase(
        make=SmoothActivations,
        models=("conv_residual", "attention"),
        calibrated=True,
        keeps_objects=False,
        bad=({"alpha": 1.5}, {"max_batches": 0}),
    ),
    "scale_outputs": PassCase(
        make=lambda: ScaleOutputs(min_gain=0.1),
        models=("attention",),
        calibrated=True,
        keeps_objects=False,
        bad=({"min_gain": 0.0}, {"max_batches": 0}),
    ),
    # tries exponents on what it scaled: a weight that it scaled is left alone the second time
    "scale_weights": PassCase(
        make=ScaleWeights,
        models=("attention",),
        calibrated=True,
        keeps_objects=False,
        bad=({"bits": 9}, {"group_size": -1}, {"grid": 0}, {"min_gain": 1.0}, {"max_batches": 0}),
    ),
    # a weight that was split is left alone the second time: ratios do not add up
    "split_outliers": PassCase(
        make=lambda: SplitOutliers(ratio=0.1),
        models=("attention",),
        keeps_objects=False,
        bad=({"ratio": 0.0}, {"ratio": 1.1}),
    ),
    # a clustered weight is computed from a codebook, which is left alone the second time
    "cluster_weights": PassCase(
        make=lambda: ClusterWeights(bits=2, weighted="activation", min_numel=16),
        calibrated=True,
        bad=(
            {"bits": 9},
            {"bits": 1, "grid": "log"},
            {"overrides": {"fc": 0}},
            {"granularity": "row"},
            {"outliers": 0.6},
            {"group_size": 1},
            {"fit": "awq"},
        ),
    ),
    "cluster_weights:gptq": PassCase(
        make=lambda: ClusterWeights(bits=2, fit="gptq", granularity="channel", min_numel=16),
        before=(_prune,),
        models=("attention",),
        calibrated=True,
    ),
    # the graph shares its tensors with the source, which stays as it is: rounded weights are new ones
    "round_weights": PassCase(
        make=lambda: top.RoundWeights(),
        before=(_prepare, _calibrate),
        calibrated=True,
        keeps_objects=False,
        bad=({"damping": 0.0}, {"max_batches": 0}, {"act_order": 1}),
    ),
    "learn_steps": PassCase(
        make=lambda: LearnSteps(method="lsq+"),
        before=(_prepare, _calibrate),
        bad=({"method": "lsqq"}, {"weights": 1}, {"unit": "two"}),
    ),
    "learn_steps:dorefa": _learn("dorefa"),
    "learn_steps:pact": _learn("pact"),
    "learn_steps:wrpn": _learn("wrpn"),
    "optimize_rounding": PassCase(
        make=lambda: top.OptimizeRounding(steps=4),
        before=(_prepare, _calibrate),
        calibrated=True,
        keeps_objects=False,
        bad=({"steps": 0}, {"learning_rate": 0.0}, {"regularization": -1.0}, {"max_batches": 0}),
    ),
    "reconstruct_blocks": PassCase(
        make=lambda: top.ReconstructBlocks(steps=4, fisher=True),
        before=(_prepare, _calibrate),
        models=("conv_residual", "attention"),
        calibrated=True,
        keeps_objects=False,
        bad=({"steps": 0}, {"fisher": 1}, {"blocks": "layer1"}, {"max_batches": 0}),
    ),
    # a source holds torchao's tensors, a graph integers and operations: their states differ, tests/.../test_weight_only
    "quantize_weights": PassCase(
        make=lambda: top.QuantizeWeights(bits=4, group_size=16, fit="gptq", head=True, embeddings=True),
        before=(_prune,),
        models=("attention", "tied_twice"),
        calibrated=True,
        keeps_objects=False,
        bad=({"bits": 9}, {"bits": 1}, {"group_size": 4}, {"fit": "guess"}, {"damping": 0.0}, {"overrides": {"a": 1}}),
    ),
    "pipeline": PassCase(make=lambda: top.Pipeline(_prune()), bad=({"passes": [{"no_such_pass": {}}]},)),
}

torch.set_num_threads(1)
