"""OpenVINO at half precision: 16-bit arithmetic is judged as such, and 16-bit weights take half the file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.deploy.sources import get
from torchopt_passes.deploy import Artifact, OpenVinoTarget, export, open_artifact
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.verify import DEFAULT_TOLERANCE
from torchopt_passes.errors import ExportError, VerificationError

pytest.importorskip("openvino", reason="needs pip install 'torchopt_passes[openvino]'")

# "float16" too is computed in bfloat16 by CPUs that have this alone
BFLOAT16 = {"precision": "bfloat16"}
FLOAT16 = {"weights": "float16"}


def written(name: str, path: Path, options: dict[str, str]) -> Artifact:
    module, inputs = get(name)
    return export(module, path, example_inputs=inputs, **options)


@pytest.mark.parametrize("name", ["plain", "bert"])
@pytest.mark.parametrize(
    ("options", "precision"), [(BFLOAT16, "bfloat16"), (FLOAT16, "float16"), (BFLOAT16 | FLOAT16, "bfloat16")]
)
def test_half_precision(tmp_path: Path, name: str, options: dict[str, str], precision: str) -> None:
    artifact = written(name, tmp_path / "m.xml", options)
    assert artifact.metadata.precision == precision
    figures = artifact.metadata.verification
    assert figures["tolerance"] == DEFAULT_TOLERANCE[precision]
    # beyond float32's tolerance where the values really have 16 bits, and well within their own
    assert figures["error"] < 0.02 if "precision" in options else figures["error"] < 0.002
    again = open_artifact(artifact.path)
    module, inputs = get(name)
    assert again.verify(module, inputs).tolerance == DEFAULT_TOLERANCE[precision]
    call = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(again(**call), artifact(**call))  # pyright: ignore
    assert again.metadata == artifact.metadata


@pytest.mark.parametrize("name", ["plain", "bert"])
def test_float16_weights_take_half_the_file(tmp_path: Path, name: str) -> None:
    whole, half = (written(name, tmp_path / f"{len(options)}.xml", options) for options in ({}, FLOAT16))
    sizes = [artifact.files[1].stat().st_size for artifact in (whole, half)]
    # the indices and constants of the graph are integers, and stay
    assert sizes[1] <= (0.501 if name == "plain" else 0.51) * sizes[0]


def test_a_batch_norm_of_a_mean_has_the_scales_of_its_channels(tmp_path: Path) -> None:
    """The runtime (2026.4) takes the norm and the rounding into the mean, and takes wrong channels then."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.fc(x).mean(1)))

    torch.manual_seed(0)
    model = Pooled().eval()
    nn.init.uniform_(model.norm.weight, 0.2, 3.0)
    nn.init.normal_(model.norm.bias)
    x = torch.randn(100, 5, 8)
    artifact = export(model, tmp_path / "m.xml", example_inputs=x[:2], quantization="int8", calibration=[x])
    assert artifact.metadata.layers == {"linear int8": 2}
    found, expected = artifact(x), model(x).detach()
    assert isinstance(found, torch.Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(torch.cat([artifact(row) for row in x.split(20)]), found)  # pyright: ignore


class Patches(nn.Module):
    """The first block of a vision transformer: its convolution and its linears have as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up, self.down = (
            nn.Conv2d(3, 32, 4, 4),
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def test_vision_transformers_compute_in_integers(tmp_path: Path) -> None:
    """The runtime (2026.4) computes in float with weights whose zero points layers of other ranks share."""
    torch.manual_seed(0)
    model, x = Patches().eval(), torch.randn(16, 3, 32, 32)
    artifact = export(model, tmp_path / "m.xml", example_inputs=x[:2], quantization="int8", calibration=[x])
    assert artifact.metadata.layers == {"attention int8": 1, "conv2d int8": 1, "linear int8": 4}
    kernels = artifact.report()["kernels"]
    assert "FullyConnected" in kernels and "Convolution" in kernels
    assert "FullyConnected f32" not in kernels and "Convolution f32" not in kernels, kernels
    found, expected = artifact(x), model(x).detach()
    assert isinstance(found, torch.Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_patches_of_a_convolution_are_gathered(tmp_path: Path) -> None:
    """The runtime (2026.4) does not compile a gather with indices of two dims behind an int8 convolution."""

    class Unfolded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1, bias=False), nn.LayerNorm(16), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(nn.functional.unfold(self.conv(x), 2, stride=2).transpose(1, 2)))

    torch.manual_seed(0)
    model, x = Unfolded().eval(), torch.randn(16, 3, 8, 8)
    artifact = export(model, tmp_path / "m.xml", example_inputs=x[:2], quantization="int8", calibration=[x])
    assert artifact.metadata.layers == {"conv2d int8": 1, "linear int8": 1}
    found, expected = artifact(x), model(x).detach()
    assert isinstance(found, torch.Tensor)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_the_text_of_a_file_has_no_indentation_and_limits_once(tmp_path: Path) -> None:
    import openvino

    text = written("int8_plain", tmp_path / "m.xml", {}).path.read_text()
    assert "\n\t" not in text and ">  <" not in text
    rounded = [
        op for op in openvino.Core().read_model(tmp_path / "m.xml").get_ops() if op.get_type_name() == "FakeQuantize"
    ]
    assert len(rounded) >= 3
    for op in rounded:
        limits = [op.input_value(place).get_node().get_friendly_name() for place in (1, 2, 3, 4)]
        assert limits[:2] == limits[2:] and limits[0] != limits[1]


def test_int8_is_judged_as_int8(tmp_path: Path) -> None:
    assert written("int8_plain", tmp_path / "m.xml", BFLOAT16 | FLOAT16).metadata.precision == "int8"


def test_layers_are_compared_as_they_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that differs is the wrong one, not the first that is rounded to 16 bits."""
    write = OpenVinoTarget.write
    module, inputs = get("plain")
    wrong = copy.deepcopy(module)
    wrong.get_submodule("c3").bias.data += 10  # pyright: ignore

    def tampered(self: OpenVinoTarget, program: Program, path: Path) -> dict[str, str]:
        from torchopt_passes.deploy.program import read_program

        return write(self, read_program(wrong, inputs), path)

    monkeypatch.setattr(OpenVinoTarget, "write", tampered)
    with pytest.raises(VerificationError, match=r"first layer that differs: conv2d_2 \(error"):
        export(module, tmp_path / "m.xml", example_inputs=inputs, **BFLOAT16)
    assert not list(tmp_path.iterdir())


def test_models_in_bfloat16_are_refused_with_the_way_out(tmp_path: Path) -> None:
    module, inputs = get("plain")
    call = {"x": inputs["x"].bfloat16()}
    with pytest.raises(ExportError, match=r'give it a float32 model and precision="bfloat16"'):
        export(copy.deepcopy(module).bfloat16(), tmp_path / "m.xml", example_inputs=call)
    assert not list(tmp_path.iterdir())
