"""A program as an ONNX graph: what ONNX Runtime, OpenVINO and TensorRT are given."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from torchopt_passes.deploy.onnx_attention import attention_translation
from torchopt_passes.deploy.onnx_pads import fuse_pads
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.stored_weights import onnx_translations
from torchopt_passes.errors import ExportError
from torchopt_passes.graph.verify import relative_error

__all__ = ["feeds", "first_apart", "layer_values", "save_onnx", "to_onnx"]

_TWO_GB = 2**31 - 2**20  # what a protobuf can hold, less room for the graph


def save_onnx(
    program: Program,
    opset: int,
    path: Path,
    *,
    external_data: bool = False,
    change: Callable[[Any], None] | None = None,
) -> None:
    """Write a program as an ONNX file, with its weights in ``<name>.data`` beside it where they need more than 2 GB.

    Args:
        program: what is deployed.
        opset: of the ONNX standard.
        path: of the file.
        external_data: write the second file for smaller weights too.
        change: what else is done to the graph, an ``onnx_ir.Graph``, in place.

    Raises:
        ExportError: the exporter gives nothing.
    """
    tensors = [*program.exported.state_dict.values(), *program.exported.constants.values()]
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    written = to_onnx(program, opset)
    if change is not None:
        change(written.model.graph)
    written.save(str(path), external_data=external_data or size > _TWO_GB)


def to_onnx(program: Program, opset: int) -> Any:
    """Return torch's ONNX program: inputs, outputs and open sizes named as ours, without the exporter's notes.

    Args:
        program: what is deployed.
        opset: of the ONNX standard.

    Raises:
        ExportError: the exporter gives nothing.
    """
    with _quiet():
        written = torch.onnx.export(
            program.exported,
            (),
            None,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=onnx_translations() | attention_translation(),
            input_names=[spec.name for spec in program.inputs],
            output_names=[spec.name for spec in program.outputs],
            verbose=False,
        )
    if written is None:
        raise ExportError("torch.onnx.export returned nothing")
    fuse_pads(written.model.graph)
    _tidy(written.model.graph, program)
    return written


def layer_values(
    program: Program, opset: int, inputs: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Compute what every layer of a program should be, by the names that its ONNX graph has for it.

    Args:
        program: what was written.
        opset: with which it was written: the same decompositions give the same names.
        inputs: of the program, in order.

    Returns:
        Values by the name of the layer, and the name in the ONNX graph -> the name of the layer.
    """
    reference = to_onnx(program, opset).exported_program
    recorder = _Recorder(reference.module(check_guards=False))
    with torch.no_grad():
        recorder.run(*inputs)
    (end,) = reference.graph.find_nodes(op="output")
    layers = {name: name for name in recorder.record}
    layers |= {spec.name: node.name for spec, node in zip(program.outputs, end.args[0], strict=True)}
    return recorder.record, layers


def first_apart(
    found: Iterable[tuple[str, Any]], values: dict[str, torch.Tensor], layers: dict[str, str], tolerance: float
) -> str:
    """Return the first layer whose value in a runtime is not torch's, or ``""``.

    Args:
        found: name in the ONNX graph and the runtime's value, an array, in the order of computation.
        values: torch's, by name of the layer.
        layers: name in the ONNX graph -> name of the layer.
        tolerance: the largest relative error of a value.
    """
    for name, array in found:
        # integers as numbers: one that is rounded the other way is a small error too
        value = torch.from_numpy(array.copy())
        error = relative_error(value.double(), values[layers[name]].cpu().double())
        if error > tolerance:
            return f"first layer that differs: {layers[name]} (error {error:.1e})"
    return ""


def _tidy(graph: Any, program: Program) -> None:
    """Give open sizes our names, and drop the exporter's notes: half the file, with paths of the user's disk."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, program.inputs, strict=True):
        names |= {str(dim): size for dim, size in zip(value.shape, spec.shape, strict=True) if isinstance(size, str)}
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    nodes = list(graph.all_nodes())
    for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
        for place, dim in enumerate(value.shape or ()):
            if symbol is not None and symbol.search(str(dim)):
                value.shape[place] = symbol.sub(lambda match: names[match[0]], str(dim))
    for node in nodes:
        node.metadata_props.clear()


def feeds(session: Any, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the inputs of an ONNX Runtime session by name, as arrays."""
    names = [value.name for value in session.get_inputs()]
    return {name: value.detach().cpu().contiguous().numpy() for name, value in zip(names, inputs, strict=True)}


class _Recorder(fx.Interpreter):
    """Run a graph and keep every tensor by node name."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.record: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.record[n.name] = value.detach().clone()
        return value


@contextmanager
def _quiet() -> Generator[None]:
    """Keep torch.onnx from logging that torchvision is absent, and from warning of how it copies a tree spec."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
