"""OpenVINO: an IR model (``.xml`` and ``.bin``) for Intel and other x86 and ARM CPUs, float or int8."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from torchopt_passes.deploy.base import Runner, Target
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.onnx_graph import first_apart, layer_values, save_onnx
from torchopt_passes.deploy.openvino_changes import change_int8_model, drop_zero_points
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.verify import DEFAULT_TOLERANCE
from torchopt_passes.errors import ExportError

__all__ = ["OpenVinoTarget"]

_OPSET = 20
_MOVES = {"Const", "Input", "Output", "Reorder", "Reshape", "Transpose", "ShapeOf", "Convert"}


class OpenVinoTarget(Target):
    """OpenVINO IR.

    The program goes through ONNX, whose quantize / dequantize pairs OpenVINO turns into fake-quantize operations of its
    own and, when the file is compiled on the user's machine, into int8 kernels; the direct route from ``torch.export``
    refuses stored int8 weights (2026.4). The report says which kernels the runtime chose on this machine.

    Weights lie in ``<name>.bin`` beside the ``.xml`` file; move both. The runtime uses as many threads as torch does
    when the file is opened.

    Args:
        precision: what the float operations are computed in: ``"float32"``; ``"bfloat16"``, which the runtime takes by
            itself where the CPU has it, 1.5 to 2.5 times as fast; ``"float16"`` on CPUs and GPUs that have that.
        weights: how float weights are stored: ``"float32"``, or ``"float16"``, half the size.
        device: of OpenVINO: ``"CPU"``, ``"GPU"``, ``"NPU"``, ``"AUTO"``.
    """

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    extra: ClassVar[str] = "openvino"
    supports: ClassVar[str] = "float32, float16 weights, bfloat16, int8; dynamic batch and sequence; CPU, GPU, NPU"

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal["float32", "float16"] = "float32"
    device: str = "CPU"

    def file_precision(self, program: Program) -> str:
        """Return int8, or the coarsest of what the model, its stored weights and the runtime's arithmetic have."""
        if program.precision == "int8":
            return "int8"
        return max((program.precision, self.weights, self.precision), key=lambda name: DEFAULT_TOLERANCE[name])

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Convert, save both files, and say which kernels the runtime chose."""
        import openvino

        if program.precision == "bfloat16":
            raise ExportError(
                "OpenVINO reads embeddings of a bfloat16 model wrongly (2026.4), and its inputs are no NumPy arrays: "
                'give it a float32 model and precision="bfloat16"'
            )
        draft = path.with_name("draft.onnx")
        try:
            save_onnx(program, _OPSET, draft, change=drop_zero_points)
            model = openvino.convert_model(str(draft))
            if program.precision == "int8":
                change_int8_model(model)
            # its weights may still be those of the draft, mapped into memory
            openvino.save_model(model, str(path), compress_to_fp16=self.weights == "float16")
        finally:
            for file in draft.parent.glob("draft.onnx*"):
                file.unlink()
        facts = {"computed in": self.precision, "runtime device": self.device, "sha256": _digest(path)}
        compiled = _compile(_read(path), self.precision, self.device)
        return facts | {"kernels": _kernels(compiled)} | ({"weights": "float16"} if self.weights == "float16" else {})

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Put the metadata into the model's runtime information, in the ``.xml`` file."""
        import xml.etree.ElementTree as ElementTree

        tree = ElementTree.parse(path)
        root = tree.getroot()
        info = root.find("rt_info")
        info = info if info is not None else ElementTree.SubElement(root, "rt_info")
        ElementTree.SubElement(info, KEY).set("value", metadata.to_json())
        for element in root.iter():  # a fifth of a small net's text is indentation
            element.text, element.tail = ((text or "").strip() or None for text in (element.text, element.tail))
        tree.write(path, encoding="utf-8", xml_declaration=True)

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read the runtime information; refuse a ``.bin`` file that is not the one that was written with it."""
        model = _read(path)
        if not model.has_rt_info([KEY]):
            raise ExportError(f"{path.name} was not written by torchopt_passes: open it with openvino")
        metadata = Metadata.from_json(str(model.get_rt_info([KEY]).value))
        if metadata.facts.get("sha256") != _digest(path):
            raise ExportError(f"{path.with_suffix('.bin').name} is not the file that {path.name} was written with")
        return metadata

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Compile the model for the device it was exported for."""
        facts = metadata.facts
        return _Compiled(_compile(_read(path), facts["computed in"], facts["runtime device"]), len(metadata.outputs))

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Give the model all its values as outputs, and name the first that differs from torch's."""
        values, layers = layer_values(program, _OPSET, inputs)
        model = _read(path)
        names: list[str] = []
        for operation in model.get_ordered_ops():
            for output in operation.outputs():
                known = next((name for name in output.get_names() if layers.get(name) in values), None)
                if known is not None and known not in names:
                    names.append(known)
        outputs = model.add_outputs(names)
        for output, name in zip(outputs, names, strict=True):
            output.get_tensor().add_names({f"layer {name}"})
        found = _compile(model, self.precision, self.device)(_arrays(inputs))
        pairs = ((name, found[f"layer {name}"]) for name in names)
        where = first_apart(pairs, values, layers, tolerance)
        return where or "every layer agrees by itself: the difference comes from the runtime's fusions"


class _Compiled:
    """A compiled model as a `Runner`."""

    def __init__(self, model: Any, outputs: int) -> None:
        self._request = model.create_infer_request()
        self._outputs = outputs

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device if inputs else torch.device("cpu")
        results = self._request.infer(_arrays(inputs), share_inputs=True)
        return [torch.from_numpy(results[place].copy()).to(device) for place in range(self._outputs)]


def _arrays(inputs: Sequence[torch.Tensor]) -> list[Any]:
    return [value.detach().cpu().contiguous().numpy() for value in inputs]


def _read(path: Path) -> Any:
    import openvino

    try:
        return openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise ExportError(
            f"{path.name} is damaged or no OpenVINO model: {str(error).strip().splitlines()[-1]}"
        ) from error


def _compile(model: Any, precision: str, device: str) -> Any:
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device in ("CPU", "GPU"):
        options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
    if device == "CPU":
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    try:
        return openvino.Core().compile_model(model, device, options)
    except RuntimeError as error:
        reason = " ".join(str(error).strip().splitlines()[-2:])  # the node, and what is wrong with it
        raise ExportError(f"OpenVINO cannot compile the model for {device}: {reason[-500:]}") from error


def _kernels(compiled: Any) -> str:
    """Return how often each kernel occurs in what the runtime made of the file, integer ones first."""
    counts: Counter[tuple[str, str]] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        kind, precision = str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))
        if kind not in _MOVES:
            counts[kind, precision] += 1
    order = sorted(counts, key=lambda key: (key[1] not in ("u8", "i8"), key))
    return ", ".join(f"{kind} {precision} {counts[kind, precision]}" for kind, precision in order)


def _digest(path: Path) -> str:
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ExportError(f"{weights.name} is missing: it holds the weights of {path.name} and belongs beside it")
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
