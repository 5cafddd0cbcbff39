"""InsertFakeQuant: put fake-quantizers where a deployment target computes in int8."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch import fx, nn

from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.float_casts import FLOATS
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.inplace import make_out_of_place
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.annotate import Annotation, Place, annotate
from torchopt_passes.graph.quantization.fake_quantizer import CONTAINER, FakeQuantizer, stored_range
from torchopt_passes.graph.quantization.layer_bits import FLOAT_BITS, BitsOf, check_bits, float_layers, quantizer_bits
from torchopt_passes.graph.quantization.operations import find_operations
from torchopt_passes.graph.quantization.state import fake_quant_off
from torchopt_passes.graph.quantization.targets import get_target
from torchopt_passes.graph.quantization.value_grids import Rows, ValueGrids
from torchopt_passes.graph.quantization.value_quantizer import SCALED_FORMATS, ValueQuantizer

__all__ = ["FakeQuantize", "InsertFakeQuant"]


class FakeQuantize(Edit):
    """Round the value of a node, for some of its users.

    Args:
        quantizer: name of the fake-quantizer (in ``graph_module.fake_quant``); places with one name share it.
        node: the node whose value is rounded.
        users: the nodes that read it rounded; others read it as it is.
        bits: width of the integers.
        signed: integers symmetric about zero, or with a zero point.
        channel_dim: dimension with a scale for each index, None for one scale.
        channels: how many scales.
        batch_norm: the batch norm that is folded into this weight, or ''.
        follow: the value was observed at an earlier place of the same quantizer.
        momentum: weight of a batch in the moving average of the range.
        qat: round and observe in training from now on; else wait for `Calibrate`.
        bias_apart: when it is converted, a 2-D result of this weight gets its bias from an addition behind it.
        power_of_two: the step is rounded up to a power of two.
        granularity: what has a scale of its own, when the grid is fitted to each value; '' for a kept range.
        group_size: values of a group.
        format: of values that are fitted: ``"int"`` or a narrow float.
    """

    on_source = False

    quantizer: str
    node: str
    users: tuple[str, ...]
    bits: int
    signed: bool
    channel_dim: int | None = None
    channels: int = 1
    batch_norm: str = ""
    follow: bool = False
    momentum: float = 0.01
    qat: bool = True
    bias_apart: bool = False
    power_of_two: bool = False
    granularity: Literal["", "tensor", "channel", "group", "token"] = ""
    group_size: int = 0
    format: str = "int"

    def check(self) -> None:
        """Refuse a name that is no identifier, a width out of range, and a place without users."""
        if not self.quantizer.isidentifier():
            raise PlanError(f"{self.quantizer!r} is no name of a fake-quantizer")
        if not 2 <= self.bits <= 16 or self.channels < 1 or not 0.0 < self.momentum <= 1.0:
            raise PlanError(f"{self.quantizer}: bits 2 to 16, channels >= 1, 0 < momentum <= 1")
        if not self.users:
            raise PlanError(f"{self.quantizer}: nothing reads {self.node} rounded")

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph that lacks one of the nodes."""
        nodes = {node.name: node for node in module.graph.nodes}  # pyright: ignore
        for name in (self.node, *self.users, *([self.batch_norm] if self.batch_norm else [])):
            if name not in nodes:
                raise PlanError(f"the graph has no node {name!r}")
        if self.batch_norm and BatchNorm.of(nodes[self.batch_norm]) is None:
            raise PlanError(f"{self.batch_norm!r} is no batch norm with running statistics")

    @classmethod
    def apply_all(cls, module: nn.Module, edits: Sequence[Any]) -> None:
        """Insert the fake-quantizers; in-place ops become out-of-place first, so that a rounded value stays itself."""
        if not isinstance(module, fx.GraphModule):
            raise PlanError("fake-quantizers go into a captured graph")
        make_out_of_place(module.graph)
        nodes = {node.name: node for node in module.graph.nodes}
        if CONTAINER not in module._modules:
            module.add_module(CONTAINER, nn.Module())
        container = module.get_submodule(CONTAINER)
        for edit in edits:
            norm = BatchNorm.of(nodes[edit.batch_norm]) if edit.batch_norm else None
            if edit.quantizer not in container._modules:
                container.add_module(edit.quantizer, edit._make(norm, nodes[edit.node]))
            edit._insert(module.graph, nodes, norm)
        container.train(module.training)

    def _make(self, norm: BatchNorm | None, node: fx.Node) -> FakeQuantizer:
        quantizer = self._fitted(norm) if self.granularity else self._ranged(norm)
        value = node.meta.get("val")
        return quantizer if value is None else quantizer.to(value.device)

    def _fitted(self, norm: BatchNorm | None) -> FakeQuantizer:
        if not self.granularity:
            raise PlanError(f"{self.quantizer}: nothing says what its grid is fitted to")
        return ValueQuantizer(
            bits=self.bits,
            signed=self.signed,
            granularity=self.granularity,
            group_size=self.group_size,
            format=self.format,
            weight=self.momentum == 1.0,
            channel_dim=self.channel_dim or 0,
            bn_eps=norm.eps if norm else 0.0,
        )

    def _ranged(self, norm: BatchNorm | None) -> FakeQuantizer:
        return FakeQuantizer(
            bits=self.bits,
            signed=self.signed,
            channel_dim=self.channel_dim,
            channels=self.channels,
            momentum=self.momentum,
            bn_eps=norm.eps if norm else 0.0,
            bias_apart=self.bias_apart,
            power_of_two=self.power_of_two,
            observe=self.qat,
            enabled=self.qat,
        )

    def _insert(self, graph: fx.Graph, nodes: dict[str, fx.Node], norm: BatchNorm | None) -> None:
        value, users = nodes[self.node], [nodes[name] for name in self.users]
        extra = tuple(n for n in ((norm.gamma, norm.var) if norm else ()))
        order = {node: position for position, node in enumerate(graph.nodes)}
        last = max((n for n in (value, *extra) if n is not None), key=order.__getitem__)
        with graph.inserting_after(last):
            kwargs: dict[str, Any] = {"follow": True} if self.follow else {}
            rounded = graph.call_module(f"{CONTAINER}.{self.quantizer}", (value, *extra), kwargs)
        for key in ("val", "stack_trace", "nn_module_stack"):
            if key in value.meta:
                rounded.meta[key] = value.meta[key]
        for user in users:
            user.replace_input_with(value, rounded)


