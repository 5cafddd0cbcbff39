"""One entry per public callback: what the battery in test_every_callback.py runs it on."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.callbacks.distill_models import bert, res_net
from tests.callbacks.loops import (
    Example,
    bare_net,
    captured_net,
    clustered_net,
    collate,
    conv_net,
    images,
    narrow_net,
    quantized_net,
    ragged_tokens,
    still_net,
    tiny_bert,
)
from torchopt_passes import callbacks
from torchopt_passes.callbacks import (
    DIST,
    FSP,
    RKD,
    SET,
    AddEarlyExits,
    AttentionRelations,
    AttentionTransfer,
    AveragedWeights,
    BatchNormSlimming,
    Callback,
    CompressionAwareLR,
    Cosine,
    Distillation,
    DropFilter,
    GradualBits,
    GradualChannelPruning,
    GradualPruning,
    GroupLasso,
    GroupVariance,
    GrowingRegularization,
    Hint,
    InformationBottleneck,
    InitialWeights,
    KeepZeros,
    L0ChannelPruning,
    L0Pruning,
    L1Penalty,
    L2Penalty,
    LotteryTicket,
    Orthogonality,
    QuantizationNoise,
    QuantizationSchedule,
    RigL,
    Scheduled,
    SensitivityPruning,
    SimKD,
    SoftMovementPruning,
    SoftTargets,
    Splicing,
    Teacher,
    TeacherCache,
    ValueRelations,
    attach,
    cache_teacher,
)
from torchopt_passes.functional.masks import magnitude_mask
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers

SMALLER = "units have left: the smaller model is loaded with load_pruned"
FAKE_QUANT = "fake-quantizers stay: what leaves our library is the converted graph"


def pruned_bert(dropout: float = 0.0) -> nn.Module:
    """A student that comes with zeros: half of each matrix."""
    model = tiny_bert(dropout)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(magnitude_mask(parameter, 0.5))
    return model


def widen(model: nn.Module) -> None:
    """Give every grid 8 bits."""
    for _, quantizer in fake_quantizers(model):
        quantizer.set_bits(8)


def first_pattern(make: Callable[[], Callback]) -> Callable[[nn.Module], None]:
    """What sparse training does to a model when it begins."""

    def zero(model: nn.Module) -> None:
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [make()], total_steps=6):
            pass

    return zero


def rigl() -> RigL:
    return RigL(sparsity=0.5, every=2, end=5, drop=0.5)


def random_growth() -> SET:
    return SET(sparsity=0.5, every=1, end=6, drop=0.5, scope="uniform")


@dataclass(frozen=True)
class Case:
    """Args:
    make: a fresh callback, as a resumed process would make it.
    model: a fresh student with the same weights each time; `dropout` asks for randomness in its forward.
    data: the examples; not all of their labels count.
    extra_state: endings of the state_dict keys that the callback may add while it is installed.
    settled: the callback for which micro-batches do not see each other; None for `make`.
    begun: brings a model to what it computes once the callback has begun; None for what it is.
    plain: a model of PyTorch or Transformers that the trained student's state_dict fits, for students that are none.
    stays_ours: why the trained student fits no such model; empty if it does.
    """

    make: Callable[[], Callback]
    model: Callable[[float], nn.Module] = field(default=tiny_bert)
    data: Callable[[int], Sequence[Example]] = field(default=ragged_tokens)
    extra_state: tuple[str, ...] = ()
    settled: Callable[[], Callback] | None = None
    begun: Callable[[nn.Module], object] | None = None
    plain: Callable[[], nn.Module] = conv_net
    stays_ours: str = ""

    def bare(self, dropout: float) -> nn.Module:
        """The model as the callback lets it begin, without the callback."""
        model = self.model(dropout)
        if self.begun is not None:
            self.begun(model)
        return model


CASES: dict[str, Case] = {
    "GradualPruning": Case(
        make=lambda: GradualPruning(sparsity=0.6, start=1, end=5, every=1, skip=("classifier",)),
        extra_state=("weight_mask",),
    ),
    "GradualPruning-captured": Case(
        make=lambda: GradualPruning(sparsity=0.6, start=0.2, end=0.8, scope="global"),
        model=quantized_net,
        data=images,
        extra_state=("weight_mask",),
        stays_ours=FAKE_QUANT,
    ),
    "GradualPruning-movement": Case(
        make=lambda: GradualPruning(sparsity=0.6, criterion="movement", scope="erk", start=1, end=5, every=1),
        model=bare_net,
        plain=bare_net,
        data=images,
        extra_state=("weight_mask", "weight_dense", "weight_scores"),
    ),
    "GradualPruning-taylor": Case(
        make=lambda: GradualPruning(criterion="taylor", pattern="2:4", start=1, end=5, every=1),
        extra_state=("weight_mask", "weight_scores"),
    ),
    "GradualPruning-snip": Case(
        make=lambda: GradualPruning(sparsity=0.6, criterion="snip", start=1, end=5, every=1),
        model=bare_net,
        plain=bare_net,
        data=images,
        extra_state=("weight_mask", "weight_scores"),
    ),
    "SoftMovementPruning": Case(
        make=lambda: SoftMovementPruning(threshold=0.45, penalty=50.0, score_lr=0.1, start=1, end=5, every=1),
        model=bare_net,
        plain=bare_net,
        data=images,
        extra_state=("weight_mask", "weight_dense", "weight_scores", "weight_scores_mean", "weight_scores_square"),
    ),
    "SensitivityPruning": Case(
        make=lambda: SensitivityPruning(sensitivity=0.6, initial=0.5, start=1, end=5, every=1),
        model=bare_net,
        plain=bare_net,
        data=images,
        extra_state=("weight_mask", "weight_limit"),
    ),
    "Splicing": Case(
        make=lambda: Splicing(start=1, end=5, every=1),
        model=captured_net,
        data=images,
        extra_state=("weight_mask", "weight_dense", "weight_limit"),
    ),
    "RigL": Case(
        make=rigl, model=bare_net, plain=bare_net, data=images, extra_state=("weight_mask",), begun=first_pattern(rigl)
    ),
    "SET": Case(
        make=random_growth,
        model=captured_net,
        data=images,
        extra_state=("weight_mask",),
        begun=first_pattern(random_growth),
    ),
    "LotteryTicket": Case(
        make=lambda: LotteryTicket(sparsity=0.6, rounds=2, rewind=1),
        model=captured_net,
        data=images,
        extra_state=("weight_mask", "_rewind"),
    ),
    "CompressionAwareLR": Case(
        make=lambda: CompressionAwareLR(warmup=1, plateau=1, decay=2),
        model=bare_net,
        plain=bare_net,
        data=images,
        extra_state=("compression_aware_lr",),
    ),
    "GradualChannelPruning": Case(
        make=lambda: GradualChannelPruning(
            ratio=0.5, start=1, end=5, every=1, importance="taylor", example_inputs=collate(images(2))
        ),
        model=bare_net,
        data=images,
        stays_ours=SMALLER,
        extra_state=("weight_0_mask",),
    ),
    "GradualChannelPruning-captured": Case(
        make=lambda: GradualChannelPruning(ratio=0.5, start=0.2, end=0.8, scope="global"),
        model=captured_net,
        data=images,
        extra_state=("weight_0_mask",),
        stays_ours=SMALLER,
    ),
    "KeepZeros": Case(make=lambda: KeepZeros(skip=("classifier",)), model=pruned_bert, extra_state=("weight_mask",)),
    "Distillation": Case(make=lambda: Distillation(tiny_bert(seed=7).train(), alpha=0.3, temperature=3.0)),
    "Distillation-captured": Case(
        make=lambda: Distillation(conv_net(0.5, seed=7), form="ce", scale_t2=False), model=captured_net, data=images
    ),
    "GradualBits": Case(
        make=lambda: GradualBits(start=1, end=5), model=narrow_net, data=images, begun=widen, stays_ours=FAKE_QUANT
    ),
    "QuantizationNoise": Case(
        make=lambda: QuantizationNoise(share=0.6, seed=3), model=quantized_net, data=images, stays_ours=FAKE_QUANT
    ),
    "QuantizationSchedule": Case(
        make=lambda: QuantizationSchedule(observer_off=0.4, freeze_bn=0.6),
        model=quantized_net,
        data=images,
        # until then ranges and batch statistics are those of a micro-batch, by their nature
        settled=lambda: QuantizationSchedule(observer_off=0, freeze_bn=0),
        stays_ours=FAKE_QUANT,
    ),
}

CASES |= {
    "BatchNormSlimming": Case(
        make=lambda: BatchNormSlimming(strength=1.0, example_inputs=collate(images(2))),
        model=still_net,
        plain=still_net,
        data=images,
    ),
    "BatchNormSlimming-captured": Case(
        make=lambda: BatchNormSlimming(strength=1.0, form="gradient"), model=captured_net, data=images
    ),
    "AddEarlyExits": Case(
        make=lambda: AddEarlyExits(at=("conv",), weights=(0.4,), example_inputs=collate(images(2))),
        model=bare_net,
        data=images,
        plain=bare_net,
        extra_state=("linear.weight", "linear.bias"),
    ),
    "DropFilter": Case(
        make=lambda: DropFilter(rate=0.4, seed=2, skip=("fc",)),
        model=bare_net,
        data=images,
        plain=bare_net,
    ),
    "GrowingRegularization": Case(
        make=lambda: GrowingRegularization(
            ratio=0.5, start=1, end=5, every=1, ceiling=5.0, example_inputs=collate(images(2))
        ),
        model=bare_net,
        data=images,
        extra_state=("weight_0_mask",),
        stays_ours=SMALLER,
    ),
}
GATES = ("weight", "weight:0", "multipliers")
UNITS = {"example_inputs": collate(images(2))}
CASES |= {
    "L1Penalty": Case(make=lambda: L1Penalty(strength=0.3, skip=("classifier",))),
    "L1Penalty-gradient": Case(make=lambda: L1Penalty(strength=0.3, form="gradient"), model=captured_net, data=images),
    "L2Penalty": Case(make=lambda: L2Penalty(strength=2.0), model=bare_net, data=images, plain=bare_net),
    "L2Penalty-gradient": Case(make=lambda: L2Penalty(strength=2.0, form="gradient")),
    "GroupLasso": Case(make=lambda: GroupLasso(strength=1.0, **UNITS), model=bare_net, data=images, stays_ours=SMALLER),
    "GroupLasso-gradient": Case(
        make=lambda: GroupLasso(strength=1.0, form="gradient"), model=captured_net, data=images
    ),
    "GroupVariance": Case(
        make=lambda: GroupVariance(strength=0.1, **UNITS), model=bare_net, data=images, plain=bare_net
    ),
    "Orthogonality": Case(make=lambda: Orthogonality(strength=0.1)),
    "Orthogonality-srip": Case(
        make=lambda: Orthogonality(strength=1.0, measure="srip"), model=bare_net, data=images, plain=bare_net
    ),
    "L0Pruning": Case(make=lambda: L0Pruning(sparsity=0.6, lr=0.3, skip=("classifier",)), extra_state=GATES),
    "L0Pruning-captured": Case(
        make=lambda: L0Pruning(strength=0.01, lr=0.5, seed=2),
        model=captured_net,
        data=images,
        extra_state=GATES,
    ),
    "L0ChannelPruning": Case(
        make=lambda: L0ChannelPruning(sparsity=0.5, of="units", lr=0.3, **UNITS),
        model=bare_net,
        data=images,
        extra_state=GATES,
        stays_ours=SMALLER,
    ),
    "L0ChannelPruning-captured": Case(
        make=lambda: L0ChannelPruning(sparsity=0.4, of="macs", lr=0.3),
        model=captured_net,
        data=images,
        extra_state=GATES,
        stays_ours=SMALLER,
    ),
    "InformationBottleneck": Case(
        make=lambda: InformationBottleneck(strength=0.1, threshold=-6.0, lr=0.4, **UNITS),
        # samples have noise of their own, on each rank another
        settled=lambda: InformationBottleneck(strength=0.1, threshold=-6.0, lr=0.4, noise="step", **UNITS),
        model=bare_net,
        data=images,
        extra_state=GATES,
        stays_ours=SMALLER,
    ),
    "InformationBottleneck-captured": Case(
        make=lambda: InformationBottleneck(strength=0.1, threshold=-6.0, lr=0.4, noise="step"),
        model=captured_net,
        data=images,
        extra_state=GATES,
        stays_ours=SMALLER,
    ),
}


LAYER = "bert.encoder.layer.0"


def tiny_student(dropout: float = 0.0) -> nn.Module:
    """The BERT again, for callbacks that bring parameters under names in their order."""
    return tiny_bert(dropout)


@functools.cache
def cached_teacher() -> TeacherCache:
    """Two of the three classes of a teacher on the tokens of every test."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    data = ragged_tokens(24)
    return cache_teacher(
        tiny_bert(seed=7),
        [collate(data[start : start + 8]) for start in (0, 8, 16)],
        folder,
        top_k=2,
        shard_positions=64,
    )


