"""A file that does not compute what the model computes is never put in place, and neither is half a file."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.sources import get
from torchopt_passes import PassContext, capture
from torchopt_passes.deploy import OnnxTarget, export
from torchopt_passes.deploy.base import target_types
from torchopt_passes.deploy.files import staged
from torchopt_passes.deploy.noise import rounding_noise
from torchopt_passes.deploy.program import Program
from torchopt_passes.deploy.verify import Verification, beyond_noise, compare
from torchopt_passes.errors import ExportError, VerificationError
from torchopt_passes.graph.quantization.calibrate import Calibrate
from torchopt_passes.graph.quantization.convert_quantized import ConvertQuantized
from torchopt_passes.graph.quantization.insert_fake_quant import InsertFakeQuant


def tamper(path: Path, name: str) -> None:
    """Change one weight of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            array.flat[0] += 10
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("source", "weight", "layer"), [("plain", "c2.weight", "conv2d_1"), ("plain", "fc.bias", "linear")]
)
def test_a_wrong_file_is_refused_by_its_first_wrong_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, weight: str, layer: str
) -> None:
    write = OnnxTarget.write

    def wrong(self: OnnxTarget, program: Program, path: Path) -> dict[str, str]:
        facts = write(self, program, path)
        tamper(path, weight)
        return facts

    monkeypatch.setattr(OnnxTarget, "write", wrong)
    module, inputs = get(source)
    (tmp_path / "m.onnx").write_bytes(b"the file before")
    message = (
        rf"is not what Cnn computes: error \d.*SQNR.*first layer that differs: {layer} \(error.*No file was written"
    )
    with pytest.raises(VerificationError, match=message):
        export(module, tmp_path / "m.onnx", example_inputs=inputs)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"the file before"


def test_verify_false_writes_it_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = OnnxTarget.write

    def wrong(self: OnnxTarget, program: Program, path: Path) -> dict[str, str]:
        facts = write(self, program, path)
        tamper(path, "fc.bias")
        return facts

    monkeypatch.setattr(OnnxTarget, "write", wrong)
    module, inputs = get("plain")
    artifact = export(module, tmp_path / "m.onnx", example_inputs=inputs, verify=False)
    assert artifact.metadata.verification == {}
    with pytest.raises(VerificationError):
        artifact.verify(module, inputs)


def test_a_batch_that_goes_wrong_is_found(tmp_path: Path) -> None:
    """The graph of the example is right for the example alone: other batches are compared too."""

    class Baked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + float(torch.tensor(x.shape[0] > 1))

    with pytest.raises(ExportError):
        export(Baked(), tmp_path / "m.onnx", example_inputs=(torch.ones(2, 3),))
    assert not list(tmp_path.iterdir())


