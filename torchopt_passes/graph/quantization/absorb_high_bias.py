"""AbsorbHighBias: move what is high in a bias through the ReLU behind it into the next layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.affine import along
from torchopt_passes.functional.equalization import absorbed_bias, carried_bias
from torchopt_passes.graph.axes import base_name
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm, batch_norms, foldable_into
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.rescale import SetTensor, usable_sites
from torchopt_passes.graph.quantization.scale_pairs import Reader, Site
from torchopt_passes.graph.quantization.targets import KINDS
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.verify import Inputs, StateInterpreter, evaluate

__all__ = ["AbsorbHighBias"]

_WORDS = "max_pool adaptive_avg_pool mean flatten view reshape squeeze contiguous alias detach"
_PASSED = frozenset(_WORDS.split())
"""What a value that is the same everywhere passes unchanged."""


class AbsorbHighBias(GraphPass):
    """Take off a batch norm's bias what lies three deviations above zero, and give it to the layer behind the ReLU.

    Nearly all values of such a channel are above c = beta - 3 |gamma|: a ReLU only adds that c to them. The range of
    the activation gets smaller by it. `EqualizeLayers` makes biases high where it divides by a small scale: run this
    after it, and before `InsertFakeQuant`. Batch norms stay in place; behind a layer without a bias it is the running
    mean of its batch norm that changes.

    Left alone, with the reason: channels that anything but layers reads through a ReLU (residual sums), layers that
    pad their input (c would be missing at the border), batch norms that were folded already.

    Args:
        deviations: how many deviations below the mean a value still counts.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3.

    Proof:
        relu(x - c) + c = max(x, c): outputs equal those of the graph before with each such ReLU as max(x, c), in
        float64 within 1e-9, with biases whose sum with W c is the stored one. The model itself changes where values
        are below c: 0.135 % of them when they are normal.

    Example:
        >>> AbsorbHighBias(deviations=4.0).recipe()
        {'absorb_high_bias': {'deviations': 4.0}}
    """

    claim = "outputs equal the outputs before with each such ReLU as max(x, c)"

    deviations: float = 3.0

    def check(self) -> None:
        """Refuse a negative number."""
        if self.deviations < 0.0:
            raise ConfigError(f"AbsorbHighBias: deviations must be >= 0, not {self.deviations}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Find the batch norms with high biases, and who takes them."""
        sites, skips = usable_sites(graph_module, context or PassContext())
        places = _Places(graph_module)
        makers: list[Edit] = []
        values: dict[str, torch.Tensor] = {}
        carried: dict[str, list[str]] = {}
        for site, reason in ((site, places.why_not(site)) for site in sites):
            if reason:
                skips.append(Skip(target=site.name, reason=reason))
                continue
            fqn = site.makers[1].fqn
            gamma, beta = (get_tensor(graph_module, axis.fqn).detach() for axis in site.makers)
            lower = beta - absorbed_bias(beta, gamma, self.deviations)
            share = beta.double() - lower.double()
            if not bool((share > 0).any()):
                skips.append(Skip(target=site.name, reason="nothing to do: no bias is that high"))
                continue
            numbers = {"absorbed_max": float(share.max()), "channels": float((share > 0).sum())}
            reason = f"absorbed by {site.partners}, through the ReLU"
            makers.append(SetTensor(target=fqn, reason=reason, numbers=numbers, value=lower.clone()))
            for reader in site.readers:
                name, added = places.takes(reader, share)
                values[name] = values.get(name, get_tensor(graph_module, name).detach().double()) + added
                carried.setdefault(name, []).append(fqn)
        takers = [
            SetTensor(
                target=name,
                reason=f"takes what is high in {', '.join(carried[name])}",
                value=value.to(get_tensor(graph_module, name).dtype),
            )
            for name, value in values.items()
        ]
        return Plan((*makers, *takers), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return, in float64, the biases that give exactly the stored ones once W c is added."""
        places, shares = _Places(graph_module), _shares(graph_module, plan)
        stored = {edit.target: edit.value.double() for edit in plan.edits if isinstance(edit, SetTensor)}
        state: dict[str, torch.Tensor] = {}
        for site in usable_sites(graph_module, PassContext())[0]:
            share = None if places.why_not(site) else shares.get(site.makers[1].fqn)
            for name, added in () if share is None else (places.takes(reader, share) for reader in site.readers):
                state[name] = state.get(name, stored[name].to(added.device)) - added
        return state

    def expect(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        inputs: Inputs,
        *,
        dtype: torch.dtype | None,
        record: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Run the graph before, with each ReLU behind a changed batch norm as max(x, c)."""
        shares, first = _shares(graph_module, plan), aliases(graph_module)
        floors: dict[str, torch.Tensor] = {}
        for norm in batch_norms(graph_module.graph):
            share = shares.get(first.get(str(getattr(norm.beta, "target", "")), ""))
            if share is not None:
                floors |= {reader.name: along(share, norm.node.meta["val"].ndim, 1) for reader in _readers(norm.node)}

        class Floored(StateInterpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.name in floors:
                    value = torch.maximum(value, floors[n.name].to(value))
                    if record is not None:
                        record[n.name] = value
                return value

        state = self.reference_state(graph_module, plan)
        return evaluate(graph_module, inputs, dtype=dtype, state=state, record=record, interpreter=Floored)


class _Places:
    """Where a bias can leave and arrive."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module, self._first = graph_module, aliases(graph_module)
        self._nodes: dict[str, fx.Node] = {node.name: node for node in graph_module.graph.nodes}

    def why_not(self, site: Site) -> str:
        """Return why nothing of a site's bias can move, or ''."""
        node = self._nodes[site.node]
        norm = BatchNorm.of(node)
        if norm is None or norm.gamma is None or norm.beta is None or len(site.makers) != 2:
            return f"{base_name(node)} {node.name} is no batch norm that says how its values are distributed"
        relus = _readers(node)
        if len(relus) != 1 or base_name(relus[0]) != "relu":
            return f"no ReLU alone reads {node.name}"
        ends = {reader.node for reader in site.readers}
        blocked = next((n for n in _between(relus[0], ends) if base_name(n).rstrip("123d") not in _PASSED), None)
        if blocked is not None:
            return f"{base_name(blocked)} ({blocked.name}) is between the ReLU and what reads it"
        return next((reason for reason in map(self._why_not_taken, site.readers) if reason), "")

    def takes(self, reader: Reader, share: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Return the tensor of a reader that takes a share of each channel, and what is added to it, in float64."""
        index = reader.index.to(share.device)
        value = torch.where(index < 0, 0.0, share[index])
        weight = get_tensor(self._graph_module, reader.axis.fqn).detach().double()
        added = carried_bias(weight, value.double(), reader.axis.groups)
        fqn, sign = self._taker(reader)
        return fqn, sign * added

    def _why_not_taken(self, reader: Reader) -> str:
        node = self._nodes[reader.node]
        if reader.axis.dim != 1 or "conv_transpose" in str(node.target):
            return f"the weight of {node.name} is stored transposed"
        padding: Any = node.args[4] if "conv" in str(node.target) and len(node.args) > 4 else 0
        pads = padding == "same" or (isinstance(padding, list | tuple) and any(padding))
        if pads and get_tensor(self._graph_module, reader.axis.fqn).ndim > 2:
            return f"{node.name} pads its input with zeros: the bias would be missing at the border"
        fqn, _ = self._taker(reader)
        if not fqn:
            return f"{node.name} has no bias, and no batch norm is behind it"
        uses = [n for n in self._graph_module.graph.find_nodes(op="get_attr") if self._first.get(str(n.target)) == fqn]
        return f"{fqn} is used more than once" if sum(len(n.users) for n in uses) != 1 else ""

    def _taker(self, reader: Reader) -> tuple[str, float]:
        """Return the bias that takes it, or the running mean of the batch norm behind, and the sign; or ''."""
        node = self._nodes[reader.node]
        position = KINDS[node.target].bias
        bias = node.args[position] if position is not None and position < len(node.args) else None
        if isinstance(bias, fx.Node):
            return self._first.get(str(bias.target), ""), 1.0
        norms = [norm for norm in map(BatchNorm.of, node.users) if norm is not None]
        norm = next((n for n in norms if foldable_into(n)[0] is node), None)
        return ("", 1.0) if norm is None or norm.mean is None else (self._first.get(str(norm.mean.target), ""), -1.0)


def _shares(graph_module: fx.GraphModule, plan: Plan) -> dict[str, torch.Tensor]:
    """Return c of each batch norm's bias that the plan lowers, exactly: what it was, less what it becomes."""
    edits = {edit.target: edit.value for edit in plan.edits if isinstance(edit, SetTensor)}
    first = aliases(graph_module)
    betas = {first.get(str(norm.beta.target)) for norm in batch_norms(graph_module.graph) if norm.beta is not None}
    old = {fqn: get_tensor(graph_module, fqn).detach().double() for fqn in edits.keys() & betas}
    return {fqn: before - edits[fqn].to(before.device).double() for fqn, before in old.items()}


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is not torch.ops.aten.sym_size.int]


def _between(start: fx.Node, ends: set[str]) -> Iterator[fx.Node]:
    """Yield every node between one and those where the channels end."""
    pending = _readers(start)
    while pending:
        node = pending.pop()
        if node.name not in ends:
            yield node
            pending += _readers(node)
