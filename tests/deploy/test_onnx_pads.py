"""Zeros around an image become padding of the convolution, also where the image is rounded in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchopt_passes as top

onnx = pytest.importorskip("onnx")


class Padded(nn.Module):
    """Convolutions as TensorFlow's SAME has them: one more row and column behind the image than in front of it."""

    def __init__(self, value: float = 0.0, *, shared: bool = False, channels: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.value, self.shared, self.channels = nn.Conv2d(3, 8, 3, padding=1), value, shared, channels
        self.second = nn.Conv2d(9 if channels else 8, 8, 3, stride=2, padding=(1, 0))
        self.third = nn.Conv2d(8, 4, 3, stride=2, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = (0, 1, 1, 2) + ((0, 1) if self.channels else ())
        x = nn.functional.pad(self.first(x).relu(), pads, value=self.value)
        y = self.third(nn.functional.pad(self.second(x).relu(), (0, 1, 0, 1)))
        return y.mean((2, 3)) + x.mean((1, 2, 3)).unsqueeze(1) if self.shared else y.mean((2, 3))


def written(module: nn.Module, path: Path, **options: object) -> tuple[top.Artifact, list[str], list[list[int]]]:
    x = torch.randn(2, 3, 15, 15)
    artifact = top.export(module.eval(), path, example_inputs=(x,), **options)  # pyright: ignore[reportArgumentType]
    nodes = list(onnx.load(path).graph.node)
    pads = [list(a.ints) for n in nodes if n.op_type == "Conv" for a in n.attribute if a.name == "pads"]
    return artifact, [node.op_type for node in nodes], pads


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_zeros_are_padding_of_the_convolution(int8: bool, tmp_path: Path) -> None:
    module = Padded().eval()
    data = [(torch.randn(4, 3, 15, 15),) for _ in range(2)]
    options = {"quantization": "int8", "calibration": data} if int8 else {}
    artifact, kinds, pads = written(module, tmp_path / "file.onnx", **options)
    assert "Pad" not in kinds
    assert pads == [[1, 1, 1, 1], [1 + 1, 0, 1 + 2, 1], [0, 0, 1, 1]]  # top, left, bottom, right
    assert kinds.count("QuantizeLinear") == 4 * int8  # each value once, not on both sides of its pad
    x = torch.randn(3, 3, 15, 15)
    with torch.no_grad():
        wanted = module(x)
    error = (artifact(x) - wanted).norm() / wanted.norm()
    assert error < (0.05 if int8 else 1e-6)


@pytest.mark.parametrize(
    ("options", "left"), [({"value": 1.0}, 1), ({"shared": True}, 1), ({"channels": True}, 1)], ids=str
)
def test_other_pads_stay(options: dict[str, object], left: int, tmp_path: Path) -> None:
    module = Padded(**options).eval()  # pyright: ignore[reportArgumentType]
    artifact, kinds, _ = written(module, tmp_path / "file.onnx")
    assert kinds.count("Pad") == left
    x = torch.randn(3, 3, 15, 15)
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), module(x), rtol=0, atol=2e-6)


def test_openvino_computes_the_image_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x, data = torch.randn(2, 3, 15, 15), [(torch.randn(4, 3, 15, 15),) for _ in range(2)]
    artifact = top.export(
        Padded().eval(), tmp_path / "file.xml", example_inputs=(x,), quantization="int8", calibration=data
    )
    kernels = artifact.report()["kernels"]
    assert "Pad" not in kernels
    assert "FakeQuantize u8 1" in kernels or "FakeQuantize f32 1" in kernels  # the input's alone