def test_tolerance_is_obeyed(tmp_path: Path) -> None:
    module, inputs = get("plain")
    with pytest.raises(VerificationError, match=r"every layer agrees|first layer that differs"):
        export(module, tmp_path / "m.onnx", example_inputs=inputs, tolerance=0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("broken runtime"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize("target", target_types().values(), ids=list(target_types()))
def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, target: Any
) -> None:
    def write(self: Any, program: Program, path: Path) -> dict[str, str]:
        del self, program
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(target, "write", write)
    monkeypatch.setattr(
        target, "require", staticmethod(lambda: None)
    )  # it fails before the runtime is asked for anything
    module, inputs = get("plain")
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ExportError
    with pytest.raises(wanted, match=None if wanted is KeyboardInterrupt else r"broken runtime|No space left"):
        export(module, tmp_path / f"m{target.suffix}", target.name, example_inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_bad_places_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxTarget, "write", lambda *_: pytest.fail("worked for nothing"))
    module, inputs = get("plain")
    with pytest.raises(ExportError, match=r"the folder .*absent' does not exist: make it first"):
        export(module, tmp_path / "absent" / "m.onnx", example_inputs=inputs)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder: name a file"):
        export(module, tmp_path / "folder.onnx", example_inputs=inputs)
    with pytest.raises(ExportError, match="cannot write into"):
        export(module, "/proc/m.onnx", example_inputs=inputs)


def test_a_killed_export_leaves_no_file_and_its_leftovers_go_with_the_next(tmp_path: Path) -> None:
    code = (
        "import time, pathlib, sys;"
        "from torchopt_passes.deploy.files import staged\n"
        f"with staged(pathlib.Path({str(tmp_path)!r}) / 'm.onnx') as draft:\n"
        "    draft.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    with staged(tmp_path / "m.onnx") as draft:  # the other one is alive: hands off
        assert len(list(tmp_path.iterdir())) == 2
        draft.write_bytes(b"mine")
    assert (tmp_path / "m.onnx").read_bytes() == b"mine"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(list(tmp_path.iterdir())) == 2
    with staged(tmp_path / "m.onnx") as draft:
        draft.write_bytes(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"new"


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    with staged(path) as draft:
        draft.write_bytes(b"new")
        draft.with_name("m.data").write_bytes(b"weights")
        assert path.read_bytes() == b"old"
        assert not (tmp_path / "m.data").exists()
    assert path.read_bytes() == b"new"
    assert (tmp_path / "m.data").read_bytes() == b"weights"
    assert time.time() - path.stat().st_mtime < 60


def test_compare_by_the_formulas() -> None:
    a, b = torch.tensor([[1.0, 2.0, 4.5]]), torch.tensor([[1.0, 3.0, 4.0]])
    exact = compare([[a]], [[b]], precision="float32")
    assert exact.error == pytest.approx(1.0 / 4.0)
    assert exact.tolerance == 1e-4
    assert not exact.passed
    norm = compare([[a]], [[b]], precision="int8", tolerance=0.3)
    assert norm.error == pytest.approx((1.25 / 26) ** 0.5)
    assert norm.passed
    assert norm.sqnr == pytest.approx(10 * torch.log10(torch.tensor(26 / 1.25)).item(), abs=1e-4)
    assert norm.agreement == 1.0
    assert compare([[b, b]], [[b, b]], precision="int8").error == 0.0


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    "actual", [torch.full((2, 3), float("nan")), torch.ones(3, 2), torch.full((2, 3), float("inf")), -torch.ones(2, 3)]
)
def test_compare_never_passes_nonsense(precision: str, actual: torch.Tensor) -> None:
    result = compare([[torch.ones(2, 3), actual]], [[torch.ones(2, 3), torch.ones(2, 3)]], precision=precision)
    assert not result.passed
    assert result.sqnr < 10


def test_compare_takes_the_worst_call_and_output() -> None:
    good, bad = torch.ones(2, 3), torch.ones(2, 3) * 1.5
    result = compare([[good, good], [good, bad]], [[good, good], [good, good]], precision="float32")
    assert result.error == pytest.approx(0.5)
    assert result.calls == 2


class Borders(torch.nn.Module):
    """Rounds values that lie on the border of two steps: their last bit decides."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((64,), value))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": (self.weight * x).round()}


def test_int8_is_judged_by_how_far_its_own_roundings_move_it() -> None:
    source, calls = Borders(10.5), [((torch.ones(1),), {})]
    noise = rounding_noise(source, calls, ["y"])
    moved = (noise * 10) ** 2 * 64  # of 64 values 10, those whose weight grew are 11
    assert moved == pytest.approx(round(moved)) and 10 < moved < 54
    failed = Verification(error=0.1, tolerance=0.03, sqnr=20.0, agreement=1.0, calls=1)
    assert beyond_noise(failed, noise).tolerance == 1.5 * noise
    assert beyond_noise(failed, noise).passed == (1.5 * noise >= 0.1)
    # nothing moves: nothing more is allowed; everything moves: nothing can be told
    assert beyond_noise(failed, rounding_noise(Borders(10.25), calls, ["y"])) == failed
    assert beyond_noise(failed, rounding_noise(Borders(0.5), calls, ["y"])) == failed
    assert torch.equal(source.weight, torch.full((64,), 10.5))


def test_biases_of_int8_layers_are_judged_on_their_grid() -> None:
    linear = torch.nn.Linear(2, 2)
    torch.nn.init.eye_(linear.weight)
    linear.bias.data = torch.tensor([0.02, 0.05])
    x = torch.tensor([[-1000.0, 1000.0]])
    graph, context = capture(linear, (x,)), PassContext(calibration=[(x,)])
    for step in (InsertFakeQuant(target="inductor", qat=False), Calibrate(method="minmax"), ConvertQuantized()):
        step(graph.eval(), context)
    calls = [((torch.zeros(1, 2),), {})]  # what comes out are the biases
    step = 2000 / 255 * 1 / 127.5  # of inputs and weights: 0.06, on whose grid the biases are 0 and 1
    assert rounding_noise(graph, calls, ["output"]) < 1e-6
    moved = math.hypot(0.02, step - 0.05) / math.hypot(0.02, 0.05)
    assert rounding_noise(graph, calls, ["output"], int32_biases=True) == pytest.approx(moved, rel=0.02)
    assert linear.bias.tolist() == pytest.approx([0.02, 0.05])
