"""Targets that cannot show a file's values write it once more with all of them: the first wrong layer is named."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from tests.deploy.compressed import graph_of
from torchopt_passes.deploy import ExecuTorchTarget, LiteRtTarget, Target, export
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import MissingExtraError, VerificationError

# what the exporters warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("target", [LiteRtTarget, ExecuTorchTarget])
@pytest.mark.parametrize(("weight", "layer"), [("c2.weight", "conv2d_1"), ("fc.bias", "linear")])
def test_a_wrong_file_is_refused_by_its_first_wrong_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: type[Target], weight: str, layer: str
) -> None:
    try:
        target.require()
    except MissingExtraError as error:
        pytest.skip(str(error))
    write = target.write

    def wrong(self: Target, program: Program, path: Path) -> dict[str, str]:
        exported = copy.deepcopy(program.exported)
        name = next(name for name in exported.state_dict if name.endswith(weight))
        exported.state_dict[name].data.view(-1)[0] += 10
        return write(self, replace(program, exported=exported), path)

    monkeypatch.setattr(target, "write", wrong)
    with pytest.raises(VerificationError, match=rf"first layer that differs: {layer} \(error.*No file was written"):
        export(graph_of("plain"), tmp_path / f"m{target.suffix}")
    assert not list(tmp_path.iterdir())
