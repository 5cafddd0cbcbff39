"""Where graphs are rounded: every matrix operation is int8, or float with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import torchopt_passes as top
from tests.graph.quantization.helpers import UINT8_TARGETS, convert, nodes, output, prepare, quantizers, relative
from tests.models import build
from torchopt_passes.graph.quantization import InsertFakeQuant
from torchopt_passes.graph.quantization.targets import KINDS, get_target

aten = torch.ops.aten


def plan_of(model: nn.Module, *inputs: torch.Tensor, target: str = "inductor", skip: tuple[str, ...] = ()) -> Any:
    graph_module = top.capture(model, inputs)
    context = top.PassContext(skip=skip)
    found = InsertFakeQuant(target=target).annotate(graph_module, context)
    matrix = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in KINDS]
    assert [op.node.name for op in found.operations] == [n.name for n in matrix], "none is forgotten"
    read = {user for place in found.places for user in place.users}
    for op in found.operations:
        assert bool(op.why_float) != (op.node.name in read or _through_views(op, read)), op.node.name
    return found


def _through_views(op: Any, read: set[str]) -> bool:
    return any(n.name in read for n in op.node.all_input_nodes)


def activation_places(found: Any) -> dict[str, tuple[str, ...]]:
    return {p.node: p.users for p in found.places if p.weight is None}


def reasons(found: Any) -> list[str]:
    return [skip.reason for skip in found.skips]


@pytest.mark.parametrize("target", UINT8_TARGETS)
@pytest.mark.parametrize(
    ("name", "weights", "floats"), [("conv_residual", 4, 0), ("tied_twice", 4, 0), ("attention", 4, 1)]
)
def test_zoo_is_covered(name: str, weights: int, floats: int, target: str) -> None:
    model, inputs = build(name)
    found = plan_of(model, *inputs, target=target)
    floats -= name == "attention" and "attention" in get_target(target).int8
    assert len({p.quantizer for p in found.places if p.weight}) == weights and len(found.skips) == floats


class Block(nn.Module):
    """Attention with or without its kernel; what its output projection reads is moved by a transpose and a view."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_activations_are_about_zero_for_openvino(fused: bool) -> None:
    model, x = Block(fused=fused).eval(), torch.randn(3, 5, 8) + 1
    found = plan_of(model, x, target="openvino")
    assert not found.skips
    about_zero = {p.quantizer for p in found.places if p.symmetric}
    # queries and keys are rounded where they are made, and move as integers; probabilities are not negative
    assert about_zero == {"act_linear", "act_linear_1", *(() if fused else ("act_linear_2",))}
    rounded = {p.node for p in found.places if p.weight is None and p.users == ("linear_3",)}
    # an attention kernel gives floats in the order that is wanted; a product's integers are moved
    assert ("flatten" if fused else "matmul_1") in {p.node for p in found.places} and len(rounded) == 1
    assert not any(p.symmetric for p in plan_of(model, x, target="onnx").places)
    prepared = prepare(model, [(x,)], target="openvino")
    for name, quantizer in quantizers(prepared).items():
        assert quantizer.signed == (name in about_zero or "weight" in name), name
        if name in about_zero:
            assert int(quantizer.zero_point) == 0
    zeros = [q for name, q in quantizers(prepared).items() if name.startswith("act_softmax")]
    assert len(zeros) == (not fused) and all(int(q.zero_point) == 0 for q in zeros)
    assert relative(output(convert(model, [(x,)], target="openvino"), (x,)), model(x)) < 0.03


def test_what_is_asked_for_goes_before_what_products_want() -> None:
    model, x = Block(fused=True).eval(), torch.randn(3, 5, 8)
    prepared = prepare(model, [(x,)], target="openvino", activation_symmetric=False)
    assert not any(q.signed for name, q in quantizers(prepared).items() if name.startswith("act_"))


def test_residual_block_for_inductor_and_onnx() -> None:
    model, inputs = build("conv_residual")
    # inductor adds the other operand to the convolution's accumulator: the convolution itself is not rounded
    assert activation_places(plan_of(model, *inputs)) == {
        "x": ("conv2d",),
        "relu": ("conv2d_1", "add"),
        "relu_1": ("conv2d_2",),
        "mean": ("dropout",),
    }
    # ONNX Runtime sums int8 values, and its convolutions return them
    assert activation_places(plan_of(model, *inputs, target="onnx")) == {
        "x": ("conv2d",),
        "relu": ("conv2d_1", "add"),
        "batch_norm_1": ("add",),
        "relu_1": ("conv2d_2",),
        "relu_2": ("mean",),
        "mean": ("dropout",),
    }


