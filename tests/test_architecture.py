"""The layers, the sizes and the manners of the package, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchopt_passes"
FILES = sorted(PACKAGE.rglob("*.py"))
NAME = "torchopt_passes"

# layer -> the layers it may import (itself always)
BASE = {"errors", "_compat", "progress", "ranks"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "_compat": {"errors"},
    "progress": set(),
    "ranks": {"errors"},
    "functional": {"errors"},
    "graph": BASE | {"functional"},
    "callbacks": BASE | {"functional", "graph"},
    "deploy": BASE | {"functional", "graph"},
    "search": BASE | {"functional", "graph", "callbacks", "deploy"},
    "show": {"errors", "graph"},
    "recipe": BASE | {"functional", "graph", "callbacks", "deploy", "search"},
    "testing": BASE | {"functional", "graph"},
    "decorators": BASE | {"functional", "graph", "recipe"},
    "demo": BASE | {"functional", "graph", "callbacks", "deploy", "search", "show", "recipe", "decorators"},
    "cli": BASE | {"functional", "graph", "callbacks", "deploy", "search", "show", "recipe", "decorators", "demo"},
    "__init__": set(),
}
FAMILIES = {"pruning", "quantization", "fusion", "partition"}
SHOW_MAY_READ = {f"{NAME}.graph.{part}" for part in ("report", "plan", "cost", "compare", "edit")} | {
    f"{NAME}.graph.quantization.{part}" for part in ("layer_report", "layer_histograms")
}
# optional package -> the only places that may import it
OPTIONAL = {
    "transformers": {"callbacks", "_compat.py", "demo.py", "graph/_transformers.py"},
    "accelerate": {"callbacks", "demo.py"},
    "lightning": {"callbacks"},
    "onnxruntime": {"deploy"},
    "onnx": {"deploy"},
    "onnxscript": {"deploy"},
    "openvino": {"deploy"},
    "litert_torch": {"deploy"},
    "ai_edge_litert": {"deploy"},
    "ai_edge_quantizer": {"deploy"},
    "executorch": {"deploy", "_compat.py"},
    "matplotlib": {"show"},
    "sklearn": {"demo.py"},
    "zstandard": {"deploy/compact_file.py"},
    "optuna": {"search"},
}
TABLES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith(NAME)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    layer = layer_of(file)
    assert layer in LAYERS, f"{layer} has no place in the layers: add it to LAYERS and to DESIGN"
    for name in imports_of(file):
        parts = name.split(".")
        if parts[0] == NAME and len(parts) > 1 and parts[1] != layer:
            assert parts[1] in LAYERS[layer] or parts[1] == "__version__", f"{layer} must not import {name}"
        if layer == "show" and name.startswith(f"{NAME}.graph."):
            assert any(name == ok or name.startswith(f"{ok}.") for ok in SHOW_MAY_READ), f"show must not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_families_do_not_import_each_other(file: Path) -> None:
    parts = file.relative_to(PACKAGE).parts
    if parts[0] != "graph" or len(parts) < 3:
        pytest.skip("not in a pass family")
    others = FAMILIES - {parts[1]}
    assert not [n for n in imports_of(file) if n.split(".")[:2] == [NAME, "graph"] and n.split(".")[2] in others]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_optional_packages_stay_in_their_files(file: Path) -> None:
    inside = str(file.relative_to(PACKAGE))
    for name in {n.split(".")[0] for n in imports_of(file)} & OPTIONAL.keys():
        assert any(inside.startswith(place) for place in OPTIONAL[name]), f"{inside} must not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_manners(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400, "past 400 lines: find the seam"
    assert ast.get_docstring(tree), "every file says what it is for"
    assert "TODO" not in text
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), "no assert in the package: raise an error of the tree"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "eval", "exec"}, f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"pickle", "dill", "marshal"}, "never unpickle"
    if file.name not in {"_compat.py", "__init__.py"} and not file.name.startswith("_"):
        names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        names |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        assert "__all__" in names, "every public file has __all__"


def test_torch_load_is_weights_only() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert options.get("weights_only") == "True", f"{file}: torch.load without weights_only=True"


def test_private_names_of_torch_live_in_compat() -> None:
    found: list[str] = []
    for file in FILES:
        if file.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(NAME):
                private = [p for p in [*node.module.split("."), *(a.name for a in node.names)] if p.startswith("_")]
                found += [f"{file.name}:{node.lineno} {node.module}.{p}" for p in private if p not in ALLOWED_PRIVATE]
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner.split(".")[0] == "torch" and node.attr not in ALLOWED_PRIVATE:
                    found.append(f"{file.name}:{node.lineno} {owner}.{node.attr}")
    assert not found, found


# `_pytree` and `_assert_tensor_metadata` (an ATen operator's name) have no public spelling; `__future__` is no privacy
ALLOWED_PRIVATE = {"_pytree", "_assert_tensor_metadata", "__future__"}


def test_import_is_light() -> None:
    code = (
        "import sys, torchopt_passes as top; top.__version__;"
        "heavy = {'transformers', 'torchao', 'onnx', 'onnxruntime', 'openvino', 'matplotlib', 'pydantic', 'rich',"
        "'accelerate'};"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported at once: {done.stderr}"


def test_public_names_resolve_and_are_documented() -> None:
    import torchopt_passes as top

    assert len(top.__all__) > 20
    for name in top.__all__:
        value = getattr(top, name)
        assert getattr(value, "__doc__", None) or isinstance(value, str), f"{name} has no docstring"
