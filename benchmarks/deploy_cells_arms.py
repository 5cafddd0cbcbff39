"""What fills one cell: a model, written for one runtime at one precision, by us or by the runtime's own tools."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torchopt_passes as top
from benchmarks.deploy_cells_models import MODELS, Cell
from benchmarks.deploy_cells_peers import MOST, PEERS, Call, compile_frozen
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.graph.quantization.targets import get_target

__all__ = ["ARMS", "Arm", "arms_of"]

SUFFIX = {"inductor": "pt2", "onnx": "onnx", "openvino": "xml", "executorch": "pte", "litert": "tflite"}
SUFFIX |= {"tensorrt": "onnx"}
_PRETRAINED = ("efficientnet_lite0", "minilm")


@dataclass(frozen=True)
class Arm:
    """One column of the tables.

    Args:
        target: a deployment target, or ``"compile"`` or ``"eager"``: the model itself.
        precision: ``"float32"``, ``"int8"``, or ``"int8 bfloat16"``: what is not in int8 is computed in bfloat16.
        maker: ``"ours"``: one call of `top.export`; ``"tuned"``: the passes that repair an int8 model first;
            ``"guarded"``: the same with the layers in float that `keep_accuracy` gives back; ``"pruned"``: half of all
            channels removed first; ``"peer"``: the runtime's own tools.
    """

    target: str
    precision: str
    maker: str

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision.replace(' ', '-')}-{self.maker}"

    @property
    def is_file(self) -> bool:
        return self.target in SUFFIX

    @property
    def timed(self) -> bool:
        return self.target != "tensorrt"  # without a GPU its file is only checked

    def path(self, folder: Path, batch: int) -> Path:
        return folder / f"{self.name}-{batch}.{SUFFIX[self.target]}"

    def write(self, cell: Cell, path: Path, batch: int) -> bool:
        """Write the file for a batch size; tells whether its batch is open."""
        if self.maker == "peer":
            return PEERS[self.target][1](cell, path, self.precision, batch)
        # as the peers' files: texts of one length; Inductor, which orders weights for a size, with a batch of one size
        options: dict[str, Any] = {"dynamic": self.target != "inductor" and "batch"}
        if self.target == "executorch":
            options["max_batch"] = MOST
        if self.precision == "int8 bfloat16":
            options["precision"] = "bfloat16"
        if self.precision != "float32" and not cell.pretrained:
            options["tolerance"] = 0.5  # seeded weights carry a rounding that falls the other way through all layers
        model: Any = cell.model
        calibration = cell.batches(cell.calibration, 16)
        if self.maker == "pruned":
            graph = top.capture(copy.deepcopy(cell.model), cell.example(2))
            model = top.PruneChannels(ratio=0.5)(graph).graph_module
        if self.maker in ("tuned", "guarded"):
            model = tuned(cell, self.target, guarded=self.maker == "guarded")
        elif self.precision != "float32":
            options |= {"quantization": "int8", "calibration": calibration}
        artifact = top.export(model, path, target=self.target, example_inputs=cell.example(batch), **options)
        return artifact.metadata.inputs[0].shape[0] == "batch"

    def read(self, cell_of: Any, path: Path) -> Call:
        """Open the file, or take the model itself, as a function of input tensors."""
        if self.target == "eager":
            return torch.inference_mode()(cell_of().model)
        if self.target == "compile":
            return compile_frozen(cell_of().model)
        if self.maker == "peer":
            return PEERS[self.target][2](path, self.precision)
        artifact = top.open_artifact(path)
        return lambda *inputs: artifact.run(list(inputs))[0]


def tuned(cell: Cell, target: str, *, guarded: bool) -> Any:
    """Return an int8 graph as `quality_quant` makes it: smoothed (text), calibrated, weights rounded by GPTQ.

    Guarded, the layers that cost most stay float, until the cosine with float is 0.995 on calibration pictures before
    weights are rounded by GPTQ and biases are corrected.
    """
    graph = top.capture(copy.deepcopy(cell.model), cell.example(2), prove=False)
    calibration = cell.batches(cell.calibration, 16)
    context = top.PassContext(calibration=calibration, prove=False)
    if cell.text:
        top.SmoothActivations(alpha=0.8, insert=True)(graph, context)
        if "linear" in get_target(target).rounded_outputs:
            top.ScaleOutputs()(graph, context)
    insert = top.InsertFakeQuant(target=target, qat=False, reduce_range=saturates(target))
    calibrate = top.Calibrate(method="minmax" if cell.text else "mse", headroom=2.0)
    if guarded:
        insert = _guarded(graph, calibration[:2], insert)
    insert(graph, context)
    calibrate(graph, context)
    top.RoundWeights()(graph, context)
    top.CorrectBias()(graph, context)
    top.ConvertQuantized()(graph.eval(), context)
    if cell.text:
        top.QuantizeWeights(linears=False, embeddings=True)(graph, context)
    return graph


def _guarded(graph: Any, calibration: list[Any], insert: top.InsertFakeQuant) -> top.InsertFakeQuant:
    inputs = [torch.cat(values) for values in zip(*calibration, strict=True)]
    with torch.inference_mode():
        wanted = graph(*inputs)

    def cosine(candidate: Any) -> float:
        with torch.inference_mode():
            return float(torch.nn.functional.cosine_similarity(candidate(*inputs), wanted).mean())

    context = top.PassContext(calibration=calibration, prove=False)
    found = top.keep_accuracy(
        graph, cosine, context, drop=0.005, insert=insert, sensitivity="leave_one_out", max_evaluations=10
    )
    print(found)
    return found.choice.insert_fake_quant(qat=False)


_TARGETS = ("inductor", "onnx", "openvino", "litert", "executorch")
ARMS: tuple[Arm, ...] = (
    Arm("compile", "float32", "peer"),
    Arm("eager", "float32", "peer"),
    *(Arm(target, "float32", "ours") for target in _TARGETS),
    *(Arm(target, "float32", "peer") for target in _TARGETS[1:]),
    *(Arm(target, "int8", maker) for target in _TARGETS for maker in ("ours", "peer")),
    *(Arm("openvino", "int8 bfloat16", maker) for maker in ("ours", "peer")),
    *(Arm("tensorrt", precision, "ours") for precision in ("float32", "int8")),
    *(Arm(target, "int8", "tuned") for target in _TARGETS),
    Arm("openvino", "int8", "guarded"),
    *(Arm(target, "int8", "pruned") for target in ("openvino", "litert", "inductor")),
)


def arms_of(model: str) -> list[Arm]:
    """Return the arms of a model: three kinds are not for all."""
    only = {"tuned": _PRETRAINED, "guarded": _PRETRAINED[:1], "pruned": ("resnet50",)}
    assert model in MODELS
    return [arm for arm in ARMS if model in only.get(arm.maker, MODELS)]