class TinyResNet(nn.Module):
    """The shape of resnet18 that source partitions choke on: one in-place ReLU module for all, downsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.bn4 = nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        out += self.bn4(self.down(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.relu(out), 1), 1))


@pytest.mark.parametrize("target", UINT8_TARGETS)
def test_residual_net_with_a_shared_inplace_relu(target: str) -> None:
    model = TinyResNet()
    x = torch.randn(4, 3, 16, 16)
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    found = plan_of(model, x, target=target)
    assert len([p for p in found.places if p.weight]) == 5 and not found.skips
    assert sorted(p.batch_norm for p in found.places if p.batch_norm) == [
        "batch_norm", "batch_norm_1", "batch_norm_2", "batch_norm_3",
    ]  # fmt: skip
    # max pooling moves rounded values: one grid on both sides of it
    pooled = {p.quantizer: [] for p in found.places if p.node in ("relu_", "max_pool2d")}
    for p in found.places:
        pooled.get(p.quantizer, []).append((p.node, p.follow))
    assert pooled == {"act_relu_": [("relu_", False), ("max_pool2d", True)]}
    expected = model.eval()(x)
    converted = convert(model, [(x,)], target=target)
    assert relative(output(converted, (x,)), expected.detach()) < 0.05
    assert output(converted, (x[:1],)).shape == (1, 5) and output(converted, (torch.cat([x, x]),)).shape == (8, 5)


class SameConv(nn.Conv2d):
    """A subclass that pads by itself, as EfficientNet's do: stock quantizers skip it without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class StandardizedConv(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019): the weight of the operation is no parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=self.padding)


@pytest.mark.parametrize(
    ("pad", "shares"),
    [
        (lambda x: F.pad(x, (0, 1, 0, 1)), True),
        (lambda x: F.pad(x, (0, 1, 0, 1), value=0.0), True),
        (lambda x: aten.constant_pad_nd(x, (0, 1, 0, 1)), True),
        (lambda x: F.pad(x, (0, 1, 0, 1), value=1.0), False),
        (lambda x: aten.constant_pad_nd(x, (0, 1, 0, 1), 1.0), False),
    ],
    ids=["zeros", "0.0", "constant_pad_nd", "ones", "constant_pad_nd of ones"],
)
def test_zeros_around_an_image_are_on_its_grid(pad: Any, shares: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(pad(self.one(x).relu()))

    for target in ("onnx", "openvino", "litert"):
        found = plan_of(Net(), torch.randn(2, 3, 8, 8), target=target)
        of_pads = [p for p in found.places if "pad" in p.node]
        assert [(p.quantizer == "act_relu", p.follow) for p in of_pads] == [(shares, shares)]


@pytest.mark.parametrize("target", UINT8_TARGETS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 8, 3, padding="same"),
        lambda: SameConv(3, 8, 2),
        lambda: StandardizedConv(3, 8, 3, padding=1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    ],
    ids=["padding=same", "pads itself", "weight standardization", "weight norm"],
)
def test_conv2d_subclasses_are_int8(make: Any, target: str) -> None:
    model = nn.Sequential(make(), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()).eval()
    x = torch.randn(4, 3, 9, 9)
    expected = model(x)
    converted = convert(model, [(x,)], target=target)
    assert relative(output(converted, (x,)), expected) < 0.02
    state = converted.state_dict()
    integers = [name for name, value in state.items() if value.dtype is torch.int8]
    assert len(integers) == 1 and state[integers[0]].shape[0] == 8
    assert not nodes(converted, aten.std.correction) and not nodes(converted, aten.batch_norm.default)


def test_module_called_twice_and_tied_weights_have_one_quantizer() -> None:
    model, inputs = build("tied_twice")
    found = plan_of(model, *inputs)
    block = [p for p in found.places if p.target == "block.weight"]
    assert len(block) == 1 and block[0].users == ("linear", "linear_1")
    converted = convert(model, [inputs])
    state = converted.state_dict()
    assert state["block.weight"].dtype is torch.int8
    # the embedding looks the tied weight up in float; the head has its integers beside it
    tied = [name for name in state if name.startswith(("head", "embed"))]
    assert sum(state[name].dtype is torch.int8 for name in tied) == 1
    assert any(state[name].dtype is torch.float32 and state[name].shape == (11, 8) for name in tied)


