"""Statistics of values inside a graph over batches of data: streaming, in eval mode, everything left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import fx

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.equalization import pool_moments
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.modes import in_one_mode
from torchopt_passes.graph.verify import buffers_kept, in_eval_mode
from torchopt_passes.progress import track

__all__ = ["AbsMax", "ChannelMoments", "SecondMoment", "Watch", "levels", "required", "several_times", "watch_values"]

Watch = Callable[[torch.Tensor], None]
"""What is called with the value of a node, once a batch."""


def watch_values(
    graph_module: fx.GraphModule,
    batches: Iterable[Any],
    watches: Mapping[str, Watch],
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    max_batches: int | None = None,
    batch_statistics: bool = False,
    what: str = "Measuring",
) -> int:
    """Run batches through a graph in eval mode and show the values of some nodes; the graph is as before afterwards.

    Args:
        graph_module: a captured graph.
        batches: of the context's `calibration`; they stream.
        watches: name of a node -> what its value is given to. Nothing behind the last of them is computed.
        state: tensors by fqn that stand in for the graph's own.
        max_batches: at most so many batches.
        batch_statistics: let batch norms normalize by the statistics of the batch, as in training.
        what: for the progress bar.

    Returns:
        How many batches there were.

    Raises:
        ConfigError: there was no batch.
    """
    count = 0
    with in_eval_mode(graph_module):
        runner = _Watcher(graph_module, watches, state or {}, batch_statistics)
        with buffers_kept(graph_module):
            for batch in track(islice(batches, max_batches), what):
                with suppress(_SeenAllError):
                    runner.run(*flat_inputs(graph_module, *as_call(batch)), enable_io_processing=False)
                count += 1
    if not count:
        raise ConfigError("context.calibration is empty (a generator that was used up?)")
    return count


def required(calibration: Iterable[Any] | None, name: str) -> Iterable[Any]:
    """Return the batches of a context.

    Raises:
        ConfigError: it has none.
    """
    if calibration is None:
        raise ConfigError(f"{name} needs data: PassContext(calibration=[batch, ...])")
    return calibration


def several_times(calibration: Iterable[Any] | None, name: str) -> Iterable[Any]:
    """Return the batches of a context that are read more than once.

    Raises:
        ConfigError: it has none, or they can be read once alone.
    """
    batches = required(calibration, name)
    if iter(batches) is batches:
        raise ConfigError(f"{name} reads the data several times: give a list or a DataLoader, not an iterator")
    return batches


def levels(graph_module: fx.GraphModule, places: Mapping[fx.Node, str]) -> list[list[str]]:
    """Return things to be measured in the order in which they depend on each other, those of one rank together.

    Args:
        graph_module: owner of the graph.
        places: node -> what is measured there; several nodes may be one thing.
    """
    rank: dict[fx.Node, int] = {}
    ranks: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        rank[node] = max((rank[parent] for parent in node.all_input_nodes), default=0) + int(node in places)
        if node in places:
            ranks[places[node]] = max(rank[node], ranks.get(places[node], 0))
    return [[name for name, own in ranks.items() if own == wanted] for wanted in sorted(set(ranks.values()))]


class AbsMax:
    """The largest absolute value of each channel, and the mean: ``largest`` and ``mean``, float32, shape [C].

    Args:
        dim: of the channels.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self.largest, self._sum = torch.zeros(()), torch.zeros(())

    def __call__(self, value: torch.Tensor) -> None:
        """Take a batch into account."""
        rows = value.detach().movedim(self.dim, -1).flatten(0, -2).abs()
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.amax(0).float())
            self._sum = self._sum + rows.double().sum(0)
            self.count += len(rows)

    @property
    def mean(self) -> torch.Tensor:
        """The mean absolute value of each channel."""
        return (self._sum / max(self.count, 1)).float()


class ChannelMoments:
    """Mean and variance of each channel over everything seen, float64, shape [C].

    Args:
        dim: of the channels.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._moments: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, value: torch.Tensor) -> None:
        """Take a batch into account."""
        rows = value.detach().movedim(self.dim, -1).flatten(0, -2).double()
        if not len(rows):
            return
        mean = rows.mean(0)
        found = (len(rows), mean, (rows - mean).square().sum(0))
        self._moments = found if self._moments is None else pool_moments(self._moments, found)

    @property
    def count(self) -> int:
        """How many values each channel had."""
        return 0 if self._moments is None else self._moments[0]

    @property
    def mean(self) -> torch.Tensor:
        """The mean."""
        return self._seen[1]

    @property
    def var(self) -> torch.Tensor:
        """The unbiased variance, sum (x - mean)^2 / (n - 1), as batch norms keep it."""
        count, _, squares = self._seen
        return squares / max(count - 1, 1)

    @property
    def _seen(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        if self._moments is None:
            raise ConfigError("the calibration data is empty")
        return self._moments


class SecondMoment:
    """The sum of x x^T over everything seen, float32 sums in float64, shape [C, C], and mean|x|, shape [C].

    Args:
        dim: of the channels.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.magnitude = dim, AbsMax(dim)
        self.matrix: torch.Tensor = torch.zeros(())

    def __call__(self, value: torch.Tensor) -> None:
        """Take a batch into account."""
        rows = value.detach().movedim(self.dim, -1).flatten(0, -2).float()
        self.matrix = self.matrix + (rows.T @ rows).double()
        self.magnitude(value)


class _SeenAllError(Exception):
    """Everything that was asked for has been seen."""


class _Watcher(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        watches: Mapping[str, Watch],
        state: Mapping[str, torch.Tensor],
        batch_statistics: bool,
    ) -> None:
        graph = in_one_mode(module.graph, training=False)
        super().__init__(module, graph=graph)
        self._watches, self._state, self._batch_statistics = watches, state, batch_statistics
        names = [node.name for node in graph.nodes if node.name in watches]
        self._last = names[-1] if names else ""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self._state.get(target)
        return super().get_attr(target, args, kwargs) if value is None else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._batch_statistics and target is torch.ops.aten.batch_norm.default:
            value, gamma, beta, _, _, _, momentum, eps, cudnn = args
            args = (value, gamma, beta, None, None, True, momentum, eps, cudnn)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._watches:
            self._watches[n.name](value)
            if n.name == self._last:
                raise _SeenAllError
        return value
