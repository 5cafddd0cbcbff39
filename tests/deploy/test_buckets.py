"""Sequence buckets: a call of any length equals the unpadded model, and a model that sees its padding is refused."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.deploy.sources import get
from torchopt_passes.deploy import Buckets, export_buckets, open_buckets
from torchopt_passes.deploy.base import target_types
from torchopt_passes.deploy.buckets import MANIFEST
from torchopt_passes.errors import ConfigError, ExportError, VerificationError

# what the exporters of LiteRT and ExecuTorch warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")

PAD = {"input_ids": 0, "attention_mask": 0}
LENGTHS = (16, 32)  # 32 is BERT's width too: a size alone does not tell what to cut
OPTIONS: dict[str, dict[str, Any]] = {"litert": {"batches": (1, 8)}, "executorch": {"max_batch": 8}}
CALLS = [(batch, length) for batch in (1, 8) for length in (5, 16, 23, 32)]


class Bag(nn.Module):
    """What a masked model needs least, for tests of the folder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = attention_mask.unsqueeze(-1).float()
        states = self.embed(input_ids)
        return {"last_hidden_state": states, "mean": (states * kept).sum(1) / kept.sum(1).clamp(min=1)}


@cache
def bag() -> nn.Module:
    torch.manual_seed(0)
    return Bag().eval()


@cache
def model() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    return BertModel(config).eval()


def call(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write(path: Path, target: str = "onnx", module: nn.Module | None = None, **options: Any) -> Buckets:
    given = {"lengths": LENGTHS, "pad": PAD, "example_inputs": call(2, 12), **OPTIONS.get(target, {}), **options}
    return export_buckets(module or model(), path, target, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buckets") / "bag"
    write(path, module=bag())
    return path


@pytest.mark.parametrize("target", ["onnx", "openvino", "litert", "executorch"])
def test_any_length_equals_the_unpadded_model(target: str, tmp_path: Path) -> None:
    try:
        target_types()[target].require()
    except top.MissingExtraError as error:
        pytest.skip(str(error))
    made = write(tmp_path / "bert", target)
    batches = (1, 8) if target == "litert" else (0,)
    assert made.sizes == tuple((batch, length) for length in LENGTHS for batch in batches)
    again = open_buckets((tmp_path / "bert").rename(tmp_path / "moved"))
    assert again.sizes == made.sizes and again.verification == made.verification
    assert 0 <= made.verification["error"] < 1e-5 and made.verification["calls"] >= 6
    assert again.size == sum(file.stat().st_size for file in (tmp_path / "moved").iterdir())
    for batch, length in CALLS:
        inputs = call(batch, length)
        with torch.no_grad():
            want = model()(**inputs)
        for buckets in (made, again):
            got = buckets(inputs)
            assert isinstance(got, dict)
            assert got["last_hidden_state"].shape == (batch, length, 32)
            for name, value in got.items():
                assert value.shape == want[name].shape
                assert float((value - want[name]).abs().max()) < 1e-5 * float(want[name].abs().max()), (batch, length)
    with pytest.raises(ConfigError, match=r"input_ids and attention_mask: 33 long, and the longest bucket is 32: cut"):
        again(**call(1, 33))
    if target == "litert":
        assert again(**call(3, 9))["last_hidden_state"].shape == (3, 9, 32)  # pyright: ignore
        with pytest.raises(ConfigError, match=r"a batch of 9: the largest bucket takes 8: split it"):
            again(**call(9, 8))


def test_int8_is_quantized_once_for_all_buckets(tmp_path: Path) -> None:
    made = write(
        tmp_path / "bert", quantization="int8", calibration=[call(4, 12), call(4, 30)], outputs=["last_hidden_state"]
    )
    assert [row["precision"] for row in made.report()] == ["int8", "int8"]
    assert {row["linear int8"] for row in made.report()} == {6}
    assert made.verification["error"] <= made.verification["tolerance"]
    for batch, length in CALLS:
        with torch.no_grad():
            want = model()(**call(batch, length)).last_hidden_state
        assert float((made(**call(batch, length)) - want).norm() / want.norm()) < 0.08  # pyright: ignore


@pytest.mark.parametrize(
    ("pad", "inputs", "through"),
    [
        ({"input_ids": 0}, {"input_ids": call(2, 12)["input_ids"]}, r"\['input_ids'\]"),
        (PAD | {"attention_mask": 1}, call(2, 12), r"\['input_ids'\]"),
    ],
)
def test_a_model_that_sees_its_padding_is_refused(
    tmp_path: Path, pad: dict[str, int], inputs: dict[str, torch.Tensor], through: str
) -> None:
    message = rf"BertModel does not mask its padding: output 'last_hidden_state' of 2 tokens.*comes through {through}"
    with pytest.raises(VerificationError, match=message):
        write(tmp_path / "bert", pad=pad, example_inputs=inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, r"lengths: whole numbers of at least 2"),
        ({"lengths": (1, 8)}, r"lengths: whole numbers of at least 2"),
        ({"batches": (0,)}, r"batches: whole numbers of at least 1"),
        ({"pad": {}}, r"pad: empty: name the inputs of BertModel"),
        ({"pad": PAD | {"token_type_ids": 0}}, r"pad: no input 'token_type_ids'"),
        (
            {"pad": PAD | {"input_ids": None}},
            r"pad: 'input_ids'.*torch.int64, not None; for ids of a tokenizer without",
        ),
        ({"pad": PAD | {"input_ids": 0.5}}, r"pad: 'input_ids' is filled up with a number of its dtype torch.int64"),
        ({"pad": {"input_ids": 0}}, r"does not run at \{'input_ids': \(2, 2\), 'attention_mask': \(2, 12\)\}"),
        ({"lengths": (16, 600)}, r"BertModel does not run at .*\(2, 600\).*Give shorter lengths="),
        ({"dynamic": False}, r"export_buckets has no dynamic"),
        ({"target": "odd"}, r"no target 'odd'; there are"),
    ],
)
def test_wrong_options_say_what_is_wanted(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "bert", **options)
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, ::2]

    with pytest.raises(ConfigError, match=r"output 'output' has size 1 at length 2 and 4 at 8.*leave it out"):
        export_buckets(
            Halves(), tmp_path / "m", "onnx", lengths=(4, 8), pad={"x": 0.0}, example_inputs={"x": torch.ones(2, 4)}
        )
    assert not list(tmp_path.iterdir())


