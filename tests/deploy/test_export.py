"""What is exported is the model: on every target, at every batch, in a new process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.deploy.conftest import Exported
from tests.deploy.sources import get, int8
from torchopt_passes.deploy import Artifact, InductorTarget, OnnxTarget, export, open_artifact, targets
from torchopt_passes.deploy.calls import run_source
from torchopt_passes.errors import ConfigError, ExportError, MissingExtraError, VerificationError

SUFFIXES = (".onnx", ".pt2", ".xml")
SOURCES = ("plain", "resnet", "bert", "int8_plain", "int8_bert")
CELLS = [(name, suffix) for name in SOURCES for suffix in SUFFIXES]


def fresh(name: str, batch: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Return inputs that were not seen at export: another batch size and another sequence length."""
    generator = torch.Generator().manual_seed(batch)
    _, example = get(name)
    if "input_ids" in example:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, length - 2 :] = 0
        return {
            "input_ids": torch.randint(0, 50, (batch, length), generator=generator),
            "attention_mask": mask,
        }
    key = next(iter(example))
    return {key: torch.randn(batch, *example[key].shape[1:], generator=generator)}


def expected(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    results = run_source(get(name)[0], ((), dict(inputs)))
    return results.get("logits", next(iter(results.values())))


@pytest.mark.parametrize(("name", "suffix"), CELLS)
@pytest.mark.parametrize("batch", [1, 8])
def test_equals_the_source(exported: Exported, name: str, suffix: str, batch: int) -> None:
    artifact = exported(name, suffix)
    inputs = fresh(name, batch)
    want = expected(name, inputs)
    got = artifact(**inputs)
    assert isinstance(got, torch.Tensor)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got - want).norm() / want.norm()
    assert error < (0.02 if name.startswith("int8") else 1e-5), float(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_new_process_gives_the_same(exported: Exported, suffix: str, tmp_path: Any) -> None:
    """Bit for bit, and without the model's code, torchao or the compiler."""
    artifacts = {name: exported(name, suffix) for name in SOURCES}
    inputs = {name: fresh(name, 3) for name in SOURCES}
    save_file({f"{n}/{k}": v for n, call in inputs.items() for k, v in call.items()}, tmp_path / "in.safetensors")
    (tmp_path / "paths.json").write_text(json.dumps({name: str(a.path) for name, a in artifacts.items()}))
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "out.safetensors")
    for name in SOURCES:
        assert torch.equal(again[name], artifacts[name](**inputs[name])), name


NEW_PROCESS = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from torch import nn
from torchopt_passes.deploy import open_artifact
folder = pathlib.Path(sys.argv[1])
tensors = load_file(folder / "in.safetensors")
results = {}
for name, path in json.loads((folder / "paths.json").read_text()).items():
    call = {key.split("/")[1]: value for key, value in tensors.items() if key.split("/")[0] == name}
    results[name] = open_artifact(path)(**call).contiguous()
save_file(results, folder / "out.safetensors")
heavy = {"transformers", "torchao", "torch._inductor.compile_fx"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_and_loss_are_left_out(exported: Exported, suffix: str) -> None:
    artifact = exported("resnet", suffix)
    assert [spec.name for spec in artifact.metadata.inputs] == ["pixel_values"]
    assert [spec.name for spec in artifact.metadata.outputs] == ["logits"]
    assert artifact.metadata.dropped_inputs == ("labels",)
    assert artifact.metadata.dropped_outputs == ("loss",)
    batch = get("resnet")[1]
    assert torch.equal(artifact(batch), artifact(batch["pixel_values"]))  # the whole batch, labels and all


def test_the_source_is_untouched(tmp_path: Any) -> None:
    module, inputs = get("resnet")
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxTarget, "write", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="cannot take"):
            export(module, tmp_path / "never.onnx", example_inputs=inputs)
    assert all(child.training for child in module.modules())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


class Attention(nn.Module):
    """Its input projection reads a transposed value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_linears_on_transposed_values_are_int8_in_inductor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler fails on them where the batch is open; if the second part fails, torch is repaired: drop it."""
    module, inputs = int8((Attention(), {"x": torch.randn(4, 7, 32)}))
    artifact = export(module, tmp_path / "m.pt2", example_inputs=inputs)
    assert artifact.metadata.inputs[0].shape[0] == "batch"
    assert "qlinear_pointwise 2" in artifact.report()["kernels"]
    assert "dynamic=False is faster" in artifact.report()["open sizes"]
    monkeypatch.setattr(InductorTarget, "prepare", lambda *_: {})
    with pytest.raises(ExportError, match=r"torch.Size\(\)"):
        export(module, tmp_path / "m.pt2", example_inputs=inputs)