CASES |= {
    "Distillation-features": Case(
        make=lambda: Distillation(
            bert(24, layers=2, seed=7),
            losses=[  # weights with which a few steps at the rates of the tests do not diverge
                {"dkd": {"weight": 0.1}},
                {"jsd": {"beta": 0.3}},
                {"dist": {"gamma": 0.0, "weight": 0.1}},
                Hint(layers={LAYER: "bert.encoder.layer.1"}, normalized=True),
                Cosine(layers=("bert.embeddings",), pool="mean"),
                ValueRelations(heads=2, layers=(f"{LAYER}.attention.self",)),
                AttentionRelations(heads=2, layers=(f"{LAYER}.attention.self",)),
            ],
        ),
        model=tiny_student,
        extra_state=("projectors.0.weight", "projectors.0.bias", "projectors.1.weight", "projectors.1.bias"),
    ),
    "Distillation-batches": Case(
        make=lambda: Distillation(
            conv_net(seed=7), losses=["dist", RKD(layers=("conv",)), FSP(layers=("conv", "bn"))], **UNITS
        ),
        # relations between the examples of a batch, by their nature
        settled=lambda: Distillation(conv_net(seed=7), losses=[DIST(gamma=0.0), FSP(layers=("conv", "bn"))], **UNITS),
        model=bare_net,
        data=images,
        plain=bare_net,
    ),
    "Distillation-captured-features": Case(
        make=lambda: Distillation(
            [res_net(5, depth=1, seed=7), Teacher(conv_net(seed=8), weight=2.0)],
            alpha=Scheduled(initial=1.0, final=0.2, end=0.8),
            temperature=Scheduled(initial=4.0, final=1.0, end=5, shape="cosine"),
            losses=[
                SoftTargets(),
                AttentionTransfer(layers={"conv": "stem"}, teacher=0),
                Hint(layers={"conv": "stem"}, teacher=0, weight=Scheduled(initial=1.0, final=0.0, start=2)),
                SimKD(layers=("fc",), teacher=0),
            ],
        ),
        model=captured_net,
        data=images,
        extra_state=("projectors.0.weight", "projectors.0.bias", "projectors.1.weight", "projectors.1.bias"),
        begun=first_pattern(lambda: Distillation(res_net(5, depth=1, seed=7), losses=[SimKD(layers=("fc",))])),
    ),
    "Distillation-self": Case(
        make=lambda: Distillation([AveragedWeights(decay=0.5), InitialWeights()]),
        model=bare_net,
        data=images,
        extra_state=("weight", "bias", "initial", "behind"),
        plain=bare_net,
    ),
    "Distillation-cache": Case(make=lambda: Distillation(cached_teacher(), temperature=4.0), model=tiny_student),
}

ONE_OF_A_CLASS = {name: case for name, case in CASES.items() if "-" not in name}
"""Without variants, for which the same code runs: where a case starts processes of its own."""

WITH_PROJECTORS = ONE_OF_A_CLASS | {"Distillation-features": CASES["Distillation-features"]}
"""And what a distillation brings, which others do not."""


def exported() -> set[str]:
    """Names of the callback classes that users import."""
    values = {name: getattr(callbacks, name) for name in callbacks.__all__}
    return {
        name
        for name, value in values.items()
        if isinstance(value, type) and issubclass(value, Callback) and value is not Callback
    }


CLUSTERED = {
    name: Case(
        make=lambda: QuantizationSchedule(observer_off=0.4, freeze_bn=0.6),
        model=functools.partial(clustered_net, sparsity=sparsity),
        data=images,
    )
    for name, sparsity in (("CQAT", 0.0), ("pruned CQAT", 0.5))
}
"""Training for int8 that keeps clusters, and zeros too: killed and resumed, but no case of the battery."""
