"""ONNX files for ONNX Runtime: float, or int8 as explicit quantize / dequantize pairs (QDQ)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchopt_passes.deploy.base import Runner, Target
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.onnx_graph import feeds, layer_values, to_onnx
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ConfigError, ExportError
from torchopt_passes.graph.verify import relative_error

__all__ = ["OnnxTarget", "open_in_onnx_runtime"]

_TWO_GB = 2**31 - 2**20  # what a protobuf can hold, less room for the graph


class OnnxTarget(Target):
    """ONNX Runtime.

    ``torch.onnx`` writes the exported program; each quantize / dequantize pair of an int8 graph becomes
    QuantizeLinear / DequantizeLinear, and the weights are stored in int8. The runtime fuses the pairs into integer
    kernels when it loads the file (all graph optimizations on); the report says which it chose on this machine. Uint8
    activations with int8 weights are what x86 computes fast (int8 activations are 1.8 to 2.6 times slower).

    The runtime uses as many threads as torch does when the file is opened.

    Args:
        opset: of the ONNX standard. 20 knows everything the exporter writes; 21 and later are written on request.
        external_data: weights in ``<name>.data`` beside the file; always so above 2 GB.
    """

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    supports: ClassVar[str] = "float32, float16, int8 (QDQ); dynamic batch and sequence; CPU, CUDA by its runtime"

    opset: int = 20
    external_data: bool = False

    def check(self) -> None:
        """Refuse an opset that the exporter cannot write."""
        if not 18 <= self.opset <= 25:
            raise ConfigError(f"OnnxTarget: opset: torch.onnx writes 18 to 25 (got {self.opset})")

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Write the file, run the ONNX checker on it, and say which kernels the runtime chose."""
        import onnx

        written = to_onnx(program, self.opset)
        sizes = [t.numel() * t.element_size() for t in program.exported.state_dict.values()]
        external = self.external_data or sum(sizes) > _TWO_GB
        written.save(str(path), external_data=external)
        onnx.checker.check_model(str(path), full_check=True)
        return {"opset": str(self.opset), "kernels": _kernels(path)}

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Put the metadata into the model's ``metadata_props``."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
        onnx.save(model, str(path))

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read ``metadata_props``; see `Target.read_metadata`."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            model = onnx.load(str(path), load_external_data=False)
        except DecodeError as error:
            raise ExportError(f"{path.name} is damaged or no ONNX file: {error}") from error
        props = {item.key: item.value for item in model.metadata_props}
        if KEY not in props:
            raise ExportError(f"{path.name} was not written by torchopt_passes: open it with onnxruntime")
        return Metadata.from_json(props[KEY])

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Open a session with all graph optimizations."""
        return open_in_onnx_runtime(path, metadata)

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Run the ONNX graph with all its values as outputs, and name the first that differs from torch's."""
        import onnx

        values, layers = layer_values(program, self.opset, inputs)
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
        known = {value.name for value in model.graph.output}
        order = [name for node in model.graph.node for name in node.output if layers.get(name) in values]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in order if name not in known)
        session = _session(model.SerializeToString(), optimize=False)
        found = dict(zip(order, session.run(order, feeds(session, inputs)), strict=True))
        for name, array in found.items():
            # integers as numbers: one that is rounded the other way is a small error too
            error = relative_error(torch.from_numpy(array.copy()).double(), values[layers[name]].cpu().double())
            if error > tolerance:
                return f"first layer that differs: {layers[name]} (error {error:.1e})"
        return "every layer agrees without graph optimizations: the difference comes from the runtime's fusions"


def open_in_onnx_runtime(path: Path, metadata: Metadata, *, optimize: bool = True) -> Runner:
    """Open a file in ONNX Runtime; without graph optimizations every operation runs as the file has it."""
    return _Session(_session(str(path), optimize=optimize), metadata)


class _Session:
    """A loaded ONNX Runtime session as a `Runner`."""

    def __init__(self, session: Any, metadata: Metadata) -> None:
        self._session = session
        self._names = [spec.name for spec in metadata.outputs]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device if inputs else torch.device("cpu")
        arrays = self._session.run(self._names, feeds(self._session, inputs))
        return [torch.from_numpy(array).to(device) for array in arrays]


def _session(model: Any, *, optimize: bool = True, save_to: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # its threads would go on spinning after a run, and slow down whatever the process does next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only: it warns of every saved optimized model
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in ort.get_available_providers()]
    return ort.InferenceSession(model, options, providers=providers)


def _kernels(path: Path) -> str:
    """Return how often each kernel occurs in the graph that the runtime made of the file, int8 ones first."""
    import onnx

    optimized = path.with_name("optimized.onnx")
    try:
        _session(str(path), save_to=optimized)
        nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    finally:
        for file in optimized.parent.glob("optimized.onnx*"):
            file.unlink()
    counts = Counter(node.op_type for node in nodes)
    integer = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
    order: Callable[[str], tuple[bool, str]] = lambda op: (not op.startswith(integer), op)  # noqa: E731
    return ", ".join(f"{op} {counts[op]}" for op in sorted(counts, key=order))
