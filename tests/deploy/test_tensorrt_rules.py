"""TensorRT's rules, on files that break them: the node or the parameter is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.deploy.sources import plain
from torchopt_passes.deploy.tensorrt_rules import check_quantization
from torchopt_passes.errors import ConfigError, ExportError

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, inputs = plain()
    path = tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    return top.export(module, path, "tensorrt", example_inputs=inputs, quantization="int8", calibration=[inputs]).path


def node_of(graph: Any, op: str, first: str) -> Any:
    return next(node for node in graph.node if node.op_type == op and node.input[0].startswith(first))


def replace(graph: Any, node: Any, place: int, values: torch.Tensor) -> None:
    name = f"new_{place}"
    graph.initializer.append(onnx.numpy_helper.from_array(values.numpy(), name))
    if place < len(node.input):
        node.input[place] = name


def by_inputs(graph: Any) -> None:  # c2 has as many inputs as outputs, so that shapes tell nothing
    node_of(graph, "DequantizeLinear", "c2.weight").attribute[0].i = 1


def transposed(graph: Any) -> None:
    weight = next(tensor for tensor in graph.initializer if tensor.name == "fc.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T.copy(), "fc.weight"))
    gemm = next(node for node in graph.node if node.op_type == "Gemm")
    next(attribute for attribute in gemm.attribute if attribute.name == "transB").i = 0


def by_channel(graph: Any) -> None:
    node = node_of(graph, "QuantizeLinear", "x")
    replace(graph, node, 1, torch.ones(3))
    replace(graph, node, 2, torch.zeros(3, dtype=torch.int8))


def shifted(graph: Any) -> None:
    replace(graph, node_of(graph, "QuantizeLinear", "x"), 2, torch.tensor(3, dtype=torch.int8))


def unsigned(graph: Any) -> None:
    replace(graph, node_of(graph, "QuantizeLinear", "x"), 2, torch.tensor(0, dtype=torch.uint8))


def untyped(graph: Any) -> None:  # uint8, by the standard
    del node_of(graph, "QuantizeLinear", "x").input[2]


def computed(graph: Any) -> None:
    node_of(graph, "QuantizeLinear", "x").input[1] = "computed"


def negative(graph: Any) -> None:
    replace(graph, node_of(graph, "QuantizeLinear", "x"), 1, torch.tensor(-1.0))


def integers(graph: Any) -> None:
    graph.node.append(onnx.helper.make_node("Relu", [node_of(graph, "QuantizeLinear", "x").output[0]], ["odd"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (by_inputs, r"scales of c2.weight by its outputs \(axis 0 of \(64, 64, 3, 3\) for Conv\), not axis 1"),
        (transposed, r"scales of fc.weight by its outputs \(axis 1 of \(128, 10\) for Gemm\), not axis 0"),
        (by_channel, r"TensorRT rounds activations by tensor, here are 3 scales"),
        (shifted, r"int8 with zero point 0 alone"),
        (unsigned, r"int8 with zero point 0 alone"),
        (untyped, r"int8 with zero point 0 alone"),
        (computed, r"scales that are constant and positive alone"),
        (negative, r"scales that are constant and positive alone"),
        (integers, r"its integers are read by \['Relu'\], not dequantized first"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_file_that_breaks_a_rule_is_refused(
    file: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    check_quantization(file)
    model = onnx.load(str(file))
    change(model.graph)
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match=message):
        check_quantization(tmp_path / "m.onnx")


class Mlp(nn.Module):
    """Linears on three dims: their weights are transposed and renamed in a float file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def sparse(module: nn.Module, inputs: dict[str, torch.Tensor]) -> nn.Module:
    module = copy.deepcopy(module)
    graph = top.capture(module, kwargs=inputs)
    top.PruneWeights(pattern="2:4")(graph)
    return module


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}], ids=["float32", "int8"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_claimed_2_4_sparsity_is_checked_in_the_file(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    dense, inputs = plain() if kind == "cnn" else (Mlp().eval(), {"x": torch.randn(2, 5, 6)})
    # the first layers have 3 and 6 inputs
    names, layer, count = (
        (["c2.weight", "c3.weight", "fc.weight"], "c2", 36864 // 4)
        if kind == "cnn"
        else (
            ["b.weight", "c.weight"],
            "b",
            512 // 4,
        )
    )
    options = options | ({"calibration": [inputs]} if options else {})
    module = sparse(dense, inputs)

    def export(claimed: bool | tuple[str, ...]) -> top.Artifact:
        return top.export(
            module, tmp_path / "m.onnx", "tensorrt", example_inputs=inputs, sparse_weights=claimed, **options
        )

    assert export(True).report()["sparse weights"] == ", ".join(names)
    assert export(False).report()["sparse weights"] == ""
    weight = module.get_parameter(f"{layer}.weight")
    with torch.no_grad():
        weight[5, 8:11] = 0.05
    spots = weight[0, 0].numel()
    export(tuple(name for name in names if name != f"{layer}.weight"))  # what is not claimed may be dense
    before = (tmp_path / "m.onnx").read_bytes()
    for claimed in (True, (f"{layer}.*",)):
        message = (
            rf"sparse_weights: {layer}.weight is not 2:4 sparse in the file: of output 5, inputs 8 to 11 hold [34] "
            rf"non-zeros; so do {spots} of {count} groups"
        )
        with pytest.raises(ExportError, match=message):
            export(claimed)
    with pytest.raises(ConfigError, match=r"no weight is called 'odd'; there are \["):
        export(("odd",))
    first = "c1.weight has 3" if kind == "cnn" else "a.weight has 6"
    with pytest.raises(ExportError, match=rf"{first} inputs, and 2:4 needs a multiple of 4"):
        export((first.partition(" ")[0],))
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
