"""How faithful int8 models stay to float32 without training: ours next to seven tools.

    python -m benchmarks.quality_quant                                # every arm of every model, a process each
    python -m benchmarks.quality_quant --models minilm --arms ours    # one of them

EfficientNet-Lite0 with its packaged ImageNet weights on random crops of real photos, MiniLM-L6 on English sentences.
Weights and activations in 8 bits, calibrated on photos and sentences that are not evaluated. Our arms run the graph of
fake-quantizers, which `ConvertQuantized` and `top.export` prove equal to what is deployed. ResNet-20 on Fashion-MNIST
is measured by accuracy, see `quality_quant_resnet`. The record is benchmarks/records/quality_quant.json: fidelity or
accuracy, what stayed float, seconds, versions. What is in it already is made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import torchopt_passes as top
from benchmarks import quality_quant_resnet as resnet
from benchmarks.deploy_cells_models import import_torchvision
from benchmarks.quality_quant_data import Suite, efficientnet_lite0, minilm
from benchmarks.quality_quant_runtimes import modelopt, runtime

RECORD = Path(__file__).parent / "records" / "quality_quant.json"
PACKAGES = (
    "torch", "torchao", "onnxruntime", "brevitas", "openvino", "nncf", "ai-edge-litert", "ai-edge-quantizer",
    "executorch", "nvidia-modelopt", "transformers", "timm", "torchopt_passes",
)  # fmt: skip
SUITES: dict[str, Callable[[], Suite]] = {"efficientnet_lite0": efficientnet_lite0, "minilm": minilm}
Run = Callable[[Any], torch.Tensor]
"""A batch -> logits, or the last hidden states."""


def float32(suite: Suite, found: dict[str, Any]) -> Run:
    del found
    return lambda batch: call(suite.model, batch)


def bfloat16(suite: Suite, found: dict[str, Any]) -> Run:
    del found

    def run(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(suite.model, batch).float()

    return run


def ours(*repairs: str, target: str = "inductor", **calibrate: Any) -> Any:
    """Make an arm: what smooths, the usual passes, then what repairs.

    Calibration is by least squares on convolutions. A Transformers encoder is smoothed and keeps its full ranges,
    since its outliers carry information.
    """
    after: dict[str, Callable[[], top.GraphPass]] = {"gptq": top.RoundWeights, "bias": top.CorrectBias}

    def make(suite: Suite, found: dict[str, Any]) -> Run:
        args, kwargs = as_call(suite.calibration[0])
        graph = top.capture(copy.deepcopy(suite.model), args, kwargs, prove=False)
        context = top.PassContext(calibration=suite.calibration, prove=False)
        encoder = isinstance(suite.calibration[0], dict)
        if "smooth" in repairs and encoder:
            top.SmoothActivations(alpha=0.8, insert=True)(graph, context)
        options = calibrate or {"method": "minmax" if encoder else "mse"}
        inserted = top.InsertFakeQuant(target=target, qat=False)(graph, context)
        found["float"] = {skip.target: skip.reason for skip in inserted.plan.skips}
        found["rounded_weights"] = sum(edit.signed for edit in inserted.plan.edits)  # pyright: ignore
        found["passes"] = []
        for step in [top.Calibrate(**options), *(after[name]() for name in repairs if name in after)]:
            step(graph, context)
            found["passes"].append(step.recipe())
        graph.eval()
        return lambda batch: call(graph, batch)

    return make


def pt2e(suite: Suite, found: dict[str, Any]) -> Run:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    args, kwargs = as_call(suite.calibration[0])
    batch = torch.export.Dim("batch", min=2, max=512)
    shapes: Any = tuple({0: batch} for _ in args) or {name: {0: batch} for name in kwargs}
    exported = torch.export.export(suite.model, args, kwargs, dynamic_shapes=shapes, strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared: Any = prepare_pt2e(exported, quantizer)
    for one in suite.calibration:
        call(prepared, one)
    converted: Any = convert_pt2e(prepared)
    found["quantize_nodes"] = sum("quantize_per" in str(node.target) for node in converted.graph.nodes)
    return lambda batch: call(converted, batch)


def onnxruntime(activations: str) -> Any:
    """Make an arm of ONNX Runtime's own static quantization, QInt8 or QUInt8 activations."""

    def make(suite: Suite, found: dict[str, Any]) -> Run:
        import onnxruntime as ort
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        del found
        folder = Path(tempfile.mkdtemp())
        args, kwargs = as_call(suite.calibration[0])
        names = [f"input_{i}" for i in range(len(args))] or list(kwargs)
        batch = torch.export.Dim("batch", min=1, max=512)
        shapes: Any = tuple({0: batch} for _ in args) or {name: {0: batch} for name in kwargs}
        torch.onnx.export(
            suite.model, args, str(folder / "f.onnx"), kwargs=kwargs, dynamo=True, input_names=names,
            dynamic_shapes=shapes, external_data=False,
        )  # fmt: skip
        quant_pre_process(str(folder / "f.onnx"), str(folder / "p.onnx"), skip_symbolic_shape=True)

        def feed(batch: Any) -> dict[str, Any]:
            given, named = as_call(batch)
            return {name: value.numpy() for name, value in zip(names, given or named.values(), strict=True)}

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(suite.calibration)

            def get_next(self) -> Any:
                batch = next(self.left, None)
                return None if batch is None else feed(batch)

        quantize_static(
            str(folder / "p.onnx"), str(folder / "q.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=getattr(QuantType, activations), weight_type=QuantType.QInt8,
        )  # fmt: skip
        session = ort.InferenceSession(str(folder / "q.onnx"), providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(session.run(None, feed(batch))[0])

    return make


ARMS: dict[str, Callable[[Suite, dict[str, Any]], Run]] = {
    "bfloat16": bfloat16,
    "pt2e": pt2e,
    "onnxruntime QInt8": onnxruntime("QInt8"),
    "onnxruntime QUInt8": onnxruntime("QUInt8"),
    "openvino, nncf": runtime("openvino"),
    "litert": runtime("litert"),
    "executorch": runtime("executorch"),
    "modelopt": modelopt,
    "ours, calibrated": ours(method="histogram"),
    "ours, biases corrected": ours("smooth", "bias"),
    "ours": ours("smooth", "gptq", "bias"),
    "ours, onnx": ours("smooth", "gptq", "bias", target="onnx"),
}


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (batch, {}) if isinstance(batch, tuple) else ((), batch)


def call(model: Any, batch: Any) -> torch.Tensor:
    args, kwargs = as_call(batch)
    output = model(*args, **kwargs)
    return output if isinstance(output, torch.Tensor) else output[0]


def outputs(suite: Suite, run: Run) -> torch.Tensor:
    """Return logits, or normalised sentence embeddings: the mean of the hidden states under the mask."""
    made: list[torch.Tensor] = []
    for batch in suite.evaluation:
        with torch.no_grad():
            value = run(batch)
        if isinstance(batch, dict):
            mask = batch["attention_mask"][..., None]
            value = nn.functional.normalize((value * mask).sum(1) / mask.sum(1), dim=1)
        made.append(value)
    return torch.cat(made)


def fidelity(actual: torch.Tensor, wanted: torch.Tensor, *, neighbours: bool) -> dict[str, float]:
    cosine = nn.functional.cosine_similarity(actual, wanted).mean()
    names = [nearest(actual), nearest(wanted)] if neighbours else [actual.argmax(1), wanted.argmax(1)]
    return {"cosine": float(cosine), "agreement": float((names[0] == names[1]).float().mean())}


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the most similar other sentence of each."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def row(model: str, arm: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if model in resnet.MODELS:
        return resnet.row(model, arm)
    with suppress(ImportError):
        import_torchvision()  # Transformers and timm do
    suite, found = SUITES[model](), {}
    wanted = outputs(suite, float32(suite, {}))
    started = time.process_time()
    run = ARMS[arm](suite, found)
    seconds = time.process_time() - started
    measured = fidelity(outputs(suite, run), wanted, neighbours=isinstance(suite.evaluation[0], dict))
    return {"model": model, "arm": arm} | measured | {"cpu_seconds": round(seconds, 1)} | found


def versions(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {model: list(ARMS) for model in SUITES} | {model: list(resnet.ARMS) for model in resnet.MODELS}
    names = [*ARMS, *resnet.ARMS]
    parser.add_argument("--models", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(row(*arguments.row)))
        return
    record = read()
    environment = {
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        **versions(PACKAGES),
    }
    for arm in arguments.arms:
        for model in (one for one in arguments.models if arm in every[one]):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality_quant", "--row", model, arm]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            made = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            made = made or {"model": model, "arm": arm, "failed": (done.stderr.strip() or "killed").splitlines()[-1]}
            kept = [one for one in record["rows"] if (one["model"], one["arm"]) != (model, arm)]
            kept.append(made | {"environment": environment})
            record["rows"] = sorted(kept, key=lambda one: (one["model"], names.index(one["arm"])))
            partial = RECORD.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(RECORD)
            print({k: v for k, v in made.items() if k not in ("float", "passes")}, flush=True)


if __name__ == "__main__":
    main()
