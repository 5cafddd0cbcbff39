"""From a model to a verified file, in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchopt_passes.deploy.artifact import Artifact, verified
from torchopt_passes.deploy.base import WAYS_OUT, Runner, Target, load_file, make_target
from torchopt_passes.deploy.calls import cause_of, resize_batch
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.deploy.files import short_of_space, staged
from torchopt_passes.deploy.metadata import Metadata, library_versions
from torchopt_passes.deploy.metric import Metric, measured
from torchopt_passes.deploy.program import Dynamic, Program, read_program
from torchopt_passes.deploy.quantized import quantized
from torchopt_passes.deploy.verify import Verification, compare_with_source
from torchopt_passes.errors import ConfigError, ExportError, TorchOptError, VerificationError
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.verify import Inputs

__all__ = ["export"]


def export(
    module: nn.Module,
    path: str | Path,
    target: str | Target | None = None,
    *,
    example_inputs: Any = None,
    dynamic: Dynamic = "auto",
    outputs: Sequence[str] | None = None,
    verify: bool = True,
    verify_inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    metric: Metric | None = None,
    metric_drop: float | None = None,
    plan: Plan | None = None,
    note: str = "",
    quantization: Literal["int8"] | None = None,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Artifact:
    """Write a model to a file of a runtime, verified against the model before the file is put in place.

    The file is made for inference: the model is exported in eval mode, ``loss`` is left out, and so are inputs that
    only the loss reads (``labels``). The module is left as it was.

    Args:
        module: an ``nn.Module``, a captured graph, or a graph converted to int8.
        path: of the file to write; replaced when it exists. Its folder must exist.
        target: ``"onnx"`` (``.onnx``), ``"tensorrt"`` (``.onnx`` too), ``"openvino"`` (``.xml``), ``"litert"``
            (``.tflite``), ``"executorch"`` (``.pte``), ``"inductor"`` (``.pt2``), or one with options, such as
            ``OnnxTarget(opset=21)``; told from the suffix when left out (see `targets`).
        example_inputs: a call of the module: a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            ``(args, kwargs)``. A captured graph remembers its own.
        dynamic: which sizes stay open: ``"auto"`` is the batch, and the length of integer sequences; ``"batch"`` is the
            batch alone; False fixes all; a dict gives the dims of each input by name, as ``torch.export`` takes them.
        outputs: names of the outputs to keep; all but ``loss`` by default.
        verify: run the file and compare with the module on the example inputs, at batch 1 and at an odd batch too.
        verify_inputs: more calls to compare on, such as real data.
        tolerance: the largest error allowed: for float the largest relative error (1e-4 for float32), for int8 the
            relative norm ``||a - b|| / ||b||`` (0.03, an SQNR of 30 dB; more where the model's own roundings move it
            further, see `rounding_noise`).
        metric: how good a model is by your own measure and data, higher is better: called with the file and with
            `module`, each a function of the example inputs' form that returns what the artefact returns. Both figures
            go into the report.
        metric_drop: by how much the file may be worse than `module` by `metric`; not checked when left out.
        plan: the plan that made the model; its hash goes into the file.
        note: the user's own words that go into the file, say on preprocessing.
        quantization: ``"int8"`` quantizes a float model for the target on the way: weights and activations, after
            training. To choose more, or train with rounding, run the passes and export what `ConvertQuantized` gives.
        calibration: batches of real data for the ranges of activations; a tensor, tuple or dict each. For
            ``quantization="int8"``, and ``weights="int16x8"`` of ``litert``.
        **options: of the target, by name.

    Returns:
        The artefact, loaded.

    Raises:
        ConfigError: wrong options, example inputs or suffix, or a metric that is no number.
        MissingExtraError: the target's runtime is not installed.
        ExportError: the model cannot be exported, written or opened; says what to do. No file is left.
        VerificationError: the file does not compute what the module computes; gives the figures and, but for
            ``inductor``, the first layer that differs. Or it is worse by `metric`. No file is left.

    Example:
        >>> artifact = export(model, "model.onnx", example_inputs=(x,))  # doctest: +SKIP
        >>> artifact(x)  # doctest: +SKIP
    """
    path = Path(path)
    chosen = make_target(path, target, options)
    chosen.require()
    if calibration is not None and quantization is None and not chosen.calibrates:
        raise ConfigError('calibration= is for quantization="int8"')
    if metric_drop is not None and (metric is None or not metric_drop >= 0):
        raise ConfigError(f"metric_drop is for metric=, and at least 0, not {metric_drop}")
    if quantization is not None and chosen.calibrates:
        raise ConfigError(f"{chosen} quantizes by itself: leave quantization= out")
    original = module
    if quantization is not None:
        module = quantized(module, chosen.name, quantization, example_inputs, calibration)
    measured_on = tuple(map(as_call, calibration or ())) if chosen.calibrates else ()
    kept = tuple(outputs) if outputs is not None else None
    with staged(path) as draft:

        def attempt(sizes: Dynamic) -> tuple[Metadata, Runner]:
            program = read_program(module, example_inputs, dynamic=sizes, outputs=kept, prepare=chosen.prepare)
            program = replace(program, calibration=measured_on)
            metadata = _metadata(chosen, program, plan, note)
            metadata = replace(metadata, facts=program.facts | _write(chosen, program, draft))
            runner = load_file(chosen, draft, metadata)
            if verify:
                calls = [*_calls(program), *(as_call(inputs) for inputs in verify_inputs)]
                metadata = verified(metadata, _verify(chosen, program, draft, runner, calls, tolerance))
            return metadata, runner

        try:
            metadata, runner = attempt(dynamic)
        except ExportError as error:
            if dynamic not in ("auto", "batch") or not chosen.may_fix_sizes:
                raise
            metadata, runner = attempt(False)
            metadata = replace(metadata, facts=metadata.facts | {"sizes": f"fixed to those of the example: {error}"})
        if metric is not None:
            figures = measured(metric, metric_drop, original, metadata, runner)
            metadata = replace(metadata, verification=metadata.verification | figures)
        chosen.stamp(draft, metadata)
        chosen.read_metadata(draft)
    return Artifact(path, metadata, runner)


def _write(target: Target, program: Program, path: Path) -> dict[str, str]:
    try:
        with torch.no_grad():
            return target.write(program, path)
    except (TorchOptError, OSError):
        raise
    except Exception as error:
        name = type(program.source).__name__
        size = sum(tensor.numel() * tensor.element_size() for tensor in program.exported.state_dict.values())
        # the runtimes behind the ONNX and OpenVINO targets write drafts of the same size
        advice = short_of_space(path.parent, 3 * size) or WAYS_OUT
        raise ExportError(f"target {target.name!r} cannot take {name}: {cause_of(error)}. {advice}") from error


def _calls(program: Program) -> list[Inputs]:
    """Return the example call, and it at batch 1 and 3 when the batch is open."""
    if not any("batch" in spec.shape for spec in program.inputs):
        return [program.example]
    return [program.example, resize_batch(program.example, 1), resize_batch(program.example, 3)]


def _verify(
    target: Target, program: Program, path: Path, runner: Runner, calls: Sequence[Inputs], tolerance: float | None
) -> Verification:
    try:
        found = [runner(program.select(call)) for call in calls]
    except (TorchOptError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"the {target.name} file does not run on the example inputs: {cause_of(error)}. {WAYS_OUT}"
        ) from error
    names = [spec.name for spec in program.outputs]
    precision = target.file_precision(program)
    result = compare_with_source(
        *(found, program.source, calls, names),
        precision=precision,
        int32_biases=target.int32_biases,
        tolerance=tolerance,
    )
    if result.passed:
        return result
    try:
        where = target.first_difference(program, path, program.select(calls[0]), result.tolerance)
    except ExportError as error:  # a file of every layer's value is another one
        where = f"its first layer that differs could not be found: {error}"
    way_out = ""
    if precision == "int8" and saturates(target.name):
        way_out = (
            ". This CPU has no VNNI: its int8 kernels saturate where weights have more than 7 bits"
            " (InsertFakeQuant(reduce_range=True) gives them 7)"
        )
    raise VerificationError(
        f"the {target.name} file is not what {type(program.source).__name__} computes: {result}"
        f"{f'; {where}' if where else ''}. No file was written{way_out}"
    )


def _metadata(target: Target, program: Program, plan: Plan | None, note: str) -> Metadata:
    return Metadata(
        target=target.name,
        precision=target.file_precision(program),
        device=program.device,
        inputs=program.inputs,
        outputs=program.outputs,
        dropped_inputs=program.dropped_inputs,
        dropped_outputs=program.dropped_outputs,
        layers=program.layers,
        versions=library_versions(*target.packages),
        plan=hashlib.sha256(plan.to_json().encode()).hexdigest() if plan is not None else "",
        note=note,
    )
