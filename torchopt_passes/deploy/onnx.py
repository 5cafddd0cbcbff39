"""ONNX files for ONNX Runtime: float, or int8 as explicit quantize / dequantize pairs (QDQ)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from torchopt_passes.deploy.base import Runner, Target
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.onnx_graph import feeds, first_apart, layer_values, save_onnx
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.stored_weights import multiply_packed
from torchopt_passes.errors import ConfigError, ExportError

__all__ = ["OnnxTarget", "open_in_onnx_runtime"]

_CHECKSUM = f"{KEY}.sha256"
# stands where the SHA-256 of the file will be, while that is computed
_NO_DIGEST = hashlib.sha256(_CHECKSUM.encode()).hexdigest()


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
    int32_biases: ClassVar[bool] = True

    opset: int = 20
    external_data: bool = False

    def check(self) -> None:
        """Refuse an opset that the exporter cannot write."""
        if not 18 <= self.opset <= 25:
            raise ConfigError(f"OnnxTarget: opset: torch.onnx writes 18 to 25 (got {self.opset})")

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Let linears read the integers that their weights are stored as."""
        return multiply_packed(graph_module)

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Write the file, run the ONNX checker on it, and say which kernels the runtime chose."""
        import onnx

        save_onnx(program, self.opset, path, external_data=self.external_data)
        onnx.checker.check_model(str(path), full_check=True)
        data = path.with_name(f"{path.name}.data")
        facts = {"opset": str(self.opset), "kernels": _kernels(path)}
        return facts | ({"external data": data.name} if data.exists() else {})

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Put the metadata and a checksum into the model's ``metadata_props``."""
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        onnx.helper.set_model_props(model, {KEY: metadata.to_json(), _CHECKSUM: _NO_DIGEST})
        written = model.SerializeToString()
        digest = _digest(written, path, metadata)
        path.write_bytes(written.replace(_NO_DIGEST.encode(), digest.encode()))

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read ``metadata_props``, and check the checksum; see `Target.read_metadata`."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            data = path.read_bytes()
            props = {item.key: item.value for item in onnx.load_from_string(data).metadata_props}
        except (DecodeError, UnicodeDecodeError) as error:
            raise ExportError(f"{path.name} is damaged or no ONNX file: {error}") from error
        if KEY not in props:
            raise ExportError(f"{path.name} was not written by torchopt_passes: open it with onnxruntime")
        metadata, digest = Metadata.from_json(props[KEY]), props.get(_CHECKSUM, "")
        if not digest or digest != _digest(data.replace(digest.encode(), _NO_DIGEST.encode()), path, metadata):
            both = metadata.facts.get("external data", "")
            raise ExportError(
                f"{path.name}{f' or {both}' if both else ''} is damaged: the checksum is another. Export it again, or "
                "copy it again from where it came"
            )
        return metadata

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Open a session with all graph optimizations."""
        return open_in_onnx_runtime(path, metadata)

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Run the ONNX graph with all its values as outputs, and name the first that differs from torch's."""
        import onnx

        values, layers = layer_values(program, self.opset, inputs)
        model = onnx.load(str(path), load_external_data=False)
        known = {value.name for value in model.graph.output}
        order = [name for node in model.graph.node for name in node.output if layers.get(name) in values]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in order if name not in known)
        draft = path.with_name("layers.onnx")  # beside the data that both refer to
        try:
            onnx.save(model, str(draft))
            session = _session(draft, optimize=False)
            found = session.run(order, feeds(session, inputs))
        finally:
            draft.unlink(missing_ok=True)
        where = first_apart(zip(order, found, strict=True), values, layers, tolerance)
        return (
            where or "every layer agrees without graph optimizations: the difference comes from the runtime's fusions"
        )


def _digest(written: bytes, path: Path, metadata: Metadata) -> str:
    """Return the SHA-256 of a file, given without its checksum, and of the external data that it names."""
    digest = hashlib.sha256(written)
    if name := metadata.facts.get("external data"):
        data = path.with_name(Path(name).name)
        if not data.is_file():
            raise ExportError(f"{data.name} is missing: it holds the weights of {path.name} and belongs beside it")
        with data.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def open_in_onnx_runtime(path: Path, metadata: Metadata, *, optimize: bool = True) -> Runner:
    """Open a file in ONNX Runtime; without graph optimizations every operation runs as the file has it."""
    return _Session(_session(path, optimize=optimize), metadata)


class _Session:
    """A loaded ONNX Runtime session as a `Runner`."""

    def __init__(self, session: Any, metadata: Metadata) -> None:
        self._session = session
        self._names = [spec.name for spec in metadata.outputs]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device if inputs else torch.device("cpu")
        arrays = self._session.run(self._names, feeds(self._session, inputs))
        return [torch.from_numpy(array).to(device) for array in arrays]


def _session(path: Path, *, optimize: bool = True, save_to: Path | None = None) -> Any:
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
        # more than 2 GB fit into no file
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_to.name}.data"
        )
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in ort.get_available_providers()]
    return ort.InferenceSession(str(path), options, providers=providers)


def _kernels(path: Path) -> str:
    """Return how often each kernel occurs in the graph that the runtime made of the file, int8 ones first."""
    import onnx

    optimized = path.with_name("optimized.onnx")
    try:
        _session(path, save_to=optimized)
        nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    finally:
        for file in optimized.parent.glob("optimized.onnx*"):
            file.unlink()
    counts = Counter(node.op_type for node in nodes)
    integer = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
    order: Callable[[str], tuple[bool, str]] = lambda op: (not op.startswith(integer), op)  # noqa: E731
    return ", ".join(f"{op} {counts[op]}" for op in sorted(counts, key=order))
