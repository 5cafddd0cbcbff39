"""The oracle: run a graph before and after a rewrite, in float64 where it can, and compare."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchopt_passes._compat import flat_inputs
from torchopt_passes.graph.modes import MODE_ARGS, in_one_mode

__all__ = [
    "IN_FLOAT32",
    "Inputs",
    "StateInterpreter",
    "buffers_kept",
    "evaluate",
    "first_difference",
    "in_eval_mode",
    "relative_error",
    "sqnr",
]

IN_FLOAT32 = "in_float32"
"""The key of a node's meta that tells that it computes a grid: in float32, whatever the rest is run in."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Example inputs of a model: positional and keyword arguments."""


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest relative error of the tensors in two equal trees; infinite where they do not match.

    Formula: max|a - b| / max(1e-30, max|b|) for each floating tensor (0 where both are equal, NaN matching NaN);
    integer and boolean tensors must be equal. Returns the maximum over the tensors, dimensionless.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))  # doctest: +ELLIPSIS
        0.1...
    """
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    if len(left) != len(right):
        return float("inf")
    return max((_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _error(a: Any, b: Any) -> float:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return 0.0 if isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor) and a == b else float("inf")
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return float("inf")
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    if not a.is_floating_point() and not a.is_complex():
        return float("inf")
    a, b = a.detach().double(), b.detach().to(a.device).double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    scale = float(b[torch.isfinite(b)].abs().max()) if bool(torch.isfinite(b).any()) else 0.0
    return float(difference.max()) / max(scale, 1e-30)


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: 10 log10(sum b^2 / sum (a - b)^2); inf when equal.

    Example:
        >>> round(sqnr(torch.tensor([1.1, 2.0]), torch.tensor([1.0, 2.0])), 2)
        26.99
    """
    noise = float((actual.detach().double() - expected.detach().double()).square().sum())
    signal = float(expected.detach().double().square().sum())
    if noise == 0.0:
        return float("inf")
    return 10.0 * float(torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)))


@contextmanager
def buffers_kept(module: nn.Module) -> Generator[None]:
    """Run a block after which every buffer holds what it held before: what a run writes in place is undone."""
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            if name in saved and not torch.equal(buffer, saved[name]):
                buffer.copy_(saved[name])


@contextmanager
def in_eval_mode(module: nn.Module) -> Generator[None]:
    """Run a block with the module in eval mode; every submodule's mode and the RNG are as before afterwards."""
    modes = {child: child.training for child in module.modules()}
    was_training = module.training
    switched = _mode_dependent(module)
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        module.train(was_training)
        for child, mode in modes.items():
            child.training = mode
        if any(node.args != args or node.kwargs != kwargs for node, (args, kwargs) in switched.items()):
            for node, (args, kwargs) in switched.items():  # parts that were in another mode than the whole
                node.args, node.kwargs = args, kwargs
            module.recompile()  # pyright: ignore[reportCallIssue]


def _mode_dependent(module: nn.Module) -> dict[fx.Node, tuple[Any, Any]]:
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return {node: (node.args, node.kwargs) for node in nodes if MODE_ARGS in node.meta}


def evaluate(
    graph_module: fx.GraphModule,
    inputs: Inputs,
    *,
    dtype: torch.dtype | None = torch.float64,
    state: Mapping[str, torch.Tensor] | None = None,
    record: dict[str, Any] | None = None,
    interpreter: type[StateInterpreter] | None = None,
) -> list[Any]:
    """Run a captured graph in eval mode without touching it, and return its flat outputs.

    Args:
        graph_module: the graph; its parameters, buffers and mode are untouched.
        inputs: positional and keyword arguments.
        dtype: floating tensors (state, inputs, and casts inside the graph) are taken to this dtype; None keeps theirs.
        state: tensors by fqn that stand in for the graph's own.
        record: when given, receives the value of every node by name.
        interpreter: how its nodes are run; by default as they are.
    """
    flat = [_cast(value, dtype) for value in flat_inputs(graph_module, *inputs)]
    with in_eval_mode(graph_module):
        run = (interpreter or StateInterpreter)(graph_module, dtype, state or {}, record).run
        with buffers_kept(graph_module):
            output = run(*flat, enable_io_processing=False)
    return pytree.tree_leaves(output)


def first_difference(expected: Mapping[str, Any], actual: Mapping[str, Any], graph: fx.Graph, tolerance: float) -> str:
    """Return the first node, in the graph's order, whose value differs, with op and the user's line."""
    for node in graph.nodes:
        if node.op != "call_function" or node.name not in expected or node.name not in actual:
            continue
        error = relative_error(actual[node.name], expected[node.name])
        if error > tolerance:
            where = _user_line(node)
            return f"first node that differs: {node.name} ({node.target}), error {error:.1e}{where}"
    return "no single node can be named: only the outputs differ"


class StateInterpreter(fx.Interpreter):
    """Run a graph with other state and another floating dtype, casts inside the graph included."""

    def __init__(
        self,
        module: fx.GraphModule,
        dtype: torch.dtype | None,
        state: Mapping[str, torch.Tensor],
        record: dict[str, Any] | None,
    ) -> None:
        super().__init__(module, graph=in_one_mode(module.graph, training=False))
        self._dtype, self._state, self._record = dtype, state, record

    def run_node(self, n: fx.Node) -> Any:  # noqa: D102
        value = self._run_in_float32(n) if self._dtype is not None and IN_FLOAT32 in n.meta else super().run_node(n)
        if self._record is not None:
            # in-place ops (batch-norm counters) would change a recorded value later
            self._record[n.name] = pytree.tree_map_only(torch.Tensor, torch.clone, value)
        return value

    def _run_in_float32(self, n: fx.Node) -> Any:
        # both sides of a comparison land on the same step, and casts to narrow floats are what they are
        args, kwargs = pytree.tree_map_only(torch.Tensor, _narrow, self.fetch_args_kwargs_from_env(n))
        return _cast(n.target(*args, **kwargs), self._dtype)  # pyright: ignore[reportCallIssue]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: D102
        value = self._state.get(target)
        return _cast(super().get_attr(target, args, kwargs) if value is None else value, self._dtype)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: D102
        if self._dtype is None:
            return super().call_function(target, args, kwargs)
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts the dtype of the original run
        if str(target).startswith("quantized_decomposed."):
            # the grid is defined in float32: rounded there, both sides of a comparison land on the same step
            args = pytree.tree_map_only(torch.Tensor, lambda t: _cast(t, torch.float32), args)
            return _cast(super().call_function(target, args, kwargs), self._dtype)
        swap = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), self._dtype)
        args, kwargs = pytree.tree_map_only(torch.dtype, lambda d: swap.get(d, d), (args, kwargs))
        return super().call_function(target, args, kwargs)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and dtype is not None else value


def _narrow(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype is torch.float64 else value


def _user_line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f", at {lines[-1]}" if lines else ""
