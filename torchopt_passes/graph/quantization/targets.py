"""What each deployment target runs in int8: one table for each, read by the annotation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["FUSED_ACTIVATIONS", "KINDS", "MAX_POOLS", "TARGETS", "Operands", "Target", "get_target"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """Where the operands of a matrix operation lie among its arguments.

    Args:
        kind: the word a target's table uses.
        activation: position of the input.
        weight: position of the weight, or of the second input (of attention: queries and keys; values stay float).
        channel_dim: the weight's output dimension (negative: from the end).
        bias: position of the bias, None when it has none.
    """

    kind: str
    activation: int = 0
    weight: int = 1
    channel_dim: int = 0
    bias: int | None = 2


KINDS: dict[object, Operands] = {
    aten.conv1d.default: Operands("conv1d"),
    aten.conv1d.padding: Operands("conv1d"),
    aten.conv2d.default: Operands("conv2d"),
    aten.conv2d.padding: Operands("conv2d"),
    aten.conv3d.default: Operands("conv3d"),
    aten.conv3d.padding: Operands("conv3d"),
    aten.conv_transpose1d.default: Operands("conv_transpose", channel_dim=1),
    aten.conv_transpose2d.input: Operands("conv_transpose", channel_dim=1),
    aten.conv_transpose3d.input: Operands("conv_transpose", channel_dim=1),
    aten.convolution.default: Operands("convolution"),
    aten.linear.default: Operands("linear"),
    aten.addmm.default: Operands("addmm", activation=1, weight=2, channel_dim=-1, bias=0),
    aten.mm.default: Operands("matmul", channel_dim=-1, bias=None),
    aten.matmul.default: Operands("matmul", channel_dim=-1, bias=None),
    aten.bmm.default: Operands("matmul", channel_dim=-1, bias=None),
    aten.baddbmm.default: Operands("baddbmm", activation=1, weight=2, channel_dim=-1, bias=0),
    aten.mv.default: Operands("mv", bias=None),
    aten.einsum.default: Operands("einsum", activation=1, weight=1, bias=None),
    aten.bilinear.default: Operands("bilinear"),
    aten.scaled_dot_product_attention.default: Operands("attention", bias=None),
    aten.lstm.input: Operands("recurrent", bias=None),
    aten.lstm.data: Operands("recurrent", bias=None),
    aten.gru.input: Operands("recurrent", bias=None),
    aten.gru.data: Operands("recurrent", bias=None),
    aten.rnn_tanh.input: Operands("recurrent", bias=None),
    aten.rnn_tanh.data: Operands("recurrent", bias=None),
    aten.rnn_relu.input: Operands("recurrent", bias=None),
    aten.rnn_relu.data: Operands("recurrent", bias=None),
}
"""Every matrix operation of the ATen training dialect: each is reported as int8, or as float with the reason."""

FUSED_ACTIVATIONS: frozenset[object] = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
    }
)
"""Activations that a rounded output absorbs: it is rounded behind them, not before."""

_VIEWS: frozenset[object] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
    }
)
# zero is on every grid, and what is reflected was on it; other numbers are left out where a node is looked at
_PADS: frozenset[object] = frozenset({aten.pad.default, aten.constant_pad_nd.default})
MAX_POOLS: frozenset[object] = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})


@dataclass(frozen=True)
class Target:
    """What one runtime computes in int8.

    Args:
        name: as in ``InsertFakeQuant(target=...)``.
        int8: kinds of operations with an int8 kernel.
        no_kernel: kinds it lacks -> the reason that the report gives.
        dynamic_matmul: whether a matrix product of two activations has an int8 kernel.
        rounded_outputs: kinds whose int8 kernel needs its output rounded too.
        rounded_adds: which operands of the residual sum behind a convolution are rounded: both, or only the one
            that is not the convolution (which adds it to its accumulator).
        bias_apart: kinds that run in int8 only without a bias (it is added behind them), when their result is 2-D.
        follow: operations that move rounded values without leaving the grid, pads with another number than 0 aside:
            their results share its scale.
        fold_weights: whether converted weights are stored as integers (else rounded in the graph).
        symmetric_products: whether products of two activations run in int8 only when both are int8 about zero.
        no_grid: grids its kernels cannot take, such as ``"int8 activations"`` or ``"uint8 weights"`` -> why.
        any_grid: whether it takes grids that are fitted to each value, of 9 to 16 bits, and narrow floats, as no int8
            kernel does.
        no_wide_grid: why it takes no grid above 8 bits, and what does, unless `any_grid`.
    """

    name: str
    int8: frozenset[str]
    no_kernel: dict[str, str]
    dynamic_matmul: bool
    rounded_outputs: frozenset[str]
    rounded_adds: Literal["both", "other"]
    bias_apart: frozenset[str]
    follow: frozenset[object] = field(repr=False)
    fold_weights: bool = True
    symmetric_products: bool = False
    no_grid: dict[str, str] = field(default_factory=dict[str, str])
    any_grid: bool = False
    no_wide_grid: str = "its kernels compute in int8; 'reference' rounds to 16 bits in float"

    @property
    def refused(self) -> dict[str, str]:
        """Every grid that it cannot run, and why."""
        return self.no_grid if self.any_grid else self.no_grid | _ONE_STEP


_ONE_STEP = {
    "weights by group": "its int8 kernels take one step for an output channel; QuantizeWeights stores groups",
    "activation ranges at run time": "its int8 kernels take steps that are known beforehand",
    "narrow floats": "its kernels compute in int8",
}
_COMMON = {
    "conv_transpose": "has no int8 kernel for transposed convolutions",
    "convolution": "has no int8 kernel for the general convolution operator",
    "baddbmm": "has no int8 kernel for baddbmm",
    "mv": "has no int8 kernel for matrix-vector products",
    "einsum": "has no int8 kernel for einsum",
    "bilinear": "has no int8 kernel for bilinear",
    "attention": "runs scaled_dot_product_attention as one float kernel",
    "recurrent": "has no static int8 kernel for recurrent layers",
}

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # x86 inductor: oneDNN qconv / qlinear with float accumulator outputs and fused sums
        Target(
            name="inductor",
            int8=frozenset({"conv1d", "conv2d", "linear", "addmm", "matmul"}),
            no_kernel=_COMMON | {"conv3d": "has no int8 kernel for 3-D convolutions"},
            dynamic_matmul=False,
            rounded_outputs=frozenset(),
            rounded_adds="other",
            bias_apart=frozenset(),
            follow=MAX_POOLS | {aten.flatten.using_ints, aten.cat.default},
            no_grid={
                "int8 activations": "its kernels take uint8 activations alone",
                "uint8 weights": "its kernels take int8 weights alone",
            },
        ),
        # ONNX Runtime: QLinearConv exists with an int8 output alone; MatMul and Gemm may return float, Gemm (which 2-D
        # linears become) only without a float bias
        Target(
            name="onnx",
            int8=frozenset({"conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul"}),
            no_kernel=_COMMON,
            dynamic_matmul=True,
            rounded_outputs=frozenset({"conv1d", "conv2d", "conv3d"}),
            rounded_adds="both",
            bias_apart=frozenset({"linear", "addmm"}),
            follow=MAX_POOLS | _VIEWS | _PADS,
        ),
        # OpenVINO: every kernel may return float from int8 operands; sums are fused into convolutions when their other
        # operand is rounded, and grids pass through pools and views. Attention is one kernel, whose product of queries
        # and keys may be int8
        Target(
            name="openvino",
            int8=frozenset({"conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul", "attention"}),
            no_kernel={kind: why for kind, why in _COMMON.items() if kind != "attention"},
            dynamic_matmul=True,
            symmetric_products=True,
            rounded_outputs=frozenset(),
            rounded_adds="other",
            bias_apart=frozenset(),
            follow=MAX_POOLS | _VIEWS | _PADS,
        ),
        # TensorRT: explicit quantization, symmetric int8 alone; it fuses a rounded operand into a convolution's sum
        Target(
            name="tensorrt",
            int8=frozenset({"conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul"}),
            no_kernel=_COMMON,
            dynamic_matmul=True,
            rounded_outputs=frozenset(),
            rounded_adds="other",
            bias_apart=frozenset(),
            follow=MAX_POOLS | _VIEWS | _PADS,
            no_grid={
                "uint8 activations": "its int8 is symmetric about zero",
                "uint8 weights": "its int8 is symmetric about zero",
            },
        ),
        # LiteRT: every int8 kernel returns int8, products included; with a float output or an uint8 input the converter
        # makes the operation float
        Target(
            name="litert",
            int8=frozenset({"conv1d", "conv2d", "linear", "addmm", "matmul"}),
            no_kernel=_COMMON | {"conv3d": "has no int8 kernel for 3-D convolutions (CONV_3D is float32 alone)"},
            dynamic_matmul=True,
            rounded_outputs=frozenset({"conv1d", "conv2d", "linear", "addmm", "matmul"}),
            rounded_adds="both",
            bias_apart=frozenset(),
            follow=MAX_POOLS | _VIEWS | _PADS,
            no_grid={"uint8 weights": "its kernels take int8 weights about zero alone"},
            no_wide_grid="export the float model with LiteRtTarget(weights='int16x8') for 16-bit activations",
        ),
        # ExecuTorch: XNNPACK's int8 kernels return int8; products of two activations and softmax are float there, and
        # squeezes are left to portable kernels
        Target(
            name="executorch",
            int8=frozenset({"conv1d", "conv2d", "linear", "addmm", "matmul"}),
            no_kernel=_COMMON | {"conv3d": "has no kernel for 3-D convolutions in XNNPACK"},
            dynamic_matmul=False,
            rounded_outputs=frozenset({"conv1d", "conv2d", "linear", "addmm", "matmul"}),
            rounded_adds="both",
            bias_apart=frozenset(),
            follow=MAX_POOLS | _VIEWS - {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims},
            no_grid={"uint8 weights": "its kernels take int8 weights about zero alone"},
        ),
    )
}
# PyTorch itself, which rounds to any grid and computes in float: to see what hardware of another kind would do
TARGETS["reference"] = replace(
    TARGETS["inductor"],
    name="reference",
    int8=TARGETS["onnx"].int8,
    no_kernel={kind: why.replace("has no int8 kernel", "has no rule") for kind, why in _COMMON.items()},
    dynamic_matmul=True,
    no_grid={},
    any_grid=True,
)


def get_target(name: str) -> Target:
    """Return a target's table.

    Raises:
        ConfigError: no target has that name; lists those that exist.

    Example:
        >>> get_target("onnx").rounded_adds
        'both'
    """
    if name not in TARGETS:
        raise ConfigError(f"no quantization target is named {name!r}; known: {sorted(TARGETS)}")
    return TARGETS[name]
