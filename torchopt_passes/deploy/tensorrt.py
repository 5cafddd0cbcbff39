"""TensorRT: an explicitly quantized ONNX file by TensorRT's rules; the engine is built where a GPU is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from torchopt_passes.deploy.base import Runner
from torchopt_passes.deploy.metadata import Metadata, TensorSpec
from torchopt_passes.deploy.onnx import OnnxTarget, open_in_onnx_runtime
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.tensorrt_rules import check_quantization, check_sparsity
from torchopt_passes.errors import ConfigError, ExportError

__all__ = ["TensorRtTarget"]


class TensorRtTarget(OnnxTarget):
    """TensorRT.

    What is written is an ONNX file with quantize / dequantize pairs, which TensorRT reads with explicit quantization:
    int8 symmetric about zero, weights by output channel. `InsertFakeQuant(target="tensorrt")` makes such graphs; others
    are refused. An engine belongs to one GPU and one version of TensorRT, so it is built when the file is opened on a
    machine that has both; elsewhere the same file runs in ONNX Runtime, which is how it is verified without a GPU.

    Args:
        max_batch: open sizes go up to this many times the example's (at least to it): the engine is tuned for the
            example's sizes.
        sparse_weights: let the engine use 2:4 sparse tensor cores (Ampere and later). What is claimed is checked in the
            file, after quantization: every weight whose number of inputs is a multiple of 4, or those whose names match
            one of these patterns (``("encoder.*.weight",)``).
    """

    name: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "onnx"
    supports: ClassVar[str] = "float32, float16, int8 (symmetric QDQ), 2:4 sparse weights; CUDA with tensorrt>=10"

    max_batch: int = 8
    sparse_weights: bool | tuple[str, ...] = False

    def check(self) -> None:
        """Refuse sizes that are none."""
        super().check()
        if self.max_batch < 1:
            raise ConfigError(f"TensorRtTarget: max_batch must be at least 1, not {self.max_batch}")

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Refuse a graph whose grids TensorRT does not have."""
        for node in graph_module.graph.nodes:
            if "quantized_decomposed.quantize_per_tensor" in str(node.target) and node.args[2] != 0:
                raise ExportError(
                    f"{node.args[0]} is rounded with zero point {node.args[2]}, but TensorRT's int8 is symmetric about "
                    'zero: quantize with InsertFakeQuant(target="tensorrt")'
                )
        return {}

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Write the file, check TensorRT's rules for quantize and dequantize, and note what the engine needs."""
        facts = super().write(program, path)
        check_quantization(path)
        sparse = check_sparsity(path, self.sparse_weights, program.exported.state_dict) if self.sparse_weights else []
        return facts | {"max_batch": str(self.max_batch), "sparse weights": ", ".join(sparse)}

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Build the engine where a GPU and TensorRT are, else open the file in ONNX Runtime."""
        if find_spec("tensorrt") is None or not torch.cuda.is_available():
            # as written: int8 kernels of a CPU, which can saturate, say nothing of TensorRT's
            return open_in_onnx_runtime(path, metadata, optimize=False)
        return _Engine(path, metadata)


class _Engine:
    """A TensorRT engine as a `Runner`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        tensorrt: Any = import_module("tensorrt")

        self._outputs = metadata.outputs
        self._inputs = metadata.inputs
        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            errors = [str(parser.get_error(place)) for place in range(parser.num_errors)]
            raise ExportError(f"TensorRT cannot read {path.name}: {'; '.join(errors)}")
        config = builder.create_builder_config()
        if metadata.facts.get("sparse weights"):
            config.set_flag(tensorrt.BuilderFlag.SPARSE_WEIGHTS)
        profile = builder.create_optimization_profile()
        for spec in metadata.inputs:
            low, most = _range(spec, int(metadata.facts["max_batch"]))
            profile.set_shape(spec.name, low, spec.example, most)
        config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config)
        if built is None:
            raise ExportError(f"TensorRT cannot build an engine from {path.name}; its log says why")
        self._runtime = tensorrt.Runtime(logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(built)
        self._context: Any = self._engine.create_execution_context()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        home = inputs[0].device if inputs else torch.device("cpu")
        held = [tensor.detach().cuda().contiguous() for tensor in inputs]
        for spec, tensor in zip(self._inputs, held, strict=True):
            self._context.set_input_shape(spec.name, tuple(tensor.shape))
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
        results: list[torch.Tensor] = []
        for spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            results.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cuda"))
            self._context.set_tensor_address(spec.name, results[-1].data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExportError("TensorRT failed to run the engine; its log says why")
        stream.synchronize()
        return [tensor.to(home) for tensor in results]


def _range(spec: TensorSpec, times: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the smallest and the largest shape of an input that the engine is built for."""
    pairs = list(zip(spec.shape, spec.example, strict=True))
    low = tuple(size if isinstance(size, int) else 1 for size, _ in pairs)
    most = tuple(size if isinstance(size, int) else max(example, example * times) for size, example in pairs)
    return low, most
