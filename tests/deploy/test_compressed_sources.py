"""Models trained in int8, pruned and clustered run on each target as they are, here and in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.deploy.compressed import compressed, inputs_of
from torchopt_passes.deploy import Artifact, export
from torchopt_passes.deploy.base import target_types
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.errors import ConfigError, MissingExtraError

# what the exporters of LiteRT and ExecuTorch warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("qat", "pruned qat", "clustered")
INT8 = {"plain": {"conv2d int8": 3, "linear int8": 1}, "bert": {"linear int8": 14}}
FLOAT = {"plain": {"conv2d float": 3, "linear float": 1}, "bert": {"linear float": 14}}


class Case(NamedTuple):
    target: str
    name: str
    kind: str

    @property
    def slow(self) -> bool:
        """A compilation takes 15 s, what TensorRT is given is the ONNX file, and a BERT takes longer than a CNN."""
        once = {"inductor": ("plain pruned qat",), "tensorrt": ("plain qat", "plain pruned qat", "bert qat")}
        if self.name == "bert":
            once |= dict.fromkeys(("onnx", "openvino"), ("bert pruned qat", "bert clustered"))
        return self.target in once and f"{self.name} {self.kind}" not in once[self.target]


CASES = [Case(target, name, kind) for target in target_types() for name in ("plain", "bert") for kind in KINDS]
PARAMS = [pytest.param(c, marks=[pytest.mark.slow] * c.slow, id=f"{c.target} {c.name} {c.kind}") for c in CASES]


@pytest.fixture(scope="module")
def made() -> dict[Case, Artifact]:
    """Return what has been written so far: the last test opens all of it in one process."""
    return {}


def written(made: dict[Case, Artifact], case: Case, folder: Path) -> Artifact:
    target = target_types()[case.target]
    try:
        target.require()
    except MissingExtraError as error:
        pytest.skip(str(error))
    graph = compressed(case.name, case.target if "qat" in case.kind else "", case.kind)
    options = {"max_batch": 8} if case.target == "executorch" else {}
    path = folder / f"{case.name} {case.kind}{target.suffix}"
    made[case] = export(graph, path, case.target, **options)
    return made[case]


@pytest.mark.parametrize("case", PARAMS)
def test_equals_its_source_at_batch_1_and_8(
    made: dict[Case, Artifact], case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    artifact = written(made, case, tmp_path_factory.mktemp("compressed"))
    graph = compressed(case.name, case.target if "qat" in case.kind else "", case.kind)
    quantized = "qat" in case.kind
    assert artifact.metadata.precision == ("int8" if quantized else "float32")
    layers = (INT8 if quantized else FLOAT)[case.name]
    if case.name == "plain" and case.target == "inductor" and "kept in float" in artifact.metadata.facts:
        layers = {}
    assert layers.items() <= artifact.metadata.layers.items()
    figures = artifact.metadata.verification
    # without VNNI weights have 7 bits, and the model's own roundings move it further (`rounding_noise`)
    limit = (float(figures["tolerance"]) if saturates(case.target) else 0.02) if quantized else 1e-5
    assert 0 <= float(figures["error"]) < limit
    if case[:2] == ("litert", "bert"):  # its converter takes no open range: one file for each size
        assert [spec.shape for spec in artifact.metadata.inputs] == [(2, 12), (2, 12)]
        assert artifact.verify(graph, inputs_of("bert", 2)).error < limit
        with pytest.raises(ConfigError, match=r"input_ids: int64 \(2, 12\) is wanted, not int64 \(8, 12\)"):
            artifact(**inputs_of("bert", 8))
        return
    assert artifact.metadata.inputs[0].shape[0] == "batch"
    for batch in (1, 8):
        assert artifact.verify(graph, inputs_of(case.name, batch)).error < limit, batch


def test_a_new_process_gives_the_same(made: dict[Case, Artifact], tmp_path: Path) -> None:
    """Bit for bit, and without the model's code or a compiler."""
    if not made:  # this test alone was asked for
        written(made, Case("onnx", "plain", "clustered"), tmp_path)
    cases = list(made.items())
    calls = [inputs_of(case.name, 2) for case, _ in cases]
    tensors = {f"{place}/{key}": value for place, call in enumerate(calls) for key, value in call.items()}
    save_file(tensors, tmp_path / "in.safetensors")
    (tmp_path / "paths.json").write_text(json.dumps([str(artifact.path) for _, artifact in cases]))
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "out.safetensors")
    assert len(again) == len(cases)
    for place, (case, artifact) in enumerate(cases):
        assert torch.equal(again[str(place)], artifact(**calls[place])), case  # pyright: ignore


# the runtime of ExecuTorch itself imports torchao
NEW_PROCESS = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from torchopt_passes.deploy import open_artifact
folder = pathlib.Path(sys.argv[1])
tensors = load_file(folder / "in.safetensors")
results = {}
for place, path in enumerate(json.loads((folder / "paths.json").read_text())):
    call = {key.split("/")[1]: value for key, value in tensors.items() if key.split("/")[0] == str(place)}
    results[str(place)] = open_artifact(path)(**call).contiguous()
save_file(results, folder / "out.safetensors")
heavy = {"transformers", "litert_torch", "jax", "tensorflow", "torch._inductor.compile_fx"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
