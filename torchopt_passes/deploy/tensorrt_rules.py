"""What TensorRT asks of an explicitly quantized ONNX file, and of weights that are to run as 2:4 sparse ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchopt_passes.errors import ConfigError, ExportError

__all__ = ["check_quantization", "check_sparsity"]

_ROUNDS = ("QuantizeLinear", "DequantizeLinear")


class _Weight(NamedTuple):
    """The constant that a layer multiplies with: its axes of outputs and inputs, and what rounds it on the way."""

    name: str
    values: Any
    layer: str
    output: int
    input: int
    rounded: tuple[tuple[Any, int], ...]  # quantize / dequantize nodes, and their axis of outputs


class _File:
    """An ONNX graph by its names."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.graph: Any = onnx.load(str(path)).graph
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in self.graph.initializer}
        self.readers: dict[str, list[str]] = {}
        self.made: dict[str, Any] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)
            self.made |= dict.fromkeys(node.output, node)
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _attribute(node, "value", None)

    def array(self, name: str) -> Any:
        """Return a constant as an array, None where the name is none."""
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def weights(self) -> Iterator[_Weight]:
        """Yield the weights of convolutions and products."""
        for node in self.graph.node:
            axes = _axes(node)
            if axes is None:
                continue
            name, rounded = node.input[1], list[tuple[Any, int]]()
            while name not in self.constants and name in self.made:
                above = self.made[name]
                if above.op_type == "Transpose":
                    order = _attribute(above, "perm", None) or (1, 0)
                    axes = (order[axes[0]], order[axes[1]])
                elif above.op_type in _ROUNDS:
                    rounded.append((above, axes[0]))
                elif above.op_type != "Identity":
                    break
                name = above.input[0]
            values = self.array(name)
            if values is not None and values.ndim >= 2:
                output, inner = (axis % values.ndim for axis in axes)
                yield _Weight(name, values, node.op_type, output, inner, tuple(rounded))


def check_quantization(path: Path) -> None:
    """Check what TensorRT asks of explicit quantization.

    Args:
        path: of the ONNX file.

    Raises:
        ExportError: a zero point that is not 0, another integer type than int8, a scale that is computed or not
            positive, an activation by channel, a weight by a dimension that is not its output, or a quantize node whose
            integers are read by anything but dequantize nodes; names the node.
    """
    file = _File(path)
    weights = {node.output[0]: (weight, axis) for weight in file.weights() for node, axis in weight.rounded}
    for node in file.graph.node:
        if node.op_type in _ROUNDS:
            _check_grid(file, node)
            scale = file.array(node.input[1])
            if scale.size > 1 and node.input[0] not in file.constants and node.output[0] not in weights:
                raise ExportError(f"{node.name}: TensorRT rounds activations by tensor, here are {scale.size} scales")
            if scale.size > 1 and node.output[0] in weights:
                weight, output = weights[node.output[0]]
                axis = _attribute(node, "axis", 1) % weight.values.ndim
                if scale.ndim > 1 or axis != output % weight.values.ndim:
                    raise ExportError(
                        f"{node.name}: TensorRT wants the scales of {weight.name} by its outputs (axis "
                        f"{output % weight.values.ndim} of {weight.values.shape} for {weight.layer}), not axis {axis}"
                    )
        if node.op_type == "QuantizeLinear":
            strange = set(file.readers.get(node.output[0], [])) - {"DequantizeLinear"}
            if strange:
                raise ExportError(f"{node.name}: its integers are read by {sorted(strange)}, not dequantized first")


def check_sparsity(path: Path, claimed: bool | Sequence[str], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Check that weights are 2:4 sparse as they are in the file: two zeros in every four inputs of each output.

    Args:
        path: of the ONNX file.
        claimed: name patterns of parameters; True for every weight of a convolution or product whose number of inputs
            is a multiple of 4.
        state: of the program, to name weights that the exporter has renamed.

    Returns:
        The names of the claimed weights.

    Raises:
        ConfigError: a pattern names no such weight.
        ExportError: a claimed weight is not 2:4 sparse; names it, and the first four inputs that are not.
    """
    found: list[str] = []
    names: set[str] = set()
    for weight in _File(path).weights():
        name = _name_of(weight, state)
        names.add(name)
        wanted = claimed is True or (claimed and any(fnmatchcase(name, pattern) for pattern in claimed))
        if not wanted or weight.layer == "ConvTranspose":
            continue
        inputs = weight.values.shape[weight.input]
        if inputs % 4 == 0:
            _check_groups(name, weight)
            found.append(name)
        elif claimed is not True:
            raise ExportError(f"sparse_weights: {name} has {inputs} inputs, and 2:4 needs a multiple of 4")
    patterns = () if isinstance(claimed, bool) else claimed
    if unused := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in found)]:
        raise ConfigError(f"sparse_weights: no weight is called {unused[0]!r}; there are {sorted(names)}")
    return list(dict.fromkeys(found))


def _check_groups(name: str, weight: _Weight) -> None:
    values = torch.from_numpy(weight.values.copy()).movedim((weight.output, weight.input), (0, -1))
    counts = (values != 0).unflatten(-1, (-1, 4)).sum(-1)
    wrong = (counts > 2).nonzero()
    if len(wrong):
        output, group = int(wrong[0][0]), int(wrong[0][-1])
        raise ExportError(
            f"sparse_weights: {name} is not 2:4 sparse in the file: of output {output}, inputs {4 * group} to "
            f"{4 * group + 3} hold {int(counts[tuple(wrong[0])])} non-zeros; so do {len(wrong)} of {counts.numel()} "
            'groups. Prune it by PruneWeights(pattern="2:4") and keep its zeros, or name the weights that are sparse: '
            'sparse_weights=("encoder.*.weight",)'
        )


def _check_grid(file: _File, node: Any) -> None:
    import onnx

    zero = node.input[2] if len(node.input) > 2 else ""
    kind = file.constants[zero].data_type if zero in file.constants else _attribute(node, "output_dtype", 0)
    typed = node.op_type == "DequantizeLinear" and not zero
    if (zero and zero not in file.constants) or not (typed or kind == onnx.TensorProto.INT8):
        raise ExportError(f"{node.name}: TensorRT takes int8 with zero point 0 alone")
    if zero and file.array(zero).any():
        raise ExportError(f"{node.name}: TensorRT takes int8 with zero point 0 alone")
    scale = file.array(node.input[1])
    if scale is None or not (scale > 0).all():
        raise ExportError(f"{node.name}: TensorRT takes scales that are constant and positive alone")


def _axes(node: Any) -> tuple[int, int] | None:
    """Return the axes of outputs and inputs of a layer's weight, None for another operation."""
    if node.op_type == "Gemm":
        return (0, 1) if _attribute(node, "transB", 0) else (1, 0)
    return {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (-1, -2)}.get(node.op_type)


def _name_of(weight: _Weight, state: Mapping[str, torch.Tensor]) -> str:
    """Return a weight's name in the model; the exporter renames those that it has transposed."""
    if weight.name in state:
        return weight.name
    turned = torch.from_numpy(weight.values.copy()).transpose(weight.output, weight.input)
    return next((name for name, tensor in state.items() if torch.equal(tensor.detach().cpu(), turned)), weight.name)


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    found = [attribute for attribute in node.attribute if attribute.name == name]
    return helper.get_attribute_value(found[0]) if found else default
