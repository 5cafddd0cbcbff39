"""From a float model to an int8 file in one call, for each target by its own grids."""

from __future__ import annotations

import copy
import platform
from pathlib import Path

import pytest
import torch

import torchopt_passes as top
from tests.deploy.sources import bert, plain
from tests.graph.quantization.test_scale_outputs import encoder
from torchopt_passes.deploy import export, open_artifact
from torchopt_passes.deploy.cpu import SATURATING_TARGETS, saturates
from torchopt_passes.deploy.quantized import quantized
from torchopt_passes.errors import ConfigError, ExportError

TARGETS = {"inductor": "m.pt2", "onnx": "m.onnx", "openvino": "m.xml", "tensorrt": "m.onnx"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [plain, bert])
def test_one_call(tmp_path: Path, target: str, source: object) -> None:
    module, inputs = source()  # pyright: ignore
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    before = copy.deepcopy(module.state_dict())
    artifact = export(
        module,
        tmp_path / TARGETS[target],
        target,
        example_inputs=inputs,
        quantization="int8",
        calibration=[inputs],
        dynamic=True,
    )
    again = open_artifact(artifact.path)
    assert again.metadata.target == target
    assert again.metadata.precision == "int8"
    int8 = {"conv2d int8": 3, "linear int8": 1} if source is plain else {"linear int8": 14}
    assert int8.items() <= again.metadata.layers.items()
    with torch.no_grad():
        found, expected = again(**inputs), module.eval()(**inputs)
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    assert isinstance(found, torch.Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    for batch in (1, 8):
        sized = {name: value[:1].expand(batch, *value.shape[1:]).contiguous() for name, value in inputs.items()}
        with torch.no_grad():
            one, many = again(**sized), module(**sized)
        many = many if isinstance(many, torch.Tensor) else many.logits
        assert float((one - many).norm() / many.norm()) < 0.05  # pyright: ignore


def test_what_it_needs(tmp_path: Path) -> None:
    module, inputs = plain()
    path = tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="needs calibration="):
        export(module, path, example_inputs=inputs, quantization="int8")
    with pytest.raises(ConfigError, match=r'calibration= is for quantization="int8"'):
        export(module, path, example_inputs=inputs, calibration=[inputs])
    with pytest.raises(ConfigError, match='must be "int8"'):
        export(module, path, example_inputs=inputs, calibration=[inputs], quantization="int4")  # pyright: ignore
    graph = top.capture(module, kwargs=inputs)
    top.InsertFakeQuant(target="onnx")(graph)
    with pytest.raises(ConfigError, match="is quantized already"):
        export(graph, path, quantization="int8", calibration=[inputs])
    assert not list(tmp_path.iterdir())


def test_weights_have_7_bits_where_the_cpu_would_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = plain()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for vnni in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda vnni=vnni: {"avx2": True, "avx512_vnni": vnni})
        assert [row["target"] for row in top.targets() if saturates(row["target"])] == (
            [] if vnni else sorted(SATURATING_TARGETS)
        )
        graph = quantized(module, "onnx", "int8", inputs, [inputs])
        weights = [value for value in graph.state_dict().values() if value.dtype is torch.int8]
        assert weights
        assert {int(weight.abs().max()) for weight in weights} == {127 if vnni else 63}


def test_tensorrt_refuses_grids_that_it_lacks(tmp_path: Path) -> None:
    module, inputs = plain()
    graph = top.capture(module, kwargs=inputs)
    steps = top.Pipeline(top.InsertFakeQuant(target="onnx", qat=False), top.Calibrate(), top.ConvertQuantized())
    steps(graph, top.PassContext(calibration=[inputs]))
    with pytest.raises(ExportError, match="is symmetric about zero"):
        export(graph, tmp_path / "m.onnx", "tensorrt")
    with pytest.raises(ConfigError, match="cannot run uint8 activations"):
        top.InsertFakeQuant(target="tensorrt", activation_symmetric=False)
    assert not list(tmp_path.iterdir())


def test_tensorrt_files_are_explicitly_quantized_and_symmetric(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    module, inputs = plain()
    artifact = export(
        module, tmp_path / "m.onnx", "tensorrt", example_inputs=inputs, quantization="int8", calibration=[inputs]
    )
    graph = onnx.load(str(artifact.path)).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [constants[n.input[2]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(zeros) >= 8
    assert all(str(zero.dtype) == "int8" and not zero.any() for zero in zeros)
    convs = {n.output[0]: n for n in graph.node if n.op_type == "Conv"}
    assert len(convs) == 3
    made = {name: node for node in graph.node for name in node.output}
    for conv in convs.values():
        assert [made[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2


@pytest.mark.filterwarnings("ignore")  # of the converters
@pytest.mark.parametrize(
    ("target", "name", "needs"),
    [("litert", "m.tflite", "litert_torch"), ("executorch", "m.pte", "executorch"), ("openvino", "m.xml", "openvino")],
)
def test_large_channels_of_a_residual_stream(tmp_path: Path, target: str, name: str, needs: str) -> None:
    pytest.importorskip(needs)
    model, batches = encoder()
    x = batches[0][0]
    artifact = export(model, tmp_path / name, target, example_inputs=(x,), quantization="int8", calibration=batches)
    with torch.no_grad():
        found, expected = artifact(x), model(x)
    assert isinstance(found, torch.Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.03
