"""LiteRT (TensorFlow Lite) files: float32, float16 or int8 weights, or int8 throughout."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from torchopt_passes.deploy.base import WAYS_OUT, Runner, Target
from torchopt_passes.deploy.calls import cause_of
from torchopt_passes.deploy.first_layer import first_layer
from torchopt_passes.deploy.grids import drop_identities, fold_static, make_signed, unfold_weights
from torchopt_passes.deploy.litert_pads import fuse_pads
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ConfigError, ExportError

__all__ = ["LiteRtTarget"]

_IDENTIFIER = b"TFL3"
_SIGNATURE = "serving_default"
_CHECKSUM = f"{KEY}.sha256"
_PADS = (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)
# stands where the SHA-256 of the file will be, while that is computed
_NO_DIGEST = hashlib.sha256(_CHECKSUM.encode()).digest()


class LiteRtTarget(Target):
    """LiteRT, the former TensorFlow Lite.

    ``litert_torch`` writes the exported program. The quantize / dequantize pairs of an int8 graph become the int8
    tensors of the file with the scales of the graph (of training or calibration; nothing is measured again); uint8
    activations are written as int8 with the zero point moved by 128, the same values. An operation is computed in int8
    when its input, weight and output are rounded, as ``InsertFakeQuant(target="litert")`` does. Inputs and outputs that
    the graph rounds are int8 in the file; the runner rounds and rescales them. Int64 inputs are int32 in the file.

    The runtime (XNNPACK kernels) uses as many threads as torch does when the file is opened.

    Args:
        weights: how a float model's weights are stored: ``"float32"``; ``"float16"`` (half the file, computed in
            float32); ``"int8"`` for the dynamic-range form (a scale for each output channel, activations rounded at
            run time from the range of each call); ``"int16x8"`` for int8 weights with int16 activations, whose ranges
            are measured on ``export(calibration=...)``: its kernels are the reference ones, and slower than float.

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference"; TensorFlow Lite 8-bit quantization specification.
    """

    name: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    packages: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
    extra: ClassVar[str] = "litert"
    supports: ClassVar[str] = "float32, float16 weights, dynamic-range int8, int16x8, int8; dynamic batch of CNNs; CPU"
    may_fix_sizes: ClassVar[bool] = True
    int32_biases: ClassVar[bool] = True

    weights: Literal["float32", "float16", "int8", "int16x8"] = "float32"

    @property
    def calibrates(self) -> bool:
        """Whether ranges of activations are measured: for int16 ones."""
        return self.weights == "int16x8"

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Write grids as int8 ones and weights as floats that the graph rounds, and let views infer the batch."""
        drop_identities(graph_module)
        fold_static(graph_module)
        make_signed(graph_module, "LiteRT")
        unfold_weights(graph_module)
        _leave_batch_to_views(graph_module)
        return {}

    def file_precision(self, program: Program) -> str:
        """Return that of the weights in the file."""
        weights = "int8" if self.weights == "int16x8" else self.weights
        return program.precision if self.weights == "float32" else weights

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Convert, and say which operations the file holds, int8 ones first."""
        if self.weights != "float32" and program.precision != "float32":
            raise ConfigError(f"LiteRtTarget: weights={self.weights!r} is for a float32 model, not {program.precision}")
        if self.weights == "float32" and program.precision not in ("float32", "int8"):
            raise ExportError(f'LiteRT computes in float32: use model.float() and weights="float16" for {path.name}')
        if self.calibrates and not program.calibration:
            raise ConfigError('LiteRtTarget: weights="int16x8" needs calibration=: some batches of real data')
        path.write_bytes(_without_pads(_convert(program)))
        if self.weights != "float32":
            _compress(path, self.weights, [program.select(call) for call in program.calibration])
        return {"kernels": _kernels(path)} | ({"activations": "int16"} if self.calibrates else {})

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Add the metadata to the ``metadata`` entries of the file."""
        from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

        model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
        for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
            tensor.name = re.sub(rb"([\w<>]+\.)+", b"", tensor.name)  # a small net's weigh as much as its scales
        text = metadata.to_json().encode()
        model.metadata = list(model.metadata or [])
        for name, data in ((KEY, text), (_CHECKSUM, _NO_DIGEST)):
            buffer, entry = schema.BufferT(), schema.MetadataT()
            buffer.data = list(data)
            entry.name, entry.buffer = name, len(model.buffers)
            model.buffers.append(buffer)
            model.metadata.append(entry)
        written = _packed(model)
        # beside it first: the runner may have the file mapped into memory
        draft = path.with_name("stamped.tflite")
        draft.write_bytes(written.replace(_NO_DIGEST, hashlib.sha256(written).digest()))
        os.replace(draft, path)

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read the ``metadata`` entries, and check the checksum; see `Target.read_metadata`."""
        from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

        data = path.read_bytes()
        if data[4:8] != _IDENTIFIER:
            raise ExportError(f"{path.name} is damaged or no LiteRT file")
        try:
            model = schema.Model.GetRootAs(data, 0)
            entries = {model.Metadata(place).Name(): model.Metadata(place) for place in range(model.MetadataLength())}
            found = {
                name: model.Buffers(entries[name.encode()].Buffer()).DataAsNumpy().tobytes()
                for name in (KEY, _CHECKSUM)
                if name.encode() in entries
            }
        except (struct.error, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ExportError(f"{path.name} is damaged: {error}") from error
        if KEY not in found:
            raise ExportError(f"{path.name} was not written by torchopt_passes: open it with ai_edge_litert")
        digest = found.get(_CHECKSUM, b"")
        if not digest or hashlib.sha256(data.replace(digest, _NO_DIGEST)).digest() != digest:
            raise ExportError(f"{path.name} is damaged: it does not match its checksum")
        return Metadata.from_json(found[KEY])

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Open an interpreter with XNNPACK's kernels."""
        try:
            return _Interpreter(_interpreter(path), metadata)
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"LiteRT cannot open {path.name}: {cause_of(error)}") from error

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Convert once more with every layer's value as an output, and name the first that differs from torch's."""
        return first_layer(self, program, path, inputs, tolerance)


class _Interpreter:
    """A loaded interpreter as a `Runner`."""

    def __init__(self, interpreter: Any, metadata: Metadata) -> None:
        ins, outs = _details(interpreter)
        self._interpreter = interpreter
        self._inputs = [ins[name] for name in _names(metadata.inputs)]
        self._outputs = [outs[f"output_{place}"] for place in range(len(metadata.outputs))]
        self._dtypes = [getattr(torch, spec.dtype) for spec in metadata.outputs]
        self._shapes: list[tuple[int, ...]] = []
        self._resize([tuple(detail["shape"].tolist()) for detail in self._inputs])

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device if inputs else torch.device("cpu")
        shapes = [tuple(value.shape) for value in inputs]
        try:
            if shapes != self._shapes:
                self._resize(shapes)
            for detail, value in zip(self._inputs, inputs, strict=True):
                self._interpreter.set_tensor(detail["index"], _to_file(value.detach().cpu(), detail))
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"LiteRT cannot run inputs of sizes {shapes}: {cause_of(error)}") from error
        found = [_from_file(self._interpreter.get_tensor(detail["index"]), detail) for detail in self._outputs]
        return [value.to(device, dtype) for value, dtype in zip(found, self._dtypes, strict=True)]

    def _resize(self, shapes: list[tuple[int, ...]]) -> None:
        for detail, shape in zip(self._inputs, shapes, strict=True):
            self._interpreter.resize_tensor_input(detail["index"], list(shape))
        self._interpreter.allocate_tensors()
        self._shapes = shapes


def _names(inputs: Sequence[Any]) -> list[str]:
    """Return what the converter calls a program's inputs, in order."""
    return [f"args_{place}" for place in range(len(inputs))]


