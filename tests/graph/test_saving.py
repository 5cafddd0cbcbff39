"""Saving and loading: the same graph in another process; hostile and broken folders are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import torchopt_passes as top
from tests.graph import promises
from tests.graph.test_modes import EveryOp, Forked
from tests.hf_models import MODELS
from tests.models import ZOO, build


class Named(torch.nn.Module):
    """Returns a dict whose keys look like names of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"os.path": y + 1, "nested": ({"no.such.module": y}, [y.sum()])}


MAKE: dict[str, Any] = {
    "named": lambda: (Named(), (torch.randn(4, 3),), {}),
    **{name: lambda name=name: (build(name)[0], build(name)[1], {}) for name in ZOO},
    "forked": lambda: (Forked(), (torch.randn(4, 3),), {}),
    "every_op": lambda: (EveryOp(), (torch.randn(4, 4),), {}),
    "bert": lambda: (MODELS["bert"].build(), *MODELS["bert"].case(2)),
}


@pytest.mark.parametrize("name", MAKE)
def test_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    model, args, kwargs = MAKE[name]()
    graph = top.capture(model, args, kwargs)
    top.save_captured(graph, tmp_path / "saved")
    loaded = top.load_captured(tmp_path / "saved")
    assert list(loaded.state_dict()) == list(graph.state_dict())
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in graph.named_modules()]
    assert promises._ties(loaded) == promises._ties(graph)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in graph.parameters()]
    assert loaded.training == graph.training
    assert all("val" in node.meta for node in loaded.graph.nodes if node.op != "output")
    for training in (True, False):
        ours, theirs = graph.train(training), loaded.train(training)
        torch.manual_seed(0)
        expected = ours(*args, **kwargs)
        torch.manual_seed(0)
        assert promises.distance(theirs(*args, **kwargs), expected) == 0
    assert promises.in_train(loaded, graph, (args, kwargs)) == (0, 0)


def test_a_rewritten_graph_is_loaded_in_another_process(tmp_path: Path) -> None:
    model, (x,) = build("conv_residual")
    graph = top.capture(model, (x,))
    top.PruneWeights(sparsity=0.5)(graph)
    top.make_pass("fuse_batch_norm")(graph.eval())
    top.save_captured(graph, tmp_path / "saved")
    expected = graph(x)
    save_file({"x": x, "y": expected.detach()}, tmp_path / "case")
    code = (
        "import sys, torch, torchopt_passes as top; from safetensors.torch import load_file;"
        f"case = load_file(r'{tmp_path / 'case'}'); graph = top.load_captured(r'{tmp_path / 'saved'}');"
        "assert torch.equal(graph(case['x']), case['y']);"
        "assert 'tests' not in sys.modules and 'transformers' not in sys.modules;"
        "result = top.PruneWeights(sparsity=0.8)(graph); assert result.modified"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_facts_survive(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    args, kwargs = MODELS["bert"].case(2)
    top.save_captured(top.capture(model, args, kwargs), tmp_path / "saved")
    loaded = top.load_captured(tmp_path / "saved")
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.main_input_name == "input_ids"
    assert type(loaded(**kwargs)).__name__ == "SequenceClassifierOutput"
    with pytest.raises(top.CaptureError, match="loaded from files"):
        top.release(loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = build("tied_twice")
    return top.save_captured(top.capture(model, inputs), tmp_path_factory.mktemp("captured") / "saved")


def _node(data: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["op"] == "call_function")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _node(d).update(target="os.system"), "no operator that may be loaded"),
        (lambda d: _node(d).update(target="aten.from_file.default"), "no operator that may be loaded"),
        (lambda d: _node(d).update(target="aten.no_such.default"), "does not have"),
        (lambda d: _node(d).update(op="call_module", target="fc"), "node of kind"),
        (lambda d: _node(d).update(args=["tuple", [["node", "nowhere"]]]), "corrupted"),
        (lambda d: _node(d).update(args=["tuple", [["dtype", "os"]]]), "is no dtype"),
        (lambda d: d.update(guards=["__import__('os').system('true')"]), "corrupted|cannot be read|not a condition"),
        (lambda d: d.update(format="another"), "this version"),
        (lambda d: d.pop("state"), "corrupted"),
        (lambda d: d["state"][1].update(tensor="../../x"), "corrupted"),
        (lambda d: d["call"].update(outputs='[1, {"type": "evil.module.Class", "context": "null"}]'), "import evil"),
    ],
)
def test_hostile_files_are_refused(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "graph.json").read_text())
    change(data)
    (tmp_path / "graph.json").write_text(json.dumps(data))
    with pytest.raises(top.CaptureError, match=message):
        top.load_captured(tmp_path)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "example_inputs.safetensors"])
def test_missing_and_cut_files_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    for file in saved.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.name == name else content)
    with pytest.raises(top.CaptureError, match=r"can be read|corrupted"):
        top.load_captured(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(top.CaptureError, match="can be read"):
        top.load_captured(tmp_path)


def test_another_folder_is_not_overwritten_and_an_old_capture_is(saved: Path, tmp_path: Path) -> None:
    model, inputs = build("attention")
    graph = top.capture(model, inputs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(top.CaptureError, match="nothing was written"):
        top.save_captured(graph, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    top.save_captured(graph, tmp_path / "own")
    top.save_captured(graph, tmp_path / "own")
    assert sorted(f.name for f in (tmp_path / "own").iterdir()) == sorted(f.name for f in saved.iterdir())
    assert [f.name for f in tmp_path.iterdir() if f.name not in ("mine", "own")] == []


def test_fake_quantizers_are_refused_with_nothing_written(tmp_path: Path) -> None:
    model, inputs = build("conv_residual")
    graph = top.capture(model, inputs)
    top.InsertFakeQuant(target="onnx")(graph)
    with pytest.raises(top.CaptureError, match="ConvertQuantized"):
        top.save_captured(graph, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_pickle_is_refused() -> None:
    import pickle

    graph = top.capture(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(top.CaptureError, match="save_captured"):
        pickle.dumps(graph)
