"""What a model costs: parameters, zeros, bytes and multiply-accumulates, for each layer and in total."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from torchopt_passes._compat import flat_inputs
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.calls import as_call, batch_size
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.tensors import named_tensors
from torchopt_passes.graph.verify import Inputs, buffers_kept, in_eval_mode
from torchopt_passes.graph.weights import MATRIX_OPS, parameter_behind

__all__ = ["LayerCost", "ModelCost", "layer_of", "measure"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs.

    Args:
        name: dotted name of the module that owns the parameters or runs the operations; ``""`` is the model itself.
        parameters: number of weights; a tied one counts where it is named first.
        zeros: how many of them are exactly zero.
        bytes: of parameters and buffers in memory, by their real dtype.
        macs: multiply-accumulates of its matrix operations for one sample; None when they were not counted.
    """

    name: str
    parameters: int
    zeros: int
    bytes: int
    macs: int | None

    @property
    def sparsity(self) -> float:
        """Share of exact zeros among the parameters, 0..1."""
        return self.zeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model costs.

    Args:
        layers: one row for each layer, in the order of the model.
        batch: number of samples the MACs were counted on (and divided by).
    """

    layers: tuple[LayerCost, ...]
    batch: int

    @property
    def total(self) -> LayerCost:
        """The sum over the layers, named ``"total"``."""
        counted = [layer.macs for layer in self.layers if layer.macs is not None]
        return LayerCost(
            name="total",
            parameters=sum(layer.parameters for layer in self.layers),
            zeros=sum(layer.zeros for layer in self.layers),
            bytes=sum(layer.bytes for layer in self.layers),
            macs=sum(counted) if counted or not self.layers else None,
        )

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once; integers that stand for weights count as weights."""
        return self.total.parameters

    @property
    def sparsity(self) -> float:
        """Share of exact zeros among the parameters, 0..1."""
        return self.total.sparsity

    @property
    def bytes(self) -> int:
        """Bytes of parameters and buffers in memory."""
        return self.total.bytes

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one sample."""
        return self.total.macs


def measure(module: nn.Module, example_inputs: Any = None) -> ModelCost:
    """Count what a model costs, by running its graph once in eval mode.

    Multiply-accumulates are counted for convolutions, matrix products (linear, matmul, einsum, attention and recurrent
    layers are made of them); element-wise work is not. One MAC is two FLOPs.

    Args:
        module: a captured graph at any stage (fake-quantized, int8), or a model, which is captured for it. Untouched.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            by default those of the capture. A model without any gets no MACs.

    Returns:
        The cost of each layer and of the whole; MACs are those of the example divided by its batch size.

    Raises:
        CaptureError: a model that is not yet a graph cannot be captured.

    Math:
        linear: in * out for each row; convolution: outputs * (in / groups) * kernel; transposed convolution: inputs *
        (out / groups) * kernel; matmul (n, k) x (k, m): n * k * m; attention: heads * L * S * (E + E_v), causal or not.

    Example:
        >>> cost = measure(nn.Linear(4, 3), torch.ones(2, 4))
        >>> cost.parameters, cost.bytes, cost.macs
        (15, 60, 12)
    """
    call = as_call(example_inputs) if example_inputs is not None else None
    if not isinstance(module, fx.GraphModule) and call is not None:
        module = capture(module, *call, dynamic=False)
    macs: Counter[str] | None = None
    batch = 1
    if isinstance(module, fx.GraphModule):
        call = call or module.meta.get("example_inputs")
        if call is not None:
            batch = batch_size(call)
            macs = _count_macs(module, call)
    return ModelCost(layers=_layers(module, macs, batch), batch=batch)


def layer_of(node: fx.Node) -> str:
    """Return the dotted name of the module that an operation came from; a rewritten one's is its weight's owner."""
    paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    if paths:
        return paths[-1]
    names = [parameter_behind(node.args[p]) for p in MATRIX_OPS.get(node.target, ()) if p < len(node.args)]
    return next((name.rpartition(".")[0] for name in names if name), "")


def _layers(module: nn.Module, macs: Counter[str] | None, batch: int) -> tuple[LayerCost, ...]:
    integers = _integer_weights(module)
    parameters: Counter[str] = Counter()
    zeros: Counter[str] = Counter()
    bytes_: Counter[str] = Counter()
    names: dict[str, None] = {}
    for fqn, tensor in named_tensors(module):
        owner = fqn.rpartition(".")[0]
        names.setdefault(owner)
        bytes_[owner] += tensor.numel() * tensor.element_size()
        if isinstance(tensor, nn.Parameter) or fqn in integers:
            parameters[owner] += tensor.numel()
            zeros[owner] += int((tensor.detach() == integers.get(fqn, 0)).sum())
    names |= dict.fromkeys(macs or ())
    order = {name: index for index, (name, _) in enumerate(module.named_modules())}
    return tuple(
        LayerCost(
            name=name,
            parameters=parameters[name],
            zeros=zeros[name],
            bytes=bytes_[name],
            macs=None if macs is None else round(macs[name] / batch),
        )
        for name in sorted(names, key=lambda name: order.get(name, len(order)))
    )


def _integer_weights(module: nn.Module) -> dict[str, Any]:
    """Return the integer tensors that stand for weights -> the integer that stands for zero in them."""
    found: dict[str, Any] = {}
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        source = node.args[0] if node.args else None
        name = str(node.target)
        if not (isinstance(source, fx.Node) and source.op == "get_attr" and "dequantize_per_" in name):
            continue
        zero: Any = node.args[2]
        if isinstance(zero, fx.Node):
            zero = dict(named_tensors(module))[str(zero.target)]
        if isinstance(zero, torch.Tensor) and "per_channel" in name:
            shape = [1] * dict(named_tensors(module))[str(source.target)].ndim
            shape[int(node.args[3])] = -1  # pyright: ignore[reportArgumentType]
            zero = zero.view(shape)
        found[str(source.target)] = zero
    return found


def _count_macs(graph_module: fx.GraphModule, inputs: Inputs) -> Counter[str]:
    counter = _Counter(graph_module)
    with in_eval_mode(graph_module), buffers_kept(graph_module):
        try:
            counter.run(*flat_inputs(graph_module, *inputs), enable_io_processing=False)
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise ConfigError(f"the graph does not run on the example inputs: {first}") from error
    return counter.macs


class _Counter(fx.Interpreter):
    """Runs a graph and counts the MACs of each operation for the layer that it belongs to."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.macs: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        if n.target is _SDPA:
            # its kernels differ by device and mask, and torch's counter does not know the one for the CPU
            query, key, value = (self.env[a] for a in n.args[:3])  # pyright: ignore[reportArgumentType]
            heads = math.prod(query.shape[:-2])
            self.macs[layer_of(n)] += heads * query.shape[-2] * key.shape[-2] * (key.shape[-1] + value.shape[-1])
            return super().run_node(n)
        with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
            result = super().run_node(n)
        flops = counter.get_total_flops()
        if flops:
            self.macs[layer_of(n)] += flops // 2
        return result


def _dot(left: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left.numel()


def _onednn_rnn(sequence: torch.Size, w_input: torch.Size, w_hidden: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * sequence[0] * sequence[1] * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn(sequence: torch.Size, weights: list[torch.Size], *_: Any, **__: Any) -> int:
    return 2 * sequence[0] * sequence[1] * sum(w.numel() for w in weights if len(w) == 2)


# what torch's counter leaves out: FLOPs of an operation from its arguments' shapes
_MORE: dict[Any, Any] = {
    aten.mv: _dot,
    aten.dot: _dot,
    aten.mkldnn_rnn_layer: _onednn_rnn,
    aten._cudnn_rnn: _cudnn_rnn,
}
