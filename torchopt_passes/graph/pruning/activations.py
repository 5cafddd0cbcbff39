"""Importance from activations: where the channels of a group are made and read, and statistics of them over batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional import importance, units
from torchopt_passes.functional.dependence import channel_dependence, gaussian_kernel
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.channels import ChannelGroup, GroupAxis
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.pruning.weight_scores import axis_scores
from torchopt_passes.graph.tensors import aliases, get_tensor
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode
from torchopt_passes.graph.weights import MATRIX_OPS, input_dim, parameter_behind
from torchopt_passes.progress import track

__all__ = ["MatrixUse", "activation_scores", "followed", "matrix_uses"]

aten = torch.ops.aten

_RESHAPES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default}
_ASIDE = {aten.sym_size.int, aten._assert_tensor_metadata.default}
_MAKE_ZEROS = {"relu", "relu6", "hardswish", "hardsigmoid"}
_MAKE_ZEROS_FROM = {"hardtanh": 1, "clamp": 1, "clamp_min": 1, "threshold": 2}  # op -> position of the lowest value
_POINTWISE = {"gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "sigmoid", "tanh", "softplus"}

Statistic = Callable[[torch.Tensor, int], torch.Tensor | None]
"""A value and the dimension of its channels -> one number for each channel; None where it cannot tell."""

Place = tuple[str, int]
"""Name of a node, and the dimension of its value that holds channels, from the end."""


@dataclass(frozen=True)
class MatrixUse:
    """One use of a parameter as the weight of a convolution, a linear or a matrix product.

    Args:
        node: the operation.
        fqn: of the weight (the first one of a tied tensor).
        in_dim: the weight's dimension that is summed over.
        out_dim: the weight's dimension that makes the channels of the result.
        source: the value that the weight multiplies.
        read_dim: dimension of the channels in that value, from the end.
        made_dim: dimension of the channels in the result, from the end.
    """

    node: fx.Node
    fqn: str
    in_dim: int
    out_dim: int
    source: fx.Node
    read_dim: int
    made_dim: int


def matrix_uses(graph_module: fx.GraphModule, graph: fx.Graph) -> list[MatrixUse]:
    """Return the uses of weights whose channels are plain to see; products of stacks of matrices are left out.

    Args:
        graph_module: holds the parameters.
        graph: its graph, or what one mode runs of it.
    """
    first = aliases(graph_module)
    found: list[MatrixUse] = []
    for node in graph.nodes:
        for position in MATRIX_OPS.get(node.target, ()) if node.op == "call_function" else ():
            name = parameter_behind(node.args[position]) if position < len(node.args) else None
            if name in first and isinstance(get_tensor(graph_module, name), torch.nn.Parameter):
                use = _use(node, position, name, get_tensor(graph_module, name).ndim)
                found += [] if use is None else [MatrixUse(node, first[name], *use)]
    return found


def _use(node: fx.Node, position: int, name: str, ndim: int) -> tuple[int, int, fx.Node, int, int] | None:
    op = str(node.target)
    plain = "conv" in op or "linear" in op
    source = node.args[{0: 1, 1: 0, 2: 1}[position]]
    contracted = input_dim(node, name)
    if not isinstance(source, fx.Node) or contracted is None or (ndim != 2 and not plain):
        return None
    if plain and _reshaped(node.args[position]):
        return None  # which of its dimensions the operation sums over is hidden
    if node.target is aten.convolution.default and node.args[6]:
        contracted = 0  # transposed
    if position == 0:  # W @ x: the channels are rows of x, or all of a vector
        read = -1 if _ndim(source) == 1 else -2
        return contracted, 1 - contracted, source, read, read
    channels = 1 - ndim if "conv" in op else -1
    return contracted, 1 - contracted, source, channels, channels


def followed(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return the value of an operation's channels behind the batch norm and activation that follow it alone.

    Returns:
        The last such node, the operation itself when none follows; whether it is an activation that makes zeros.
    """
    while True:
        users = [user for user in node.users if user.target not in _ASIDE]
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node or users[0].op != "call_function":
            return node, False
        user = users[0]
        name = str(user.target).removeprefix("aten.").split(".")[0].removesuffix("_")
        if name in _MAKE_ZEROS or (name in _MAKE_ZEROS_FROM and user.args[_MAKE_ZEROS_FROM[name] :][:1] == (0,)):
            return user, True
        if name in _POINTWISE or name in _MAKE_ZEROS_FROM:
            return user, False
        if user.target is not aten.batch_norm.default:
            return node, False
        node = user