class InsertFakeQuant(GraphPass):
    """Put fake-quantizers where a target computes in int8: on the weights and inputs of its matrix operations.

    The places come from our own annotation of ATen operations, so residual nets, ``nn.Conv2d`` subclasses (padding
    "same", weight standardization), Transformers models, tied weights and modules called twice all work; every
    matrix operation is in the report as rounded, or as float with the reason. Activations are uint8 with a zero point,
    weights int8 symmetric with a scale for each output channel.

    A batch norm behind a convolution or linear stays in place and trains as it did; the weight is rounded on the grid
    it will have once the batch norm is folded into it, w_q = FQ(w s) / s with s = gamma / sqrt(var + eps), whatever
    eps and momentum are. `ConvertQuantized` folds it.

    Args:
        target: where it will run: ``"inductor"`` (x86 CPU), ``"onnx"`` (ONNX Runtime, QDQ), ``"openvino"``,
            ``"tensorrt"``, ``"litert"``, ``"executorch"``, or ``"reference"``.
        qat: True learns ranges and rounds in training from now on; False waits for `Calibrate`.
        weight_bits: 2 to 8; to 16 for ``target="reference"``.
        activation_bits: likewise.
        weight_bits_of: glob on a weight's fqn, a module path or a node -> bits of that weight instead; 0 or 32 keep its
            operation in float. The first glob that matches counts.
        activation_bits_of: the same, for the inputs of the operations it matches. A value that several operations read
            is rounded once, to the widest of what they want.
        reduce_range: at most 7 bits for weights, for x86 CPUs without VNNI: their int8 kernels add pairs of products
            in 16 bits, and 2 * 255 * 127 would saturate there. (Torch takes the bit from activations, which have one
            step for all channels, and whose integers a runtime does not keep to 7 bits.)
        per_channel: a scale for each output channel of a weight, or one for the whole weight.
        weight_symmetric: int8 weights about zero; False for uint8 weights with a zero point, which Inductor lacks.
        activation_symmetric: None for what the target computes with: int8 activations about zero for TensorRT, and for
            products of two activations on OpenVINO; uint8 activations with a zero point for the rest. True asks for
            int8, which Inductor lacks, and which ONNX Runtime computes in float on x86 (ARM wants them); False asks for
            uint8, which TensorRT lacks.
        power_of_two: round every step up to a power of two, for hardware that rescales by shifts.
        group_size: a scale for each so many consecutive values of an output channel of a weight; 0 for one scale. A
            weight that it does not divide, and those of convolutions, keep theirs, with the reason.
        activation_range: ``"static"``: calibrated or learned; at run time, of each value as it comes: ``"dynamic"`` of
            the whole, ``"token"`` of each vector along the last dimension (of what linears and the left side of
            products read; the rest as ``"dynamic"``).
        weight_format: ``"int"``, or a narrow float: ``"bf16"``, ``"fp16"``, ``"fp8_e4m3"``, ``"fp8_e5m2"`` (float8 with
            a scale for each channel or group).
        activation_format: likewise; float8 takes its scale at run time, so it goes with an `activation_range` that
            does. This and the three above are for ``target="reference"``, which rounds as such hardware does and
            computes in float.
        momentum: weight of a training batch in the moving average of an activation's range.

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference"; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference".

    Proof:
        With the fake-quantizers off, outputs equal those before, in float64 within 1e-9.

    Example:
        >>> InsertFakeQuant(target="onnx").recipe()
        {'insert_fake_quant': {'target': 'onnx'}}
    """

    claim = "outputs with fake-quant off equal the outputs before"

    target: str = "inductor"
    qat: bool = True
    weight_bits: int = 8
    activation_bits: int = 8
    weight_bits_of: dict[str, int] | None = None
    activation_bits_of: dict[str, int] | None = None
    reduce_range: bool = False
    per_channel: bool = True
    weight_symmetric: bool = True
    activation_symmetric: bool | None = None
    power_of_two: bool = False
    group_size: int = 0
    activation_range: Literal["static", "dynamic", "token"] = "static"
    weight_format: Literal["int", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"] = "int"
    activation_format: Literal["int", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"] = "int"
    momentum: float = 0.01

    def check(self) -> None:
        """Refuse an unknown target, grids that its kernels cannot take, and widths outside int8."""
        no_grid = get_target(self.target).refused
        asked = {
            "int8 activations": self.activation_symmetric is True,
            "uint8 activations": self.activation_symmetric is False,
            "uint8 weights": not self.weight_symmetric,
            "weights by group": self.group_size != 0,
            "activation ranges at run time": self.activation_range != "static",
            "narrow floats": (self.weight_format, self.activation_format) != ("int", "int"),
        }
        for grid in (name for name, wanted in asked.items() if wanted and name in no_grid):
            raise ConfigError(f"InsertFakeQuant: target {self.target!r} cannot run {grid}: {no_grid[grid]}")
        if self.group_size < 0 or (self.group_size and not self.per_channel):
            raise ConfigError(f"InsertFakeQuant: group_size must be >= 0, with per_channel=True, not {self.group_size}")
        if self.activation_format in SCALED_FORMATS and self.activation_range == "static":
            raise ConfigError(
                f"InsertFakeQuant: {self.activation_format} activations take their scale at run time: "
                "activation_range='dynamic' or 'token'"
            )
        if self.power_of_two and (self.group_size or self.activation_range != "static"):
            raise ConfigError(
                "InsertFakeQuant: power_of_two is for grids with a range: no group_size, static activations"
            )
        weights = BitsOf("weight_bits_of", self.weight_bits_of or {}, self.weight_bits)
        for bits_of in (weights, self._bits_of()[1]):
            check_bits(bits_of, get_target(self.target))
        if not 0.0 < self.momentum <= 1.0:
            raise ConfigError(f"InsertFakeQuant: momentum must be in (0, 1], not {self.momentum}")

    @property
    def signed_activations(self) -> bool:
        """Whether all activations are int8 about zero: as asked, else as the target computes."""
        if self.activation_symmetric is None:
            return "uint8 activations" in get_target(self.target).no_grid
        return self.activation_symmetric

    def _signed(self, place: Place) -> bool:
        return self.signed_activations or (place.symmetric and self.activation_symmetric is None)

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the places; see the class."""
        graph = _out_of_place(graph_module)
        found = self._annotate(graph_module, graph, context or PassContext())
        bits = quantizer_bits(found, graph, *self._bits_of())
        grids = ValueGrids(
            self.group_size, self.activation_range, self.weight_format, self.activation_format, self.per_channel
        )
        rows = grids.choose(found.places, graph)
        edits = tuple(
            self._edit(place, *bits.get(place.quantizer, (0, "")), rows[place.quantizer]) for place in found.places
        )
        done = [Skip(target=op.target, reason=op.why_float) for op in found.operations if op.why_float]
        return Plan(edits, tuple(done))

    def annotate(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Annotation:
        """Return which matrix operations become int8, which stay float and why, and the places to round."""
        return self._annotate(graph_module, _out_of_place(graph_module), context or PassContext())

    def _annotate(self, graph_module: fx.GraphModule, graph: fx.Graph, context: PassContext) -> Annotation:
        target = get_target(self.target)
        if not (self.weight_bits_of or self.activation_bits_of):
            return annotate(graph_module, graph, target, context.skipped_by)
        operations = find_operations(graph_module, graph, target, context.skipped_by)
        floats = float_layers(graph_module, operations, self._bits_of())
        found = annotate(
            graph_module, graph, target, lambda name: context.skipped_by(name) or (name if name in floats else None)
        )
        decided = {op.node.name for op in operations if op.why_float}
        found.operations = [
            replace(op, why_float=floats[op.node.name]) if op.node.name in floats.keys() - decided else op
            for op in found.operations
        ]
        return found

    def _bits_of(self) -> list[BitsOf]:
        narrow = 7 if self.reduce_range else 16
        weights = {p: b if b in FLOAT_BITS else min(b, narrow) for p, b in (self.weight_bits_of or {}).items()}
        return [
            BitsOf("weight_bits_of", weights, min(self.weight_bits, narrow)),
            BitsOf("activation_bits_of", self.activation_bits_of or {}, self.activation_bits),
        ]

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the proof."""
        return fake_quant_off(graph_module)

    def _edit(self, place: Place, bits: int, why: str, rows: Rows) -> FakeQuantize:
        weight = place.weight
        # a place that no matrix operation reads, such as the output of the last convolution, has no bits of its own
        bits = bits or self._bits_of()[1].default
        signed = self.weight_symmetric if weight is not None else self._signed(place)
        low, high = stored_range(bits, signed=signed)
        per_channel = weight is not None and self.per_channel
        channels = 1
        if weight is not None and per_channel:
            channels = int(weight.node.meta["val"].shape[weight.channel_dim])
        form = self.activation_format if weight is None else self.weight_format
        numbers = {"bits": float(bits), "quant_min": float(low), "quant_max": float(high)}
        if form != "int":
            numbers = {"bits": 8.0 * FLOATS[form].itemsize}
        each = f"{form}, fitted to each {rows.granularity}" if rows.granularity else ""
        return FakeQuantize(
            target=place.target,
            reason="; ".join(part for part in (place.reason, why, each, rows.why) if part),
            numbers=numbers,
            quantizer=place.quantizer,
            node=place.node,
            users=place.users,
            bits=bits,
            signed=signed,
            channel_dim=weight.channel_dim if weight is not None and per_channel else None,
            channels=channels,
            batch_norm=place.batch_norm,
            follow=place.follow,
            momentum=1.0 if weight is not None else self.momentum,
            qat=self.qat,
            bias_apart=place.bias_apart,
            power_of_two=self.power_of_two,
            granularity=rows.granularity,
            group_size=self.group_size if rows.granularity == "group" else 0,
            format=form,
        )


def _out_of_place(graph_module: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    make_out_of_place(graph)
    return graph