def test_one_input_channel_is_kept_in_float_by_inductor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler miscompiles such int8 convolutions; if the second part fails, torch is repaired: drop `prepare`."""
    module, inputs = int8((OneChannel(), {"x": torch.randn(4, 1, 16, 16)}))
    artifact = export(module, tmp_path / "m.pt2", example_inputs=inputs)
    assert artifact.metadata.layers == {"conv2d float": 1, "conv2d int8": 1}
    assert re.fullmatch(r"\S+ \(one input channel\)", artifact.metadata.facts["kept in float"])
    assert artifact.metadata.verification["error"] < 1e-5
    monkeypatch.setattr(InductorTarget, "prepare", lambda *_: {})
    with pytest.raises(VerificationError):
        export(module, tmp_path / "m.pt2", example_inputs=inputs)


class OneChannel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.b = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_int8_is_int8(exported: Exported, suffix: str) -> None:
    """Weights take a quarter, and the runtime really computes in integers."""
    small, big = exported("int8_plain", suffix), exported("plain", suffix)
    assert small.metadata.precision == "int8"
    assert small.metadata.layers == {"conv2d int8": 3, "linear int8": 1}
    assert big.metadata.layers == {"conv2d float": 3, "linear float": 1}
    kernels = dict(item.rsplit(" ", 1) for item in small.report()["kernels"].split(", "))
    if suffix == ".onnx":
        assert kernels["QLinearConv"] == "3"
        assert int(kernels.get("Conv", 0)) + int(kernels.get("FusedConv", 0)) == 0
        assert small.size <= 0.3 * big.size
    elif suffix == ".xml":
        assert (kernels["Convolution u8"], kernels["FullyConnected u8"]) == ("3", "1")
        assert not {"Convolution f32", "FullyConnected f32"} & set(kernels)
        assert small.size <= 0.35 * big.size  # 30 kB are the description of the graph
    else:
        assert sum(int(count) for name, count in kernels.items() if name.startswith("qconv")) == 3
        assert sum(int(count) for name, count in kernels.items() if name.startswith("qlinear")) == 1
        # the machine code costs some 120 kB either way
        assert small.size - 150_000 <= 0.3 * (big.size - 80_000)


def test_onnx_weights_are_stored_in_int8(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(exported("int8_plain", ".onnx").path))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert len(kinds) == 3
    assert set(kinds.values()) == {onnx.TensorProto.INT8}
    activations = {
        tensor.data_type
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        for tensor in model.graph.initializer
        if tensor.name == node.input[2]
    }
    assert activations == {onnx.TensorProto.UINT8}


def test_onnx_file_says_what_it_is(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx")
    artifact = exported("bert", ".onnx")
    model = onnx.load(str(artifact.path))
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "input_ids_1"],
        "attention_mask": ["batch", "input_ids_1"],
        "logits": ["batch", 3],
    }
    assert not any(node.metadata_props for node in model.graph.node)
    assert str(artifact.path.parent.parent).encode() not in artifact.path.read_bytes()
    assert b"site-packages" not in artifact.path.read_bytes()


def test_options_reach_the_target(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    module, inputs = get("plain")
    artifact = export(module, tmp_path / "m.onnx", example_inputs=inputs, opset=21, external_data=True, note="RGB")
    assert [entry.version for entry in onnx.load(str(artifact.path)).opset_import if entry.domain == ""] == [21]
    assert (tmp_path / "m.onnx.data").exists()
    assert artifact.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    again = open_artifact(artifact.path)
    assert again.metadata.note == "RGB"
    assert torch.equal(again(**inputs), artifact(**inputs))


@pytest.mark.parametrize("batch", [1, 2])
def test_an_example_of_one_still_gives_an_open_batch(tmp_path: Any, batch: int) -> None:
    module, inputs = get("plain")
    artifact = export(module, tmp_path / "m.onnx", example_inputs=(inputs["x"][:batch],))
    assert artifact.metadata.inputs[0].shape == ("batch", 3, 16, 16)
    assert artifact(torch.randn(5, 3, 16, 16)).shape == (5, 10)


def test_dynamic_false_fixes_every_size(tmp_path: Any) -> None:
    module, inputs = get("plain")
    artifact = export(module, tmp_path / "m.onnx", example_inputs=inputs, dynamic=False)
    assert artifact.metadata.inputs[0].shape == (2, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"x: float32 \(2, 3, 16, 16\) is wanted, not float32 \(1, 3, 16, 16\)"):
        artifact(torch.randn(1, 3, 16, 16))


def test_dynamic_by_name(tmp_path: Any) -> None:
    module, inputs = get("plain")
    auto = torch.export.Dim.AUTO
    dims = {"x": {0: auto, 2: auto, 3: auto}}
    artifact = export(module, tmp_path / "m.onnx", example_inputs=inputs, dynamic=dims)
    x = torch.randn(3, 3, 20, 24)
    assert torch.allclose(artifact(x), module(x), atol=1e-5)


class Several(torch.nn.Module):
    """Nested inputs and outputs, an output nobody asks for, the same tensor twice."""

    def forward(self, input: torch.Tensor, more: dict[str, torch.Tensor], flag: bool = True) -> Any:
        total = input + more["k"] if flag else input
        return {"sum": total, "states": (total * 2, total * 3), "unused": more["other"].sum()}


def test_several_outputs_come_by_name(tmp_path: Any) -> None:
    x = torch.randn(2, 3)
    call = {"input": x, "more": {"k": x, "other": x}, "flag": True}
    artifact = export(Several(), tmp_path / "m.onnx", example_inputs=call, outputs=["sum", "states"])
    results = artifact(input=x, more_k=x + 1)
    assert list(results) == ["sum", "states_0", "states_1"]
    assert torch.equal(results["sum"], x + x + 1)
    assert torch.equal(results["states_1"], (x + x + 1) * 3)
    assert artifact.metadata.dropped_inputs == ("more_other", "flag")
    assert artifact.metadata.dropped_outputs == ("unused",)
    assert artifact.verify(Several(), call).error == 0.0


def test_unknown_output_is_an_error(tmp_path: Any) -> None:
    module, inputs = get("plain")
    with pytest.raises(ConfigError, match=r"no output \['logits'\]; the model has \['output'\]"):
        export(module, tmp_path / "m.onnx", example_inputs=inputs, outputs=["logits"])


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("m.weights", {}, "the suffix tells no target"),
        ("m.onnx", {"target": "coreml"}, "no target 'coreml'"),
        ("m.onnx", {"target": "inductor"}, "end in '.pt2'"),
        ("m.onnx", {"opset": 3}, "18 to 25"),
        ("m.onnx", {"opsett": 20}, "unknown \\['opsett'\\]"),
        ("m.pt2", {"opset": 20}, "unknown \\['opset'\\]"),
        ("m.onnx", {"target": OnnxTarget(), "opset": 20}, "not beside it"),
        ("m.onnx", {"dynamic": "yes"}, "dynamic is"),
        ("m.onnx", {"example_inputs": {"y": torch.ones(1)}}, "do not fit Cnn.forward"),
        ("m.onnx", {"example_inputs": None}, "example_inputs are needed"),
        ("m.onnx", {"example_inputs": {"x": None}}, "do not fit|cannot trace"),
    ],
)
def test_bad_options_say_what_is_wrong(tmp_path: Any, path: str, options: dict[str, Any], message: str) -> None:
    module, inputs = get("plain")
    with pytest.raises(Exception, match=message) as caught:
        export(module, tmp_path / path, **({"example_inputs": inputs} | options))
    assert type(caught.value).__module__ == "torchopt_passes.errors"
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_names_its_extra(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxTarget, "packages", ("onnx", "no_such_package"))
    module, inputs = get("plain")
    with pytest.raises(MissingExtraError, match=r"'no_such_package' is not installed: pip install .*\[onnx\]"):
        export(module, tmp_path / "m.onnx", example_inputs=inputs)
    row = {row["target"]: row for row in targets()}["onnx"]
    assert not row["installed"]
    assert "[onnx]" in row["missing"]


def test_targets_are_listed() -> None:
    rows = {row["target"]: row for row in targets()}
    assert rows["onnx"]["suffix"] == ".onnx"
    assert rows["inductor"]["suffix"] == ".pt2"
    assert rows["onnx"]["installed"]
    assert rows["inductor"]["installed"]


def test_inductor_leaves_global_configuration_alone(exported: Exported) -> None:
    """Exporting and opening change nothing that another compilation in this process would see."""
    import torch._inductor.config as config

    before = json.dumps(config.save_config_portable(), default=str, sort_keys=True)
    exported("plain", ".pt2")
    exported("int8_plain", ".pt2")
    open_artifact(exported("plain", ".pt2").path)
    assert json.dumps(config.save_config_portable(), default=str, sort_keys=True) == before


def test_inductor_follows_the_thread_count(exported: Exported) -> None:
    """Code that is compiled with one thread must not be stuck with it."""
    import zipfile

    assert InductorTarget().config == {}
    with zipfile.ZipFile(exported("plain", ".pt2").path) as package:
        assert not [name for name in package.namelist() if name.endswith(".cpp")]


def test_report_has_the_figures(exported: Exported) -> None:
    artifact: Artifact = exported("int8_plain", ".onnx")
    report = artifact.report()
    assert report["bytes"] == artifact.path.stat().st_size
    assert report["precision"] == "int8"
    assert report["conv2d int8"] == 3
    assert 0 <= report["verified error"] < report["verified tolerance"] == 0.03
    assert report["verified sqnr"] > 30
    assert report["verified calls"] == 3
    assert report["version torch"] == torch.__version__
    assert open_artifact(artifact.path).report() == report
