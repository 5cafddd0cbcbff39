"""Lay the train-mode and the eval-mode graph of one model over each other, and make one graph of both.

Ops that differ in a literal (dropout's flag, SDPA's dropout_p) become one op with a mode-dependent argument. Where the
structure differs (stochastic depth is there in training only), both ways stay in the graph and a `select` node joins
them.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import map_arg

from torchopt_passes._compat import both_specs, output_spec_of, set_output_spec
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.modes import ONLY, follow_mode, select

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


def user_line(node: fx.Node, *, own: bool = False) -> str:
    """Return the line of code that made a node, as ``file:line in function`` (empty when unknown).

    Args:
        node: the node.
        own: the line outside of PyTorch's own layers, where there is one.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    if own:
        lines = [line for line in lines if "/torch/nn/" not in line.replace("\\", "/")] or lines
    return lines[-1].replace('File "', "").replace('", line ', ":").replace(", in ", " in ") if lines else ""


class _Merge:
    def __init__(self, train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
        self.module, self.graph, self.evaluation = train, train.graph, evaluation
        self.theirs: dict[fx.Node, fx.Node] = {}  # eval node -> its node in the merged graph
        self.selects: dict[tuple[fx.Node, fx.Node] | None, fx.Node] = {}

    def run(self) -> None:
        mine, theirs = _body(self.graph), _body(self.evaluation.graph)
        self._match_inputs()
        # autojunk would drop ops that occur often, which in a network are nearly all
        matcher = SequenceMatcher(None, [_key(n) for n in mine], [_key(n) for n in theirs], autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            anchor = mine[i2] if i2 < len(mine) else self.graph.output_node()
            if tag == "equal":
                for t, e in zip(mine[i1:i2], theirs[j1:j2], strict=True):
                    self._join(t, e)
                continue
            for t in mine[i1:i2]:
                self._train_only(t)
            for e in theirs[j1:j2]:
                self._eval_only(e, anchor)
        self._join_outputs()
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
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"the model runs a part of its own under torch.autocast ({name}, a {type(value).__name__}), which one "
                "graph cannot hold for both modes: take that context out of the forward, or capture a submodule "
                "without it"
            )
        if _has(self.module, name) and not _same_value(self.module, self.evaluation, name):
            name = f"_eval_{name.replace('.', '_')}"
        if not _has(self.module, name):
            _register(self.module, name, value)
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.create_node("get_attr", name, name=node.name)

    def _join(self, t: fx.Node, e: fx.Node) -> None:
        """Make one node of two that do the same, up to their arguments."""
        self.theirs[e] = t
        ours, theirs = _arguments(t), _arguments(e)
        for name in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(name), theirs.get(name)
            if not _nodes(a) and not _nodes(b):
                if not _equal(a, b):
                    follow_mode(t, _place(t, name, a), a, b)
                continue
            merged = self._merge(t, a, b)
            if merged is not a:
                _replace(t, name, merged)

    def _join_outputs(self) -> None:
        """Give both modes their output; structures that differ become a pair, of which a mode takes its own."""
        t, e = self.graph.output_node(), self.evaluation.graph.output_node()
        ours, theirs = output_spec_of(self.graph), output_spec_of(self.evaluation.graph)
        if ours == theirs or ours is None or theirs is None:
            t.args = (self._merge(t, t.args[0], e.args[0]),)
            return
        values: Any = (*_leaves(t.args[0]), *_leaves(self._translate(e.args[0])))
        t.args = (values,)
        t.meta[ONLY] = "pair"
        set_output_spec(self.graph, both_specs(ours, theirs))

    def _merge(self, t: fx.Node, a: Any, b: Any) -> Any:
        """Return the argument that is `a` in train mode and `b` (of the eval graph) in eval mode."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if self.theirs[b] is a or self._same_size(a, b):
                return a
            return _either_contiguous(a, self.theirs[b]) or self._select(t, a, self.theirs[b])
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            merged = [self._merge(t, x, y) for x, y in zip(a, b, strict=True)]
            same = all(x is y for x, y in zip(merged, a, strict=True))
            return a if same else type(a)(merged)
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._merge(t, a[key], b[key]) for key in a}
        if not _nodes(a) and not _nodes(b) and _equal(a, b):
            return a
        return self._select(t, a, self._translate(b))

    def _translate(self, value: Any) -> Any:
        """Return an argument of the eval graph in nodes of the merged graph."""
        return map_arg(value, lambda n: self.theirs[n])

    def _same_size(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes are one and the same size of the inputs: each mode may read it off another tensor."""
        ours, theirs = a.meta.get("val"), b.meta.get("val")
        if not isinstance(ours, torch.SymInt) or not isinstance(theirs, torch.SymInt):
            return False
        return _formula(self.graph, ours) == _formula(self.evaluation.graph, theirs)

    def _select(self, t: fx.Node, train_value: Any, eval_value: Any) -> fx.Node:
        key = (
            (train_value, eval_value) if isinstance(train_value, fx.Node) and isinstance(eval_value, fx.Node) else None
        )
        if key in self.selects:
            return self.selects[key]
        sources = _nodes((train_value, eval_value))
        place = max(sources).next if sources else t
        while place.op in ("placeholder", "get_attr"):
            place = place.next
        with self.graph.inserting_before(place):
            node = self.graph.call_function(select, (train_value, eval_value, True))
        value = train_value.meta.get("val") if isinstance(train_value, fx.Node) else train_value
        node.meta = {k: v for k, v in t.meta.items() if k in ("stack_trace", "nn_module_stack")} | {"val": value}
        follow_mode(node, 2, True, False)
        if key is not None:
            self.selects[key] = node
        return node

    def _train_only(self, t: fx.Node) -> None:
        """Keep what training alone does out of eval mode; its values meet in selects."""
        t.meta[ONLY] = "train"
        # interpreters run every node of the graph: what is written into state there must be nothing in eval mode
        if _written_state(t) is not None and t.target is aten.add_.Tensor and not _nodes(t.args[1]):
            follow_mode(t, 1, t.args[1], 0)

    def _eval_only(self, e: fx.Node, anchor: fx.Node) -> None:
        with self.graph.inserting_before(anchor):
            self.theirs[e] = self.graph.node_copy(e, lambda n: self.theirs[n])
        self.theirs[e].meta[ONLY] = "eval"


def _either_contiguous(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """Return the one of two nodes that is the other made contiguous: the same values, good for both modes."""
    for node, other in ((a, b), (b, a)):
        if node.target is aten.contiguous.default and node.args == (other,) and not node.kwargs:
            node.meta.pop(ONLY, None)
            return node
    return None


def _body(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


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


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(value, lambda n: found.append(n) or n)
    return found


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


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


def _formula(graph: fx.Graph, size: torch.SymInt) -> str:
    """Return a size in terms of the sizes of the inputs, which are named alike in both modes."""
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, own in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if not is_concrete_int(own):
                names.setdefault(str(own), f"{node.name}.{dim}")
    return re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), str(size))


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
