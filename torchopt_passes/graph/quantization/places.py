"""The fake-quantizers that a graph calls, each with the user's name of what it rounds: what passes work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from torchopt_passes.errors import PassError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers

__all__ = ["QuantizerPlace", "check_ranges", "chosen_places", "quantizer_places"]


@dataclass(frozen=True)
class QuantizerPlace:
    """A fake-quantizer of a prepared graph.

    Args:
        name: such as ``"fake_quant.conv1_weight"``.
        target: what it rounds: the weight's fqn, or the node.
        quantizer: the module.
    """

    name: str
    target: str
    quantizer: FakeQuantizer


def quantizer_places(graph_module: fx.GraphModule) -> list[QuantizerPlace]:
    """Return every fake-quantizer that is called, in the order of its first call."""
    known = dict(fake_quantizers(graph_module))
    found: dict[str, QuantizerPlace] = {}
    for node in graph_module.graph.find_nodes(op="call_module", sort=True) if known else ():
        name, value = str(node.target), node.args[0]
        is_state = isinstance(value, fx.Node) and value.op == "get_attr"
        if name in known and name not in found:
            found[name] = QuantizerPlace(name, str(value.target) if is_state else str(value), known[name])
    return list(found.values())


def chosen_places(
    graph_module: fx.GraphModule, context: PassContext, why_not: Callable[[FakeQuantizer], str] = lambda _: ""
) -> tuple[list[QuantizerPlace], list[Skip]]:
    """Return the fake-quantizers that a pass works on, and the others with their reasons.

    Args:
        graph_module: a prepared graph.
        context: its skip patterns are obeyed.
        why_not: why the pass leaves one alone; empty when it does not.
    """
    every = quantizer_places(graph_module)
    if not every:
        reason = "nothing to do: the graph has no fake-quantizers (InsertFakeQuant comes first)"
        return [], [Skip(target="graph", reason=reason)]
    chosen: list[QuantizerPlace] = []
    skips: list[Skip] = []
    for place in every:
        pattern = context.skipped_by(place.target) or context.skipped_by(place.name)
        reason = f"skip pattern {pattern!r}" if pattern is not None else why_not(place.quantizer)
        if reason:
            skips.append(Skip(target=place.target, reason=reason))
        else:
            chosen.append(place)
    return chosen, skips


def check_ranges(pass_name: str, places: Iterable[QuantizerPlace], first: str) -> None:
    """Refuse fake-quantizers that have no range yet.

    Args:
        pass_name: for the message.
        places: that must have one.
        first: what gives them one.

    Raises:
        PassError: names the first three.
    """
    empty = [f"{place.target} ({place.name})" for place in places if not place.quantizer.has_range]
    if empty:
        shown = ", ".join(empty[:3])
        raise PassError(f"{pass_name}: {len(empty)} fake-quantizers have seen no data: {shown}: {first}, first")
