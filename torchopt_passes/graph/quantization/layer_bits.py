"""Bits by layer: which width each fake-quantizer gets when some layers are given their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.quantization.annotate import Annotation
from torchopt_passes.graph.quantization.operations import Operation, module_path
from torchopt_passes.graph.quantization.targets import Target
from torchopt_passes.graph.tensors import check_patterns, matching_pattern

__all__ = ["FLOAT_BITS", "BitsOf", "check_bits", "float_layers", "quantizer_bits"]

FLOAT_BITS = (0, 32)
"""Widths that keep a layer in float."""
_DONE = "nothing to do"


@dataclass(frozen=True)
class BitsOf:
    """One option that gives some layers their own width.

    Args:
        option: its name, for messages.
        bits: glob on a weight's fqn, a module path or a node -> bits; the first that matches counts.
        default: bits of the layers that no glob matches.
    """

    option: str
    bits: Mapping[str, int]
    default: int

    def pattern(self, operation: Operation) -> str | None:
        """Return the first glob, in the order of the option, that matches an operation by one of its names."""
        names = names_of(operation)
        return next((p for p in self.bits if any(matching_pattern(name, (p,)) for name in names)), None)


def names_of(operation: Operation) -> list[str]:
    """Return the names a user knows an operation by: its weight, the module around it, its node."""
    names = [operation.weight.fqn if operation.weight else "", module_path(operation.node), operation.node.name]
    return [name for name in names if name]


def check_bits(option: BitsOf, target: Target) -> None:
    """Refuse a width that is neither that of a grid of the target nor, for a glob, float.

    Raises:
        ConfigError: names the option and the glob, and the targets that take wider grids.
    """
    most = 16 if target.any_grid else 8
    asked = [(option.option.removesuffix("_of"), option.default, "")]
    for pattern, width in option.bits.items():
        if width not in FLOAT_BITS:
            asked.append((f"{option.option}[{pattern!r}]", width, ", or 0 or 32 for float"))
    for name, width, otherwise in asked:
        if not 2 <= width <= most:
            wider = f" (target {target.name!r}: {target.no_wide_grid})" if most < width <= 16 else ""
            raise ConfigError(f"InsertFakeQuant: {name} must be 2 to {most}{otherwise}, not {width}{wider}")


def float_layers(graph_module: fx.GraphModule, operations: list[Operation], options: list[BitsOf]) -> dict[str, str]:
    """Return the operations that the options keep in float, by node name, each with the reason.

    Raises:
        ConfigError: a glob matches no operation: it is a typo.
    """
    found: dict[str, str] = {}
    for bits_of in options:
        unused = set(bits_of.bits)
        for operation in operations:
            pattern = bits_of.pattern(operation)
            unused -= {p for p in unused if any(matching_pattern(name, (p,)) for name in names_of(operation))}
            if pattern is not None and bits_of.bits[pattern] in FLOAT_BITS:
                found[operation.node.name] = f"float: {bits_of.option} gives {pattern!r} {bits_of.bits[pattern]} bits"
        if any(operation.why_float.startswith(_DONE) for operation in operations):
            # weights behind a fake-quantizer go by other names here: that the name exists must do
            check_patterns(graph_module, sorted(unused), bits_of.option)
        elif unused:
            known = [name for operation in operations for name in names_of(operation)]
            close = get_close_matches(min(unused), known, n=3, cutoff=0.4) or known[:3]
            raise ConfigError(f"{bits_of.option} {sorted(unused)} match no matrix operation; some are {close}")
    return found


def quantizer_bits(
    found: Annotation, graph: fx.Graph, weights: BitsOf, activations: BitsOf
) -> dict[str, tuple[int, str]]:
    """Return the bits of each fake-quantizer that an operation reads, and why.

    A value that several operations read is rounded once: it gets the widest of what they want. Sums and outputs of
    convolutions follow the operations that read the same value.

    Args:
        found: places and operations.
        graph: the graph they lie in.
        weights: bits of weights.
        activations: bits of activations.
    """
    edges = {(place.node, user): place.quantizer for place in found.places for user in place.users}
    nodes = {node.name: node for node in graph.nodes}
    votes: dict[str, dict[str, tuple[int, str | None]]] = defaultdict(dict)
    for operation in found.operations:
        if operation.why_float:
            continue
        reader = nodes[operation.node.name]
        sides = [
            (activations, name) for value in operation.inputs for name in _behind(nodes[value.name], reader, edges)
        ]
        weight = operation.weight
        if weight is not None:
            sides.append((weights, edges[weight.node.name, weight.user.name]))
        for bits_of, quantizer in sides:
            pattern = bits_of.pattern(operation)
            width = bits_of.default if pattern is None else bits_of.bits[pattern]
            votes[quantizer][operation.node.name] = (width, pattern)
    return {quantizer: _widest(wishes) for quantizer, wishes in votes.items()}


def _behind(value: fx.Node, user: fx.Node, edges: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Yield the quantizers that an edge reads: on it, or on the edges it comes from."""
    pending, seen = [(value, user)], set[fx.Node]()
    while pending:
        source, reader = pending.pop()
        quantizer = edges.get((source.name, reader.name))
        if quantizer is not None:
            yield quantizer
        elif source not in seen:
            seen.add(source)
            pending += [(parent, source) for parent in source.all_input_nodes]


def _widest(wishes: Mapping[str, tuple[int, str | None]]) -> tuple[int, str]:
    bits = max(width for width, _ in wishes.values())
    if all(pattern is None for _, pattern in wishes.values()):
        return bits, ""
    if len({width for width, _ in wishes.values()}) == 1:
        return bits, f"{bits} bits by {next(repr(p) for _, p in wishes.values() if p is not None)}"
    wants = ", ".join(f"{name} {width}" for name, (width, _) in wishes.items())
    return bits, f"{bits} bits, the widest that its readers want ({wants})"