def _details(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs and outputs by name; the runtime resizes nothing while a signature's runner is alive."""
    signature = interpreter.get_signature_runner(_SIGNATURE)
    return signature.get_input_details(), signature.get_output_details()


def _to_file(value: torch.Tensor, detail: dict[str, Any]) -> Any:
    """Return a tensor as the file takes it: rounded when it is int8 there.

    In NumPy, by one thread: torch's threads go on spinning after an operation, and would slow down the runtime's.
    """
    import numpy as np

    array = value.contiguous().numpy()
    scale, zero_point = detail["quantization"]
    if scale and value.is_floating_point():
        limits = np.iinfo(detail["dtype"])
        array = array * np.float32(1.0 / scale)
        np.rint(array, out=array)
        np.clip(array + np.float32(zero_point), limits.min, limits.max, out=array)
    return array.astype(detail["dtype"], copy=False)


def _from_file(array: Any, detail: dict[str, Any]) -> torch.Tensor:
    import numpy as np

    scale, zero_point = detail["quantization"]
    if scale:
        array = (array.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
    return torch.from_numpy(array)


def _leave_batch_to_views(graph_module: fx.GraphModule) -> None:
    """Write the one open size of a view as -1: the converter cannot take a size that is a value of the graph."""
    aten = torch.ops.aten
    for node in graph_module.graph.nodes:
        if node.target is aten.flatten.using_ints and node.args[1:] in ((1,), (1, -1)):
            sizes = list(node.args[0].meta["val"].shape[1:])
            if all(type(size) is int for size in sizes):
                node.target, node.args = aten.reshape.default, (node.args[0], [-1, math.prod(sizes)])
        elif node.target in (aten.view.default, aten.reshape.default):
            sizes = list(node.args[1])
            if sum(isinstance(size, fx.Node) for size in sizes) == 1 and -1 not in sizes:
                node.args = (node.args[0], [-1 if isinstance(size, fx.Node) else size for size in sizes])
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _convert(program: Program) -> bytes:
    """Return the file's bytes, with the pairs of an int8 graph as quantized tensors."""
    import litert_torch  # pyright: ignore[reportMissingImports]
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config  # pyright: ignore[reportMissingImports]
    from litert_torch.quantize.quant_config import QuantConfig  # pyright: ignore[reportMissingImports]

    _check_open_sizes(program)
    # the quantizer itself is not asked for anything: it tells the converter that pairs mean static int8
    static = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    module = program.exported.module(check_guards=False)
    module.training = False
    auto = torch.export.Dim.AUTO
    shapes = tuple({dim: auto for dim, s in enumerate(spec.shape) if isinstance(s, str)} for spec in program.inputs)
    try:
        with _quiet():
            converted = litert_torch.convert(
                module,
                tuple(program.select(program.example)),
                quant_config=static if program.precision == "int8" else None,
                dynamic_shapes=shapes if any(shapes) else None,
            )
            return bytes(converted.model_content())
    except Exception as error:
        raise ExportError(f"litert_torch cannot convert {_where(error)}. {WAYS_OUT}") from error


def _check_open_sizes(program: Program) -> None:
    """Refuse what the converter fails at late, or without naming it: it calculates with open sizes as numbers."""
    for node in program.exported.graph.nodes:
        bounds = [a for a in node.args if isinstance(a, fx.Node)] if "aten.arange" in str(node.target) else []
        reflects = any(mode in node.args for mode in ("reflect", "replicate", "circular"))
        padded = node.meta["val"].shape if node.target in _PADS and not reflects else ()
        if bounds or not all(type(size) is int for size in padded):
            why = "TypeError in its rewrite_arange" if bounds else "a pad of an open batch has a negative size there"
            raise ExportError(
                f"litert_torch cannot convert {node.target} up to an open size ({node.name}; {why}): give "
                "dynamic=False and one file for each size"
            )


def _where(error: Exception) -> str:
    """Return the operation that a converter failed at, and why."""
    found = re.search(r"target=(?:torch\.ops\.)?([\w.]+)", str(error))
    # MLIR says "verification failed" first, and what failed on a line of its own
    detail = re.search(r"error: .+", str(error))
    return f"{found[1] if found else 'the model'}: {(detail[0] if detail else cause_of(error))[:500]}"


def _compress(path: Path, weights: str, calibration: Sequence[Sequence[torch.Tensor]]) -> None:
    """Store the weights of a float file in float16, or in int8 with activations rounded at run time or to int16."""
    from ai_edge_quantizer import qtyping, quantizer, recipe  # pyright: ignore[reportMissingImports]

    quantize = quantizer.Quantizer(str(path))
    ranges: Any = None
    if weights == "int16x8":
        quantize.load_quantization_recipe(recipe.static_wi8_ai16())
        ins = _details(_interpreter(path))[0]
        calls = [
            {name: _to_file(value.detach().cpu(), ins[name]) for name, value in zip(_names(call), call, strict=True)}
            for call in calibration
        ]
        with _quiet():
            ranges = quantize.calibrate({_SIGNATURE: calls})
    elif weights == "int8":
        quantize.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    else:
        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        quantize.update_quantization_recipe(
            regex=".*",
            operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=half,
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            algorithm_key=quantizer.algorithm_manager.AlgorithmName.FLOAT_CASTING,
        )
    with _quiet():
        path.write_bytes(bytes(quantize.quantize(ranges).quantized_model))


def _without_pads(content: bytes) -> bytes:
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
    return _packed(model) if fuse_pads(model) else content


def _packed(model: Any) -> bytes:
    """Return a model's bytes; equal vectors stand there once: zero points of channels take twice what scales do."""
    import flatbuffers

    class Builder(flatbuffers.Builder):
        def __init__(self) -> None:
            super().__init__(1024)
            self.places: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: Any) -> int:  # noqa: N802
            if x.dtype == "uint8":  # weights
                return super().CreateNumpyVector(x)
            key = (str(x.dtype), x.tobytes())
            if key not in self.places:
                self.places[key] = super().CreateNumpyVector(x)
            return self.places[key]

    builder = Builder()
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def _interpreter(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    return Interpreter(model_path=str(path), num_threads=torch.get_num_threads())


def _kernels(path: Path) -> str:
    """Return how often each operation occurs in the file, those on int8 values first."""
    from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    widths = {schema.TensorType.INT8: " int8", schema.TensorType.INT16: " int16"}
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    counts: Counter[tuple[str, str]] = Counter()
    for place in range(graph.OperatorsLength()):
        operator = graph.Operators(place)
        code = model.OperatorCodes(operator.OpcodeIndex())
        types = [graph.Tensors(i).Type() for i in (operator.Inputs(0), operator.Outputs(0))]
        kind = widths.get(types[0], "") if types[0] == types[1] else ""
        name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        counts[kind, name] += 1
    return ", ".join(f"{name}{kind} {counts[kind, name]}" for kind, name in sorted(counts, key=lambda k: (not k[0], k)))


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the converter's progress off the terminal, and its warnings of what the runner does: int32 inputs."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
