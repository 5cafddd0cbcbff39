"""torchao's PT2E and Brevitas on ResNet-20, each as its own examples use it, for the quantization benchmark.

``pip install brevitas==0.13.4`` beside torchao. Brevitas after training: batch norms merged, calibrated, GPTQ, biases
corrected, as its ImageNet example does. Brevitas in training: learned steps that start from least squares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.quality_models import Classifier, example

Batch = dict[str, torch.Tensor]
Train = Callable[[nn.Module, Callable[[nn.Module], Any] | None], Any]
"""Trains a model in place; calls the second argument after each backward."""


class Labelled(nn.Module):
    """A model of pixels alone, with the outputs of the others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.inner(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Logits(nn.Module):
    """The convolution net of pixels alone, for Brevitas' tracer."""

    def __init__(self, base: Classifier) -> None:
        super().__init__()
        self.base = base

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.base.head(self.base.features(pixels))


def exported(base: Classifier) -> Any:
    batch = torch.export.Dim("batch", min=2, max=512)
    shapes = {"pixels": {0: batch}, "labels": {0: batch}}
    # strict: the quantizers match source partitions, which fail on residual nets otherwise
    return torch.export.export(base, (), example(4), dynamic_shapes=shapes, strict=True).module()


def quantizer(kind: str, *, bits: int = 8, qat: bool = False) -> Any:
    """Return a quantizer of torchao's for x86, or that of XNNPACK with any number of bits."""
    if kind == "x86":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=qat))
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    half = 2 ** (bits - 1)
    config = xnnpack.get_symmetric_quantization_config(
        is_per_channel=True, is_qat=qat, act_qmin=-half, act_qmax=half - 1, weight_qmin=1 - half, weight_qmax=half - 1
    )
    return xnnpack.XNNPACKQuantizer().set_global(config)


def pt2e_8_bits(kind: str, base: Classifier, batches: Iterable[Batch]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared: Any = prepare_pt2e(exported(copy.deepcopy(base).eval()), quantizer(kind))
    with torch.no_grad():
        for batch in batches:
            prepared(**batch)
    return _switchable(convert_pt2e(prepared))


def pt2e_qat(base: Classifier, batches: Sequence[Batch], train: Train, *, steps: int, bits: int) -> nn.Module:
    """Train with XNNPACK's fake-quantizers; ranges stand still over the last 40 % of the steps."""
    from torchao.quantization.pt2e import disable_observer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    del batches  # ranges are observed in training
    model = copy.deepcopy(base).train()
    prepared: Any = _switchable(prepare_qat_pt2e(exported(model), quantizer("xnnpack", bits=bits, qat=True)))
    done = 0

    def count(module: nn.Module) -> None:
        nonlocal done
        done += 1
        if done == round(0.6 * steps):
            module.apply(disable_observer)

    train(prepared, count)
    prepared.eval()
    return _switchable(convert_pt2e(prepared))


def _switchable(graph: Any) -> Any:
    from torchao.quantization.pt2e import allow_exported_model_train_eval

    return allow_exported_model_train_eval(graph)


def brevitas_8_bits(base: Classifier, batches: Sequence[Batch]) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize  # pyright: ignore[reportMissingImports]
    from brevitas_examples.imagenet_classification.ptq import ptq_common  # pyright: ignore[reportMissingImports]

    model: Any = preprocess_for_quantize(Logits(copy.deepcopy(base)).eval())
    model = ptq_common.quantize_model(
        model,
        backend="fx",
        weight_bit_width=8,
        act_bit_width=8,
        bias_bit_width=32,
        weight_quant_granularity="per_channel",
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="float_scale",
        quant_format="int",
    )
    loader = [(batch["pixels"], batch["labels"]) for batch in batches]
    with torch.no_grad():
        model(loader[0][0])  # fits the scales of the weights
    ptq_common.calibrate(loader, model)
    ptq_common.apply_gptq(loader, model, act_order=True)
    ptq_common.apply_bias_correction(loader, model)
    return Labelled(model.eval())


def brevitas_qat(
    base: Classifier, batches: Sequence[Batch], train: Train, *, steps: int, bits: int, activations: bool
) -> nn.Module:
    """Train Brevitas' layers in the place of the model's, with learned steps for weights (and inputs)."""
    import brevitas.nn as qnn  # pyright: ignore[reportMissingImports]
    from brevitas.graph.calibrate import calibration_mode  # pyright: ignore[reportMissingImports]
    from brevitas.graph.quantize import layerwise_quantize  # pyright: ignore[reportMissingImports]
    from brevitas.quant import scaled_int  # pyright: ignore[reportMissingImports]

    del steps
    weights = {"weight_quant": scaled_int.Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}

    def inputs(signed: bool) -> dict[str, Any]:
        if not activations:
            return {}
        kind = scaled_int.Int8ActPerTensorFloatMSE if signed else scaled_int.Uint8ActPerTensorFloatMSE
        return {"input_quant": kind, "input_bit_width": bits}

    model: Any = Logits(copy.deepcopy(base))
    first = {nn.Conv2d: (qnn.QuantConv2d, weights | inputs(True))}
    model.base.conv = layerwise_quantize(nn.Sequential(model.base.conv), first)[0]
    layers = {
        nn.Conv2d: (qnn.QuantConv2d, weights | inputs(False)),
        nn.Linear: (qnn.QuantLinear, weights | inputs(False)),
    }
    model = layerwise_quantize(model, layers, name_blacklist=["base.conv"])
    model.train()
    if activations:
        with torch.no_grad(), calibration_mode(model):
            for batch in batches:
                model(batch["pixels"])
    labelled = Labelled(model)
    train(labelled, None)
    return labelled.eval()
