"""Lay the train-mode and the eval-mode graph of one model over each other, and make one graph of both.

Ops that differ in a literal (dropout's flag, SDPA's dropout_p) become one op with a mode-dependent argument. Where the structure
differs (stochastic depth is there in training only), both ways stay in the graph and a `select` node joins them.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.modes import follow_mode, select

__all__ = ["merge_modes", "user_line"]

aten = torch.ops.aten


def merge_modes(train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """Make the train-mode graph, in place, one that has both modes; it is left in train mode.

    Args:
        train: exported in train mode; it is changed.
        evaluation: the same model exported in eval mode.

    Raises:
        CaptureError: the two differ in a way that one graph cannot hold; names the user's line.
    """
    _Merge(train, evaluation).run()


def user_line(node: fx.Node) -> str:
    """Return the line of the user's code that made a node, as ``file:line in function`` (empty when unknown)."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return lines[-1].replace('File "', "").replace('", line ', ":").replace(", in ", " in ") if lines else ""


class _Merge:
    def __init__(self, train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
        self.module, self.graph, self.evaluation = train, train.graph, evaluation
        self.theirs: dict[fx.Node, fx.Node] = {}  # eval node -> its node in the merged graph
        self.selects: dict[tuple[fx.Node | None, fx.Node, fx.Node], fx.Node] = {}

    def run(self) -> None:
        mine, theirs = _body(self.graph), _body(self.evaluation.graph)
        self._match_inputs()
        # autojunk would drop ops that occur often, which in a network are nearly all
        matcher = SequenceMatcher(None, [_key(n) for n in mine], [_key(n) for n in theirs], autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            anchor = mine[i2] if i2 < len(mine) else _output(self.graph)
            if tag == "equal":
                for t, e in zip(mine[i1:i2], theirs[j1:j2], strict=True):
                    self._join(t, e)
                continue
            for t in mine[i1:i2]:
                self._train_only(t)
            for e in theirs[j1:j2]:
                self._eval_only(e, anchor)
        out, other = _output(self.graph), _output(self.evaluation.graph)
        self._join(out, other)
        self.graph.lint()

    def _match_inputs(self) -> None:
        ours = [n for n in self.graph.nodes if n.op == "placeholder"]
        theirs = [n for n in self.evaluation.graph.nodes if n.op == "placeholder"]
        self.theirs.update(zip(theirs, ours, strict=True))
        attributes = {n.target: n for n in self.graph.nodes if n.op == "get_attr"}
        for node in self.evaluation.graph.nodes:
            if node.op != "get_attr":
                continue
            twin = attributes.get(node.target)
            if twin is None or not _same_value(self.module, self.evaluation, str(node.target)):
                twin = self._constant(node)
            self.theirs[node] = twin

    def _constant(self, node: fx.Node) -> fx.Node:
        """Take over a parameter or a constant that only eval mode reads."""
        value = _attribute(self.evaluation, str(node.target))
        name = str(node.target)
        if not _has(self.module, name):
            if not isinstance(value, torch.Tensor):
                raise CaptureError(f"eval mode reads {name}, a {type(value).__name__}, which train mode does not")
        elif not _same_value(self.module, self.evaluation, name):
            name = f"_eval_{name.replace('.', '_')}"
        if not _has(self.module, name):
            _register(self.module, name, value)
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.create_node("get_attr", name, name=node.name)

    def _join(self, t: fx.Node, e: fx.Node) -> None:
        self.theirs[e] = t
        if t.op == "output":
            args = t.args[0], e.args[0]
            t.args = (self._merge(t, *args, where="the output"),)
            return
        ours, theirs = _arguments(t), _arguments(e)
        for name in ours.keys() | theirs.keys():
            a, b = ours.get(name), theirs.get(name)
            if _has_node(a) or _has_node(b):
                merged = self._merge(t, a, b, where=f"argument {name!r}")
                if merged is not a:
                    _replace(t, name, merged)
            elif not _equal(a, b):
                follow_mode(t, _place(t, name, a), a, b)

    def _merge(self, t: fx.Node, a: Any, b: Any, where: str) -> Any:
        """Return the argument that is `a` in train mode and `b` (of the eval graph) in eval mode."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            twin = self.theirs[b]
            return a if twin is a else self._select(t, a, twin)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            merged = [self._merge(t, x, y, where) for x, y in zip(a, b, strict=True)]
            same = all(x is y for x, y in zip(merged, a, strict=True))
            return a if same else type(a)(merged)
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._merge(t, a[key], b[key], where) for key in a}
        if not _has_node(a) and not _has_node(b) and _equal(a, b):
            return a
        raise CaptureError(
            f"{where} of {t.name} ({t.target}) is {a} in train mode and {b} in eval mode, at {user_line(t)}: "
            "one graph cannot hold both"
        )

    def _select(self, t: fx.Node, train_value: fx.Node, eval_value: fx.Node) -> fx.Node:
        key = (None, train_value, eval_value)
        if key not in self.selects:
            later = max(train_value, eval_value)
            place = later.next
            while place.op in ("placeholder", "get_attr"):
                place = place.next
            with self.graph.inserting_before(place):
                node = self.graph.call_function(select, (train_value, eval_value, True))
            node.meta = {k: v for k, v in t.meta.items() if k == "stack_trace"} | {"val": train_value.meta.get("val")}
            follow_mode(node, 2, True, False)
            self.selects[key] = node
        return self.selects[key]

    def _train_only(self, t: fx.Node) -> None:
        """Keep what only training does out of eval mode where it writes into state; its values meet in selects."""
        if any(a.op == "get_attr" and _is_constant(a) for a in t.all_input_nodes):
            raise CaptureError(
                f"training reads a constant that was made while tracing ({t.name}, {t.target}), at {user_line(t)}: "
                "random or data-dependent Python in training cannot be captured; switch it off in the model's config "
                "(SpecAugment: mask_time_prob=0, mask_feature_prob=0), or capture a submodule without it"
            )
        state = _written_state(t)
        if state is None:
            return
        if t.target is aten.add_.Tensor and not _has_node(t.args[1]):
            follow_mode(t, 1, t.args[1], 0)
        elif t.target is aten.copy_.default and isinstance(t.args[1], fx.Node):
            with self.graph.inserting_before(t):
                node = self.graph.call_function(select, (t.args[1], t.args[0], True))
            follow_mode(node, 2, True, False)
            _replace(t, "src", node)
        else:
            raise CaptureError(
                f"training alone writes into {state.target} with {t.target}, at {user_line(t)}: cannot be switched off "
                "in eval mode; capture a submodule without it"
            )

    def _eval_only(self, e: fx.Node, anchor: fx.Node) -> None:
        if _written_state(e) is not None:
            raise CaptureError(f"eval mode alone writes into state ({e.name}, {e.target}), at {user_line(e)}")
        with self.graph.inserting_before(anchor):
            self.theirs[e] = self.graph.node_copy(e, lambda n: self.theirs[n])


def _body(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def _output(graph: fx.Graph) -> fx.Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _key(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    where = str(next(reversed(stack.values()))[0]) if stack else ""
    return str(node.target), where


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the node's arguments by name, defaults filled in, so that spellings of one call compare equal."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    found: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def _place(node: fx.Node, name: str, value: Any) -> int | str:
    """Return where an argument stands in a node, putting a default that was left out there as a keyword."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else [str(i) for i in range(len(node.args))]
    if name in names[: len(node.args)]:
        return names.index(name)
    node.kwargs = {**node.kwargs, name: value}
    return name


def _replace(node: fx.Node, name: str, value: Any) -> None:
    place = _place(node, name, value)
    if isinstance(place, str):
        node.kwargs = {**node.kwargs, place: value}
    else:
        node.args = (*node.args[:place], value, *node.args[place + 1 :])


def _has_node(value: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(value, lambda n: found.append(n) or n)
    return bool(found)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return type(a) is type(b) and a == b


def _written_state(node: fx.Node) -> fx.Node | None:
    """Return the parameter, buffer or input that an op writes into, or None."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    first = node.args[0]
    return first if first.op in ("get_attr", "placeholder") else None


def _is_constant(node: fx.Node) -> bool:
    return str(node.target).startswith(("lifted_tensor", "_tensor_constant", "constant"))


def _attribute(module: torch.nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _has(module: torch.nn.Module, name: str) -> bool:
    try:
        _attribute(module, name)
    except AttributeError:
        return False
    return True


def _same_value(left: torch.nn.Module, right: torch.nn.Module, name: str) -> bool:
    if not (_has(left, name) and _has(right, name)):
        return False
    a, b = _attribute(left, name), _attribute(right, name)
    return a is b or (isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _register(module: torch.nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        if part not in owner._modules:
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=False)