def test_conv_and_batch_norm_used_twice_fold_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, eps=1e-3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))

    model = Twice()
    model(torch.randn(8, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    converted = convert(model, [(x,)])
    assert relative(output(converted, (x,)), expected) < 0.03
    assert [n for n, t in converted.state_dict().items() if t.dtype is torch.int8] == ["conv.weight"]


def test_one_weight_behind_two_batch_norms_is_two_weights_once_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + self.b(self.conv(x.flip(3)))

    model = Shared()
    model(torch.randn(8, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    for target in UINT8_TARGETS:
        converted = convert(model, [(x,)], target=target)
        assert relative(output(converted, (x,)), expected) < 0.03
        assert sum(t.dtype is torch.int8 for t in converted.state_dict().values()) == 2


@pytest.mark.parametrize(("target", "reason"), [("inductor", "product of two activations"), ("onnx", "")])
def test_products_of_two_activations(target: str, reason: str) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(1, 2), -1).bmm(k)

    q, k = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    found = plan_of(Attend(), q, k, target=target)
    if reason:
        assert len(found.skips) == 2 and all(reason in text for text in reasons(found)) and not found.places
    else:
        assert not found.skips
        converted = convert(Attend(), [(q, k)], target=target)
        assert relative(output(converted, (q, k)), Attend()(q, k)) < 0.02


class Odd(nn.Module):
    """Operations that have no int8 kernel, each with its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2)
        self.hyper = nn.Linear(4, 3 * 3)
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.left = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        w = self.hyper(z).view(3, 3, 1, 1)
        x = F.conv2d(self.up(x), w).mean(3).transpose(1, 2)
        x = self.lstm(x)[0].transpose(1, 2)
        return torch.einsum("nct,oc->not", x, self.left) + self.left @ x


def test_what_stays_float_says_why() -> None:
    found = plan_of(Odd(), torch.randn(2, 3, 4, 4), torch.randn(4))
    by_op = {op.operands.kind: op.why_float for op in found.operations}
    assert "transposed convolutions" in by_op["conv_transpose"]
    assert "computed from the model's input" in by_op["conv2d"]
    assert "recurrent" in by_op["recurrent"] and "einsum" in by_op["einsum"]
    assert "left-hand side" in by_op["matmul"] and by_op["linear"] == ""
    assert {"up.weight", "lstm: lstm"} <= {skip.target for skip in found.skips}


def test_conv3d_is_int8_where_the_target_has_it() -> None:
    model, x = nn.Conv3d(2, 4, 3), torch.randn(2, 2, 5, 5, 5)
    assert "3-D" in reasons(plan_of(model, x))[0]
    assert not plan_of(model, x, target="onnx").skips


def test_skip_pattern_is_the_reason_and_covers_modules_without_weights() -> None:
    model, inputs = build("attention")
    found = plan_of(model, *inputs, skip=("up", "out.weight"))
    told = {skip.target: skip.reason for skip in found.skips}
    assert "skip pattern 'up'" in told["up.weight"] and "skip pattern 'out.weight'" in told["out.weight"]
    assert not any(p.target in ("up.weight", "out.weight") for p in found.places)


def test_outer_product_of_positions_stays_float() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequency", torch.rand(4))

        def forward(self, position: torch.Tensor) -> torch.Tensor:
            return (self.frequency[None, :, None] @ position[:, None, :]).cos()

    found = plan_of(Rotary(), torch.arange(6.0).repeat(2, 1), target="onnx")
    assert "outer product" in reasons(found)[0] and not found.places


def test_cat_shares_one_grid_where_the_target_wants_it() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1))

    x = torch.randn(2, 3, 5, 5)
    found = plan_of(Cat(), x)
    shared = [p for p in found.places if p.node in ("relu", "relu_1", "cat")]
    assert len({p.quantizer for p in shared}) == 1 and [p.follow for p in shared] == [False, False, True]
    assert relative(output(convert(Cat().eval(), [(x,)]), (x,)), output(Cat().eval(), (x,))) > 0  # other weights
    model = Cat().eval()
    assert relative(output(convert(model, [(x,)]), (x,)), model(x)) < 0.02


def test_double_and_half_models_stay_float_with_the_reason() -> None:
    found = plan_of(nn.Linear(3, 2).double(), torch.randn(2, 3, dtype=torch.float64))
    assert "float64" in reasons(found)[0] and not found.places


def test_second_insertion_finds_every_operation_done() -> None:
    model, inputs = build("conv_residual")
    graph_module = prepare(model, [inputs])
    before = quantizers(graph_module)
    result = InsertFakeQuant()(graph_module)
    assert not result.modified and quantizers(graph_module) == before
    assert all("fake-quantized already" in row.reason for row in result.report.skipped) and result.report.skipped
    from torchopt_passes.graph.quantization import ConvertQuantized

    ConvertQuantized()(graph_module)
    again = InsertFakeQuant()(graph_module)
    assert not again.modified and all("int8 already" in row.reason for row in again.report.skipped)


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(top.ConfigError, match=r"inductor.*onnx"):
        get_target("tpu")


def test_a_module_s_name_may_hold_a_hyphen() -> None:
    """torchvision's RegNets have blocks called ``block1-0``."""
    model = nn.Sequential()
    model.add_module("block1-0", nn.Linear(4, 4))
    model.add_module("block1_0", nn.Linear(4, 4))
    graph = top.capture(model.eval(), (torch.randn(2, 4),))
    plan = top.InsertFakeQuant(target="onnx", qat=False)(graph).plan
    names = {edit.target: edit.quantizer for edit in plan.edits if edit.target.endswith("weight")}
    assert names == {"block1-0.weight": "block1_0_weight", "block1_0.weight": "block1_0_weight_1"}