def test_wrong_calls_say_what_is_wanted(folder: Path) -> None:
    buckets, inputs = open_buckets(folder), call(2, 9)
    with pytest.raises(ConfigError, match=r"missing or no tensor: \['attention_mask'\]"):
        buckets(inputs["input_ids"])
    with pytest.raises(
        ConfigError, match=r"differ in length \(dim 1\): \{'input_ids': \(2, 9\), 'attention_mask': \(2, 8"
    ):
        buckets(inputs["input_ids"], inputs["attention_mask"][:, :8])
    with pytest.raises(ConfigError, match=r"input_ids: \(batch, length, ...\) is wanted, not \(9,\)"):
        buckets(inputs["input_ids"][0], inputs["attention_mask"])
    with pytest.raises(ConfigError, match=r"input_ids: int64 \(batch, 16\) is wanted, not int32 \(2, 16\)"):
        buckets(inputs["input_ids"].int(), inputs["attention_mask"])
    torch.manual_seed(1)
    with pytest.raises(VerificationError, match=r"are not what Bag computes unpadded: error"):
        buckets.verify(Bag(), inputs)
    assert buckets.verify(bag(), inputs, call(1, 30)).error < 1e-6
    assert repr(buckets).endswith("bytes: batch x 16, batch x 32)")


@pytest.mark.parametrize("damage", ["absent", "text", "pad", "swapped", "missing", "unknown"])
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = tmp_path / MANIFEST
    data = json.loads(manifest.read_text())
    if damage == "absent":
        manifest.unlink()
    elif damage == "text":
        manifest.write_text("no JSON")
    elif damage in ("pad", "unknown"):  # someone edits the manifest: another padding would give other results
        data["padding"]["values"] |= {"attention_mask": 1} if damage == "pad" else {"x": 0}
        manifest.write_text(json.dumps(data))
    elif damage == "swapped":
        (tmp_path / "16.onnx").write_bytes((tmp_path / "32.onnx").read_bytes())
    else:
        (tmp_path / "32.onnx").unlink()
    message = {"absent": "no file", "swapped": "16.onnx is of another export", "missing": "32.onnx is missing"}
    with pytest.raises(ExportError, match=message.get(damage, r"buckets.json is damaged.*Copy the folder again")):
        open_buckets(tmp_path)
    if damage == "absent":
        with pytest.raises(ConfigError, match="is a folder: open_buckets opens what"):
            top.open_artifact(tmp_path)


def test_a_failure_leaves_the_folder_of_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bert"
    write(path, module=bag(), lengths=(8,))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert set(before) == {"8.onnx", MANIFEST}
    with monkeypatch.context() as patched:
        patched.setattr(Buckets, "verify", lambda *_, **__: (_ for _ in ()).throw(VerificationError("wrong")))
        with pytest.raises(VerificationError, match="wrong"):
            write(path, module=bag())
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["bert"]
    write(path, module=bag(), lengths=(9,))
    assert {file.name for file in path.iterdir()} == {"9.onnx", MANIFEST}
    assert [file.name for file in tmp_path.iterdir()] == ["bert"]
    (path / MANIFEST).unlink()
    with pytest.raises(ExportError, match=r"is there and has no buckets.json: name a new folder, or remove it"):
        write(path, module=bag())
    assert [file.name for file in path.iterdir()] == ["9.onnx"]


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "export_buckets" in block]
    monkeypatch.chdir(tmp_path)

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
            return call(1, len(text.split()))

    space: dict[str, Any] = {"top": top, "model": bag(), "tokenizer": Tokenizer(), "batch": call(2, 12)}
    exec(compile(block, "docs/deploy.md", "exec"), space)
    assert space["buckets"].sizes == ((0, 32), (0, 64), (0, 128))
    assert space["result"]["last_hidden_state"].shape[:2] == (1, len(space["text"].split()))


def test_a_batch_stays_open_alone() -> None:
    artifact_dims = top.deploy.program.read_program(*get("bert"), dynamic="batch").inputs  # pyright: ignore
    assert [spec.shape for spec in artifact_dims] == [("batch", 12), ("batch", 12)]
