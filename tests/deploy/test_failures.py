"""Whatever goes wrong on a target: no partial file, the file before is as it was, and the error says what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.deploy.sources import get
from torchopt_passes.deploy import InductorTarget, Target, export
from torchopt_passes.deploy.base import target_types
from torchopt_passes.deploy.inductor import _foreign
from torchopt_passes.deploy.metadata import Metadata
from torchopt_passes.deploy.program import Program, read_program
from torchopt_passes.errors import ExportError, MissingExtraError

# what the exporters of LiteRT and ExecuTorch warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = pytest.mark.parametrize("target", target_types().values(), ids=list(target_types()))
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@torch.library.custom_op("torchopt_passes_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


triple.register_fake(torch.empty_like)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return triple(x)


class Refused:
    """A folder with a file of before: `export` must refuse, and leave that file and nothing else."""

    def __init__(self, folder: Path, target: type[Target]) -> None:
        self.target = target
        self.path = folder / f"m{target.suffix}"
        self.before = {self.path.name: b"the file before"}
        if target.suffix == ".xml":
            self.before["m.bin"] = b"the weights before"
        for name, data in self.before.items():
            (folder / name).write_bytes(data)

    def __call__(self, message: str, module: nn.Module | None = None, inputs: Any = None) -> None:
        plain, example = get("plain")
        with pytest.raises(ExportError, match=message):
            export(module or plain, self.path, self.target.name, example_inputs=example if inputs is None else inputs)
        assert {file.name: file.read_bytes() for file in self.path.parent.iterdir()} == self.before


@pytest.fixture
def refused(tmp_path: Path, target: type[Target]) -> Refused:
    return Refused(tmp_path, target)


@pytest.fixture
def pretended(target: type[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a target be installed, and write without its runtime."""

    def write(self: Target, program: Program, path: Path) -> dict[str, str]:
        del self, program
        path.write_bytes(b"half a file")
        if path.suffix == ".xml":
            path.with_suffix(".bin").write_bytes(b"half the weights")
        return {}

    monkeypatch.setattr(target, "require", staticmethod(lambda: None))
    monkeypatch.setattr(target, "write", write)
    monkeypatch.setattr(target, "load", classmethod(lambda *_: lambda inputs: [get("plain")[0](*inputs)]))
    monkeypatch.setattr(target, "stamp", lambda *_: None)
    monkeypatch.setattr(target, "read_metadata", classmethod(lambda *_: None))


@TARGETS
def test_an_unsupported_operation(refused: Refused, target: type[Target]) -> None:
    try:
        target.require()
    except MissingExtraError as error:
        pytest.skip(str(error))
    if target is InductorTarget:
        pytest.skip("calls what is registered: see the next test")
    refused(r"triple.*Ways out: another target.*model without that operation", Odd(), (torch.ones(2, 3),))


def test_a_package_says_which_registered_operations_it_calls(tmp_path: Path) -> None:
    """It is fine here, and would fail at the first call in a process where nobody has registered them."""
    program = read_program(Odd(), (torch.ones(2, 3),))
    assert _foreign(program.exported.graph) == ["torchopt_passes_tests.triple"]
    assert _foreign(read_program(*get("int8_plain")).exported.graph) == []
    facts = {"cpu": "DEFAULT", "operations of other libraries": "torchopt_passes_tests.triple, torchopt_absent.op"}
    metadata = Metadata(target="inductor", precision="float32", device="cpu", inputs=(), outputs=(), facts=facts)
    with pytest.raises(ExportError, match=r"m\.pt2 calls \['torchopt_absent\.op'\].*import it first"):
        InductorTarget.load(tmp_path / "m.pt2", metadata)


@TARGETS
@pytest.mark.usefixtures("pretended")
def test_a_runtime_that_opens_nothing(refused: Refused, target: type[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("undefined symbol: half")

    monkeypatch.setattr(target, "load", classmethod(load))
    again = "install it again" if target.extra else "check torch"
    refused(rf"runtime of target '{target.name}' cannot open m\S+: RuntimeError: undefined symbol: half\. .*{again}")


@TARGETS
@pytest.mark.usefixtures("pretended")
def test_a_runtime_that_runs_nothing(refused: Refused, target: type[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(inputs: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(target, "load", classmethod(lambda *_: run))
    refused(r"does not run on the example inputs: RuntimeError: illegal instruction\. Ways out: another target")


def fails(error: OSError) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@TARGETS
@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("moment", ["write", "stamp", "rename"])
def test_a_full_disk(refused: Refused, target: type[Target], monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    if moment == "rename":
        replace = os.replace
        full = lambda source, place: fails(FULL)() if Path(place) == refused.path else replace(source, place)  # noqa: E731
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(target, moment, fails(FULL))
    refused(r"No space left on device.*Nothing was changed: free space or choose a folder on another disk")


@TARGETS
@pytest.mark.usefixtures("pretended")
def test_a_full_disk_that_a_runtime_does_not_tell_of(
    refused: Refused, target: type[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime and OpenVINO do when they write: a RuntimeError that says "iostream error"."""

    def write(*_: Any) -> None:
        raise RuntimeError("iostream error")

    monkeypatch.setattr(target, "write", write)
    refused(r"iostream error\. Ways out: another target")
    usage = shutil.disk_usage(refused.path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    # the weights are 455 kB
    refused(r"iostream error\. Only 400000 bytes are free there, of up to 13\d{5} needed: free space or choose")


@TARGETS
@pytest.mark.usefixtures("pretended")
def test_an_unwritable_folder(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    # by the error itself: an administrator may write anywhere
    monkeypatch.setattr("tempfile.mkdtemp", fails(PermissionError(errno.EACCES, "Permission denied")))
    refused(r"cannot write into '.*': Permission denied: make the folder writable or choose another")
