"""One model of the matrix from capture to int8, and what is promised on the way, in numbers."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import torchopt_passes as top
from tests.graph import promises
from tests.hf_models import HFModel
from torchopt_passes.graph.quantization import ConvertQuantized, InsertFakeQuant
from torchopt_passes.graph.quantization.targets import KINDS, TARGETS
from torchopt_passes.graph.verify import evaluate, in_eval_mode

__all__ = ["Row", "broken_promises", "quantize_model"]

aten = torch.ops.aten
# a rounded value is still rounded behind these
_MOVES = {
    *TARGETS["inductor"].follow,
    *TARGETS["onnx"].follow,
    *(aten.dropout.default, aten.feature_dropout.default, aten.clone.default, aten.contiguous.default),
    *(aten.alias.default, aten.detach.default, aten.t.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.chunk.default, aten.unbind.int, aten.lift_fresh_copy.default),
}


@dataclass(frozen=True)
class Row:
    """What happened to one model for one target.

    Args:
        operations: matrix operations of the graph.
        int8: how many of them are rounded.
        float_because: why the others are not -> how many.
        silent: nodes that multiply matrices, by PyTorch's own FLOP counter, and are not reported.
        not_lowered: operations reported as int8 of which an operand is no integer in the converted graph.
        off: outputs of the prepared graph with rounding off, against the source: largest difference.
        rounded: of the prepared graph with rounding on: relative distance of the outputs from the source's.
        converted: of the converted graph: relative distance from the prepared graph's.
        other_sizes: the same at batch sizes 1 and 3, and another length where it is open.
        exact: of both graphs in float64: their largest relative distance. None where float32 shows that they are one.
        proof: the proof of the conversion.
        intact: weights of the source, and outputs of the prepared graph, are what they were before.
    """

    operations: int
    int8: int
    float_because: dict[str, int]
    silent: list[str]
    not_lowered: list[str]
    off: float
    rounded: float
    converted: float
    other_sizes: float
    exact: float | None
    proof: str
    intact: bool


def broken_promises(row: Row) -> list[str]:
    """Return what does not hold.

    The proof compares in float64, between the roundings to the grid, and is what shows that both graphs are the same.
    In float32 a batch norm that is folded sums in another order, and of the values that lie on the border between two
    steps some fall to the other side; deep nets carry that on, up to the noise of rounding itself. Where that is more
    than rounding does (EfficientNetV2), float32 cannot tell, and both graphs run in float64, from input to output.
    """
    same = row.exact is not None and row.exact <= 1e-6
    checks = {
        "a matrix operation is not reported": not row.silent,
        "an operation reported as int8 reads floats": not row.not_lowered,
        "with rounding off it is not the source": row.off <= 1e-6,
        "the converted graph is not proven": row.proof != "failed",
        "the converted graph is not the prepared one": same or row.converted <= row.rounded,
        "nor at other batch sizes and lengths": same or row.other_sizes <= row.rounded,
        "source or prepared graph were changed": row.intact,
    }
    return [name for name, holds in checks.items() if not holds]


def quantize_model(spec: HFModel, target: str, *, prove: bool = True) -> Row:
    """Capture, prepare, calibrate and convert a model, and measure."""
    torch.manual_seed(0)
    model = spec.build().eval()
    source, case = promises.reference(model), spec.case(2)
    graph = top.capture(model, *case, prove=False).eval()
    context = top.PassContext(calibration=[case[1] or case[0]], prove=prove)
    insert = InsertFakeQuant(target=target, qat=False)
    operations = insert.annotate(graph, context).operations
    reported = {operation.node.name for operation in operations}
    silent = sorted(_multiplying(graph, case) - reported)
    inserted = insert(graph, context).report
    top.set_fake_quant(graph, False)
    off = promises.in_eval(graph, source, case)
    top.Calibrate(method="minmax")(graph, context)
    wanted, state = _outputs(graph, case), copy.deepcopy(graph.state_dict())
    result = top.on_copy(ConvertQuantized())(graph, context)
    converted = result.graph_module.eval()
    kept = all(torch.equal(state[name], tensor) for name, tensor in graph.state_dict().items())
    others = [spec.case(1), spec.case(3, other=True)]
    rounded = _relative(wanted, _outputs(source, case))
    apart = [_relative(_outputs(converted, one), _outputs(graph, one)) for one in (case, *others)]
    why = Counter(row.reason for row in inserted.skipped)
    return Row(
        operations=len(operations),
        int8=sum(not operation.why_float for operation in operations),
        float_because=dict(why),
        silent=silent,
        not_lowered=_not_lowered(converted, {op.node.name for op in operations if not op.why_float}),
        off=off,
        rounded=rounded,
        converted=apart[0],
        other_sizes=max(apart[1:]),
        exact=None if max(apart) <= rounded else max(_exact(converted, graph, one) for one in (case, *others)),
        proof=result.report.proof.status,
        intact=kept
        and all(torch.equal(a, b) for a, b in zip(_outputs(graph, case), wanted, strict=True))
        and promises.distance(dict(model.state_dict()), dict(source.state_dict())) == 0,
    )


class _FlopsByNode(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        if n.op == "call_function" and counter.get_total_flops():
            self.found.add(n.name)
        return value


def _multiplying(graph: fx.GraphModule, case: promises.Case) -> set[str]:
    """Return the nodes that multiply; both modes' nodes run, on a copy: an auxiliary head has its statistics taken."""
    from torchopt_passes._compat import flat_inputs

    graph = copy.deepcopy(graph)
    with torch.no_grad(), in_eval_mode(graph):
        interpreter = _FlopsByNode(graph)
        interpreter.run(*flat_inputs(graph, *case), enable_io_processing=False)
    return interpreter.found


def _not_lowered(converted: fx.GraphModule, names: set[str]) -> list[str]:
    nodes = {node.name: node for node in converted.graph.nodes}
    found: list[str] = []
    for name in sorted(names):
        node = nodes.get(name)
        if node is None or node.target not in KINDS:
            found.append(f"{name}: gone")
            continue
        operands = KINDS[node.target]
        sides = (operands.activation, operands.weight)
        found += [f"{name}: operand {side}" for side in sides if not _from_integers(node.args[side])]
    return found


def _from_integers(value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    if "dequantize_per" in str(value.target):
        return True
    sources = [n for n in value.all_input_nodes if _is_float(n)]
    moves = value.target in _MOVES or getattr(value.target, "__name__", "") == "getitem"
    return moves and bool(sources) and all(_from_integers(source) for source in sources)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def _outputs(module: Any, case: promises.Case) -> list[torch.Tensor]:
    with torch.no_grad():
        return _floats(module(*case[0], **case[1]))


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _exact(converted: fx.GraphModule, graph: fx.GraphModule, case: promises.Case) -> float:
    return _relative(_floats(evaluate(converted, case)), _floats(evaluate(graph, case)))


def _relative(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the distance of the outputs taken together, relative to their size; masked -inf counts where both are."""
    finite = [
        (a[torch.isfinite(w)].double(), w[torch.isfinite(w)].double()) for a, w in zip(actual, wanted, strict=True)
    ]
    difference = sum(float((a - w).square().sum()) for a, w in finite) ** 0.5
    return difference / max(sum(float(w.square().sum()) for _, w in finite) ** 0.5, 1e-30)