def activation_scores(
    graph_module: fx.GraphModule, groups: Sequence[ChannelGroup], batches: Iterable[Any] | None, name: str
) -> dict[str, list[torch.Tensor]]:
    """Return what each place in the model where a group's channels are seen tells about its units.

    Args:
        graph_module: a captured graph; it runs in eval mode and is as before afterwards.
        groups: groups of its channels.
        batches: of the context's `calibration`; they stream, only sums over channels are kept.
        name: ``"apoz"`` and ``"mean_activation"`` look at the outputs of the operations that make the channels,
            ``"wanda"`` at the inputs of those that read them, ``"hsic"`` at the outputs, next to those of the model.

    Returns:
        Name of the group -> scores, each (group.size,); none where there is nothing to look at.
    """
    if batches is None:
        raise ConfigError("importance from activations needs data: PassContext(calibration=[batch, ...])")
    cut = {(axis.fqn, axis.dim) for group in groups for axis in group.axes}
    statistic = {"apoz": importance.active_share, "mean_activation": importance.mean_activation}
    with in_eval_mode(graph_module):
        graph = in_one_mode(graph_module.graph, training=False)  # a copy of it keeps the mode it was made in
        uses = matrix_uses(graph_module, graph)
        if name == "wanda":
            places = {(use.source.name, use.read_dim) for use in uses if (use.fqn, use.in_dim) in cut}
            seen = _means(graph_module, graph, places, batches, lambda _: importance.mean_square)
            return {group.name: _wanda(graph_module, group, uses, seen) for group in groups}
        made: dict[tuple[str, int], list[Place]] = defaultdict(list)
        for use in uses:
            node, zeros = followed(use.node)
            if (use.fqn, use.out_dim) in cut and (zeros or name != "apoz"):
                made[use.fqn, use.out_dim].append((node.name, use.made_dim))
        places = {place for found in made.values() for place in found}
        if name == "hsic":
            seen = _means(graph_module, graph, places, batches, _dependence_on)
        else:
            seen = _means(graph_module, graph, places, batches, lambda _: statistic[name])
    return {
        group.name: [
            _unit_means(seen[place][0], axis, group.size)
            for axis in group.axes
            for place in made.get((axis.fqn, axis.dim), ())
            if place in seen
        ]
        for group in groups
    }


def _wanda(
    graph_module: fx.GraphModule,
    group: ChannelGroup,
    uses: Sequence[MatrixUse],
    seen: Mapping[Place, tuple[torch.Tensor, int]],
) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for axis in group.axes:
        readers = [use for use in uses if (use.fqn, use.in_dim) == (axis.fqn, axis.dim)]
        places = [(use.source.name, use.read_dim) for use in readers]
        places = [place for place in places if place in seen]
        if not places:
            continue
        rows = units.channel_rows(get_tensor(graph_module, axis.fqn), axis.dim)
        # a weight that is used twice reads all these inputs; grouped convolutions read n channels in each group
        norms = torch.stack([seen[place][0] * seen[place][1] for place in places]).sum(0).sqrt()
        scores = importance.wanda(rows, norms.reshape(-1, len(rows)).T)
        found.append(axis_scores(scores, axis, group.size))
    return found


def _dependence_on(run: Callable[[], Any]) -> Statistic:
    """Return the dependence of channels on what the model puts out for the same samples, for a batch."""
    outputs = [leaf for leaf in pytree.tree_leaves(run()) if isinstance(leaf, torch.Tensor)]
    features = next((out for out in outputs if out.is_floating_point() and out.ndim > 1), None)
    if features is None:
        raise ConfigError('importance "hsic" compares channels with the outputs, but the model has none by sample')
    kernel = gaussian_kernel(features.detach().double().flatten(1))

    def statistic(value: torch.Tensor, dim: int) -> torch.Tensor | None:
        by_sample = value.ndim > 1 and dim % value.ndim != 0 and len(value) == len(kernel)
        return channel_dependence(value, dim, kernel) if by_sample else None

    return statistic


def _means(
    graph_module: fx.GraphModule,
    graph: fx.Graph,
    places: set[Place],
    batches: Iterable[Any],
    statistic_for: Callable[[Callable[[], Any]], Statistic],
) -> dict[Place, tuple[torch.Tensor, int]]:
    """Return for each place the statistic of each channel over all batches, and over how many positions it is.

    Args:
        graph_module: the graph.
        graph: what eval mode runs of it.
        places: where to look.
        batches: of data.
        statistic_for: returns the statistic for a batch; it is given what runs the model on it, should it need that.
    """
    watcher = _Watcher(graph_module, graph, places)
    plain = fx.Interpreter(graph_module, graph=graph)
    count = 0
    with buffers_kept(graph_module):
        for batch in track(batches, "Scoring channels"):
            inputs = flat_inputs(graph_module, *as_call(batch))
            watcher.statistic = statistic_for(lambda: plain.run(*inputs, enable_io_processing=False))  # noqa: B023
            watcher.run(*inputs, enable_io_processing=False)
            count += 1
    if not count:
        raise ConfigError("context.calibration is empty (a generator that was used up?)")
    return watcher.seen


class _Watcher(fx.Interpreter):
    """Run a graph and keep a running mean of a statistic of the channels of some of its values."""

    def __init__(
        self,
        module: fx.GraphModule,
        graph: fx.Graph,
        places: set[Place],
    ) -> None:
        super().__init__(module, graph=graph)
        self._dims: dict[str, list[int]] = defaultdict(list)
        for name, dim in places:
            self._dims[name].append(dim)
        self.statistic: Statistic = importance.mean_activation
        self.seen: dict[Place, tuple[torch.Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for dim in self._dims.get(n.name, ()):
            positions = value.numel() // value.shape[dim]
            if positions:
                found, before = self.statistic(value, dim), 0
                if found is None:
                    continue
                if (n.name, dim) in self.seen:
                    mean, before = self.seen[n.name, dim]
                    found = mean + (found - mean) * (positions / (before + positions))
                self.seen[n.name, dim] = found, before + positions
        return value


def _unit_means(channels: torch.Tensor, axis: GroupAxis, size: int) -> torch.Tensor:
    return axis_scores(channels, axis, size) / axis_scores(torch.ones_like(channels), axis, size)


def _reshaped(node: object) -> bool:
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.target in _RESHAPES:
            return True
        node = node.args[0]
    return False


def _ndim(node: fx.Node) -> int:
    return getattr(node.meta.get("val"), "ndim", 2)
