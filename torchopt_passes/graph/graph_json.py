"""A graph as plain data: JSON that names operators and holds no code; only known operators are read back."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch
from torch import fx

from torchopt_passes._compat import is_operator
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.modes import FROZEN, MODE_ARGS, ONLY, select

__all__ = ["graph_from_data", "graph_to_data"]

_NAMESPACES = ("aten", "prims", "quantized_decomposed", "torchao")
# operators that reach outside of tensors: files
_FORBIDDEN = ("aten.from_file",)
_FUNCTIONS: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "getitem"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_float", "sym_int")},
    "select": select,
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_CONSTANTS = {kind.__name__: kind for kind in (torch.dtype, torch.layout, torch.memory_format)}


def graph_to_data(graph: fx.Graph) -> list[dict[str, Any]]:
    """Return the nodes of a graph as JSON data.

    Raises:
        CaptureError: the graph calls a submodule or a function that is no operator.

    Example:
        >>> graph_module = torch.export.export(torch.nn.ReLU(), (torch.ones(2),)).module(check_guards=False)
        >>> [node["target"] for node in graph_to_data(graph_module.graph)]
        ['input', 'aten.relu.default', 'output']
    """
    return [_node_to_data(node) for node in graph.nodes]


def graph_from_data(nodes: Any) -> fx.Graph:
    """Return the graph of JSON data.

    Raises:
        CaptureError: the data is corrupted, or names something that is no tensor operator.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    try:
        for data in nodes:
            target = _target(data["op"], data["target"])
            args, kwargs = _decode(data["args"], made), _decode(data["kwargs"], made)
            node = graph.create_node(data["op"], target, args, kwargs, name=data["name"])
            made[data["name"]] = node
            node.meta.update(_meta_from_data(data["meta"], made))
        graph.lint()
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"the graph is corrupted: {type(error).__name__}: {error}") from error
    return graph


def _node_to_data(node: fx.Node) -> dict[str, Any]:
    if node.op == "call_module":
        raise CaptureError(
            f"{node.name} calls the submodule {node.target}: a graph is saved before fake-quantizers go in, or after "
            "ConvertQuantized"
        )
    target = str(node.target)
    if node.op == "call_function" and not is_operator(node.target):
        target = _NAMES.get(node.target, "")
        if not target:
            raise CaptureError(f"{node.name} calls {node.target}, which is no operator that can be saved")
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": _encode(node.args),
        "kwargs": _encode(node.kwargs),
        "meta": _meta_to_data(node),
    }


def _target(op: str, name: str) -> Any:
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise CaptureError(f"the graph has a node of kind {op!r}")
    if op != "call_function":
        return name
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, *path = name.split(".")
    if namespace not in _NAMESPACES or len(path) != 2 or f"{namespace}.{path[0]}" in _FORBIDDEN:
        raise CaptureError(f"the graph calls {name!r}, which is no operator that may be loaded")
    found = getattr(getattr(getattr(torch.ops, namespace), path[0], None), path[1], None)
    if not is_operator(found):
        raise CaptureError(f"the graph calls {name!r}, which this version of torch does not have")
    return found


# besides the mode: what ScaleWeights and SplitOutliers leave at a node, so that a second run finds it
_KEPT = (ONLY, FROZEN, "stack_trace", "scaled_by", "split")


def _meta_to_data(node: fx.Node) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in _KEPT if node.meta.get(key) is not None}
    if MODE_ARGS in node.meta:
        meta[MODE_ARGS] = [[key, _encode(pair)] for key, pair in node.meta[MODE_ARGS].items()]
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        meta["nn_module_stack"] = [[key, str(path), str(kind)] for key, (path, kind) in stack.items()]
    return meta


def _meta_from_data(data: dict[str, Any], made: dict[str, fx.Node]) -> dict[str, Any]:
    meta = {key: data[key] for key in _KEPT if key in data}
    if MODE_ARGS in data:
        meta[MODE_ARGS] = {key: _decode(pair, made) for key, pair in data[MODE_ARGS]}
    if "nn_module_stack" in data:
        meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in data["nn_module_stack"]}
    return meta


def _encode(value: Any) -> Any:
    """Plain values stay; all else is a list of a tag and its content."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else ["float", str(value)]
        case fx.Node():
            return ["node", value.name]
        case list() | tuple():
            return ["list" if isinstance(value, list) else "tuple", [_encode(v) for v in value]]
        case dict():
            return ["dict", [[key, _encode(v)] for key, v in cast("dict[str, Any]", value).items()]]
        case slice():
            return ["slice", [_encode(v) for v in (value.start, value.stop, value.step)]]
        case complex():
            return ["complex", [value.real, value.imag]]
        case torch.device():
            return ["device", str(value)]
        case torch.dtype() | torch.layout() | torch.memory_format():
            return [type(value).__name__, str(value).removeprefix("torch.")]
        case _ if value is ...:
            return ["ellipsis", None]
        case _:
            raise CaptureError(f"the graph holds a {type(value).__name__}, which cannot be saved")


def _decode(value: Any, made: dict[str, fx.Node]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content = cast("list[Any]", value)
    match tag:
        case "node":
            return made[content]
        case "float":
            return float(content)
        case "list":
            return [_decode(v, made) for v in content]
        case "tuple":
            return tuple(_decode(v, made) for v in content)
        case "dict":
            return {key: _decode(v, made) for key, v in content}
        case "slice":
            return slice(*[_decode(v, made) for v in content])
        case "complex":
            return complex(*content)
        case "device":
            return torch.device(content)
        case "ellipsis":
            return ...
        case _:
            constant = getattr(torch, content)
            if not isinstance(constant, _CONSTANTS[tag]):
                raise CaptureError(f"{content!r} is no {tag}")
            return constant
