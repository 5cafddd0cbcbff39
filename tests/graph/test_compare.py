"""Per-layer SQNR against the formula, on graphs before and after quantization."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.models import ConvResidual, build
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.compare import layer_sqnr
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant


def db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return 10 * math.log10(float((expected**2).sum()) / float(((actual - expected) ** 2).sum()))


def test_equal_graphs_are_infinitely_close() -> None:
    graph_module = capture(ConvResidual().eval(), (torch.randn(2, 3, 8, 8),))
    rows = layer_sqnr(graph_module, copy.deepcopy(graph_module))
    assert [row.layer for row in rows] == ["stem", "conv", "depthwise", "fc", ""]
    assert [row.kind for row in rows] == ["conv2d", "conv2d", "conv2d", "linear", "output"]
    assert all(row.sqnr == math.inf for row in rows)


def test_numbers_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    graph_module = capture(model, (x,))
    other = copy.deepcopy(graph_module)
    with torch.no_grad():
        other.get_parameter("0.weight").add_(0.01)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.add_(0.01)
        first, second, output = layer_sqnr(graph_module, other, x)
        assert first.sqnr == pytest.approx(db(changed[0](x), model[0](x)), abs=1e-6)
        assert second.sqnr == pytest.approx(db(changed(x), model(x)), abs=1e-6)
    assert output.sqnr == second.sqnr
    assert (output.kind, output.node) == ("output", "0")


@pytest.mark.parametrize("convert", [False, True])
def test_int8_with_folded_batch_norms(convert: bool) -> None:
    model, (x,) = build("conv_residual")  # its statistics are far from 0 and 1, so that a fold matters
    reference = capture(model.eval(), (x,))
    other = copy.deepcopy(reference)
    passes = [InsertFakeQuant(target="onnx"), Calibrate(), *([ConvertQuantized()] if convert else [])]
    for item in passes:
        item(other, PassContext(calibration=[x]))
    rows = {row.layer: row for row in layer_sqnr(reference, other, (x,))}
    assert set(rows) == {"stem", "conv", "depthwise", "fc", ""}
    for row in rows.values():
        assert row.sqnr is not None, row
        assert 20 < row.sqnr < 80, row
    assert bool(rows["stem"].note) is convert


def test_what_the_other_graph_does_not_have_is_said() -> None:
    x = torch.randn(2, 4)
    reference = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (x,))
    other = capture(nn.Sequential(nn.Linear(4, 4)), (x,))
    rows = layer_sqnr(reference, other)
    assert rows[1].sqnr is None
    assert rows[1].note == "not in the other graph"


def test_shapes_that_differ_are_said() -> None:
    x = torch.randn(2, 4)
    reference, other = (capture(nn.Linear(4, n), (x,)) for n in (3, 5))
    rows = layer_sqnr(reference, other)
    assert rows[0].sqnr is None
    assert rows[0].note == "its shape differs"


def test_without_inputs() -> None:
    graph_module = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    del graph_module.meta["example_inputs"]
    with pytest.raises(ConfigError, match="needs inputs"):
        layer_sqnr(graph_module, graph_module)


def test_another_operation_of_the_same_name_is_not_compared() -> None:
    reference = capture(nn.Linear(4, 4, bias=False).eval(), (torch.randn(2, 4),))
    other = copy.deepcopy(reference)
    (node,) = other.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    node.target = torch.ops.aten.matmul.default
    other.recompile()
    row, output = layer_sqnr(reference, other)
    assert (row.node, row.sqnr, row.note) == (node.name, None, "not in the other graph")
    assert output.sqnr is not None and output.sqnr < 10
