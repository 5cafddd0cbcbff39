"""Zeros around an image are the SAME padding of the convolution in LiteRT files, where it pads as much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchopt_passes as top

pytest.importorskip("litert_torch", reason="needs pip install 'torchopt_passes[litert]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # what the converter and jax warn of is not ours to change


class Padded(nn.Module):
    """TensorFlow's SAME: of an image that a convolution made, and of one that comes from outside."""

    def __init__(
        self, first: tuple[int, ...], second: tuple[int, ...], kernel: int = 5, *, shared: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pads, self.shared = (first, second), shared
        self.one = nn.Conv2d(3, 8, 3, stride=2)
        self.two = nn.Conv2d(8, 8, kernel, stride=2, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(nn.functional.pad(x, self.pads[0])).relu()
        wide = nn.functional.pad(x, self.pads[1])
        y = self.two(wide).mean((2, 3))
        return y + wide.mean((2, 3)) if self.shared else y


def written(module: nn.Module, path: Path, *, int8: bool) -> tuple[str, float]:
    """Return what the file holds, and how far it is from the module."""
    x, data = torch.randn(1, 3, 32, 30), [(torch.randn(1, 3, 32, 30),) for _ in range(4)]
    options = {"quantization": "int8", "calibration": data} if int8 else {}
    artifact = top.export(module.eval(), path, example_inputs=(x,), **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        wanted = module(x)
    return artifact.report()["kernels"], float((artifact(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_zeros_are_padding_of_the_convolution(int8: bool, tmp_path: Path) -> None:
    # 32 x 30 -> 16 x 15: k = 5, s = 2 pads 1 and 2 of 16, 2 and 2 of 15
    kernels, error = written(Padded((0, 1, 0, 1), (2, 2, 1, 2)), tmp_path / "file.tflite", int8=int8)
    assert "PAD" not in kernels
    # of the input, and in front of the mean
    assert [kind for kind in kernels.split(", ") if "TRANSPOSE" in kind] == [
        "TRANSPOSE int8 2" if int8 else "TRANSPOSE 2"
    ]
    assert error < (0.05 if int8 else 1e-6)


@pytest.mark.parametrize(
    "module",
    [
        Padded((0, 1, 0, 1), (2, 1, 2, 2)),
        Padded((1, 0, 0, 1), (2, 2, 1, 2)),
        Padded((0, 1, 0, 1), (2, 2, 1, 2), shared=True),
    ],
    ids=["another side, behind", "another side, in front", "read twice"],
)
def test_other_pads_stay(module: Padded, tmp_path: Path) -> None:
    kernels, error = written(module, tmp_path / "file.tflite", int8=False)
    assert "PAD 1" in kernels
    assert error < 1e-6


def test_an_open_batch_is_given_up_before_the_converter_is_asked(tmp_path: Path) -> None:
    artifact = top.export(
        Padded((0, 1, 0, 1), (2, 2, 1, 2)).eval(), tmp_path / "file.tflite", example_inputs=(torch.randn(2, 3, 32, 30),)
    )
    assert "a pad of an open batch" in artifact.report()["sizes"]
