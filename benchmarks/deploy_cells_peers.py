"""Each runtime's own converter and quantizer, as its documentation uses it: what our artefacts are measured against.

A peer is a pair of functions: ``write(cell, path, precision, batch)`` makes the file and tells whether its batch is
open; ``read(path, precision)`` opens it and returns a function of the input tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.deploy_cells_models import Cell

__all__ = ["PEERS", "compile_frozen"]

Call = Callable[..., torch.Tensor]
Write = Callable[[Cell, Path, str, int], bool]
Read = Callable[[Path, str], Call]
MOST = 8  # the largest batch that is timed


def compile_frozen(model: Any) -> Call:
    """``torch.compile`` with freezing, for fixed sizes."""
    import torch._inductor.config as config

    config.freezing = True
    compiled = torch.compile(model, dynamic=False)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return compiled(*inputs)

    return call


def exported(cell: Cell, batch: int, *, dynamic: bool, strict: bool = False) -> Any:
    """Export the model, with the batch open up to `MOST` where that is wanted."""
    inputs = cell.example(2 if dynamic else batch)
    shapes = tuple({0: torch.export.Dim("batch", min=1, max=MOST)} for _ in inputs) if dynamic else None
    with torch.no_grad():
        return torch.export.export(cell.model, inputs, dynamic_shapes=shapes, strict=strict)


# torchao PT2E and Inductor


def write_pt2e(cell: Cell, path: Path, precision: str, batch: int) -> bool:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    del precision
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = exported(cell, batch, dynamic=False, strict=True).module()
    prepared: Any = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for inputs in cell.batches(cell.calibration, batch):
            prepared(*inputs)
    torch.export.save(torch.export.export(convert_pt2e(prepared), cell.example(batch)), str(path))
    return False


def read_pt2e(path: Path, precision: str) -> Call:
    del precision
    # registers the operations of the file, and what the compiler makes of them
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401

    return compile_frozen(torch.export.load(str(path)).module())


# ONNX Runtime


def write_onnx(cell: Cell, path: Path, precision: str, batch: int) -> bool:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    del batch
    names = [f"input_{place}" for place in range(len(cell.calibration))]
    plain = path if precision == "float32" else path.with_name(f"plain-{path.name}")
    dim = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        cell.model, cell.example(2), str(plain), dynamo=True, input_names=names, output_names=["out"],
        dynamic_shapes=tuple({0: dim} for _ in names), external_data=False, verbose=False,
    )  # fmt: skip
    if precision == "float32":
        return True
    tidy = path.with_name(f"tidy-{path.name}")
    quant_pre_process(str(plain), str(tidy), skip_symbolic_shape=True)
    feeds = iter(
        [
            {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
            for inputs in cell.batches(cell.calibration, 16)
        ]
    )
    quantize_static(
        str(tidy), str(path), _Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    plain.unlink()
    tidy.unlink()
    return True


class _Reader:
    def __init__(self, feeds: Any) -> None:
        self._feeds = feeds

    def get_next(self) -> Any:
        return next(self._feeds, None)


def read_onnx(path: Path, precision: str) -> Call:
    del precision
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # it would disturb who comes next
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return call


# OpenVINO, quantized by NNCF


def write_openvino(cell: Cell, path: Path, precision: str, batch: int) -> bool:
    import openvino

    try:
        model, dynamic = openvino.convert_model(exported(cell, batch, dynamic=True)), True
    except Exception:  # it leaves few models open
        model, dynamic = openvino.convert_model(exported(cell, batch, dynamic=False)), False
    if precision != "float32":
        import nncf

        batches = cell.batches(cell.calibration, 16 if dynamic else batch)
        model = nncf.quantize(
            model,
            nncf.Dataset([tuple(value.numpy() for value in inputs) for inputs in batches]),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if cell.text or cell.name.startswith("vit") else None,
        )
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return dynamic


def read_openvino(path: Path, precision: str) -> Call:
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision != "int8 bfloat16":  # what the runtime chooses by itself on this CPU
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled([value.numpy() for value in inputs], share_inputs=True)[0].copy())

    return call


# ExecuTorch with XNNPACK


def write_executorch(cell: Cell, path: Path, precision: str, batch: int) -> bool:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore

    program = exported(cell, batch, dynamic=False)
    if precision == "int8":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (  # pyright: ignore
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        if cell.text:  # it turns whole numbers into floats otherwise, and the graph fails
            quantizer.transform_for_annotation = lambda model: model
        prepared: Any = prepare_pt2e(program.module(), quantizer)
        with torch.no_grad():
            for inputs in cell.batches(cell.calibration, batch):
                prepared(*inputs)
        program = torch.export.export(convert_pt2e(prepared), cell.example(batch))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    return False


def read_executorch(path: Path, precision: str) -> Call:
    del precision
    from executorch.runtime import Runtime  # pyright: ignore

    from torchopt_passes._compat import executorch_threads

    executorch_threads(torch.get_num_threads())
    program = Runtime.get().load_program(path.read_bytes())
    method = program.load_method("forward")
    _KEPT.append(program)
    return lambda *inputs: method.execute(list(inputs))[0].clone()


# LiteRT


def write_litert(cell: Cell, path: Path, precision: str, batch: int) -> bool:
    import litert_torch  # pyright: ignore

    plain = path if precision == "float32" else path.with_name(f"plain-{path.name}")
    litert_torch.convert(cell.model, cell.example(batch)).export(str(plain))
    if precision == "int8":
        from ai_edge_quantizer import quantizer, recipe  # pyright: ignore

        quantize = quantizer.Quantizer(str(plain))
        quantize.load_quantization_recipe(recipe.static_wi8_ai8())
        data = [
            {f"args_{place}": _int32(value).numpy() for place, value in enumerate(inputs)}
            for inputs in cell.batches(cell.calibration, batch)
        ]
        quantize.quantize(quantize.calibrate({"serving_default": data})).export_model(str(path), overwrite=True)
        plain.unlink()
    return False


def _int32(value: torch.Tensor) -> torch.Tensor:
    return value if value.is_floating_point() else value.int()


def read_litert(path: Path, precision: str) -> Call:
    del precision
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore

    interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    ins = sorted(interpreter.get_input_details(), key=lambda detail: detail["name"])
    (out,) = interpreter.get_output_details()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        for detail, value in zip(ins, inputs, strict=True):
            array = _int32(value).numpy()
            scale, zero_point = detail["quantization"]
            if scale:
                array = (array / scale + zero_point).round().clip(-128, 127).astype(detail["dtype"])
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        found = torch.from_numpy(interpreter.get_tensor(out["index"]))
        scale, zero_point = out["quantization"]
        return (found.float() - zero_point) * scale if scale else found

    return call


_KEPT: list[Any] = []
PEERS: dict[str, tuple[str, Write, Read]] = {
    "inductor": ("torchao PT2E", write_pt2e, read_pt2e),
    "onnx": ("torch.onnx, onnxruntime.quantization", write_onnx, read_onnx),
    "openvino": ("openvino.convert_model, NNCF", write_openvino, read_openvino),
    "executorch": ("ExecuTorch, XNNPACKQuantizer", write_executorch, read_executorch),
    "litert": ("litert_torch, ai_edge_quantizer", write_litert, read_litert),
}
