"""Costs against hand formulas, against torch's own counter on the unmodified model, at every stage of a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import Attention, ConvResidual, TiedTwice
from torchopt_passes._compat import decomposed_ops
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.cost import ModelCost, measure
from torchopt_passes.graph.pruning import PruneWeights
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant


class Call(nn.Module):
    """One operation on the inputs and a weight."""

    def __init__(self, function: Any, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


F = nn.functional
N = 3  # batch of every example
CASES: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear": (nn.Linear(4, 5), (4,), 4 * 5),
    "linear on sequences": (nn.Linear(4, 5), (6, 4), 6 * 4 * 5),
    "conv1d": (nn.Conv1d(4, 6, 3), (4, 9), 6 * 7 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8), 6 * 4 * 4 * 4 * 9),
    "conv2d in groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), 6 * 6 * 6 * 2 * 9),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8), 4 * 6 * 6 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 27 * 2 * 8),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 4 * 25 * 6 * 9),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 4 * 25 * 3 * 9),
    "transposed 1-d": (nn.ConvTranspose1d(4, 6, 3), (4, 5), 4 * 5 * 6 * 3),
    "matmul": (Call(torch.matmul, 4, 5), (6, 4), 6 * 4 * 5),
    "matrix times vector": (Call(torch.matmul, 4), (6, 4), 6 * 4),
    "addmm": (Call(lambda x, w: torch.addmm(torch.zeros(5), x, w), 4, 5), (4,), 4 * 5),
    "bmm": (Call(lambda x, w: torch.bmm(x, w.expand(x.shape[0], 4, 5)), 4, 5), (6, 4), 6 * 4 * 5),
    "baddbmm": (
        Call(lambda x, w: torch.baddbmm(torch.zeros(1), x, w.expand(x.shape[0], 4, 5)), 4, 5),
        (6, 4),
        6 * 4 * 5,
    ),
    "einsum": (Call(lambda x, w: torch.einsum("nlh,hk->nkl", x, w), 4, 5), (6, 4), 6 * 4 * 5),
    "attention": (Call(lambda x, _: F.scaled_dot_product_attention(x, x, x), 1), (2, 6, 4), 2 * 6 * 6 * (4 + 4)),
    "causal attention": (
        Call(lambda x, _: F.scaled_dot_product_attention(x, x, x, is_causal=True), 1),
        (2, 6, 4),
        2 * 6 * 6 * 8,
    ),
    "cross attention, grouped": (
        Call(lambda x, _: F.scaled_dot_product_attention(x, x[:, :2, :3], x[:, :2, :3, :3], enable_gqa=True), 1),
        (4, 6, 4),
        4 * 6 * 3 * (4 + 3),
    ),
    "nothing": (nn.ReLU(), (4,), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name: str) -> None:
    module, shape, expected = CASES[name]
    assert measure(module, torch.randn(N, *shape)).macs == expected


def test_macs_of_a_recurrent_kernel_of_the_device() -> None:
    # on CPU oneDNN runs a whole LSTM layer as one operation; export warns of the flat weights that nn.LSTM keeps
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = nn.Parameter(torch.randn(32, 4)), nn.Parameter(torch.randn(32, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zeros = x.new_zeros(1, x.shape[0], 8)
            return torch.lstm(x, (zeros, zeros), (self.w, self.u), False, 1, 0.0, False, False, True)[0]

    assert measure(Recurrent(), torch.randn(2, 5, 4)).macs == 5 * 32 * (4 + 8)


def models() -> dict[str, tuple[nn.Module, Any]]:
    return {
        "conv": (ConvResidual(), (torch.randn(2, 3, 8, 8),)),
        "tied": (TiedTwice(), (torch.randint(0, 11, (2, 5)),)),
        "attention": (Attention(), (torch.randn(2, 6, 16),)),
        "encoder": (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (torch.randn(2, 7, 16),)),
    }


@pytest.mark.parametrize("name", ["conv", "tied", "attention", "encoder"])
def test_macs_agree_with_the_counter_of_torch_on_the_source(name: str) -> None:
    model, inputs = models()[name]
    model.eval()
    cost = measure(model, inputs)
    # with gradients there are no fused inference kernels; torch's counter knows attention on CPU by its math alone
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert cost.batch == 2
    assert cost.macs == counter.get_total_flops() // 2 // 2


def test_macs_belong_to_their_layers() -> None:
    cost = measure(ConvResidual().eval(), torch.randn(2, 3, 8, 8))
    macs = {layer.name: layer.macs for layer in cost.layers}
    assert macs["stem"] == 8 * 64 * 27
    assert macs["depthwise"] == 8 * 64 * 9
    assert macs["fc"] == 40
    assert macs["bn1"] == 0
    assert [layer.name for layer in cost.layers] == ["stem", "bn1", "conv", "bn2", "depthwise", "fc"]


def test_a_layer_called_twice_counts_twice_and_a_tied_weight_once() -> None:
    cost = measure(TiedTwice().eval(), torch.randint(0, 11, (2, 5)))
    layers = {layer.name: layer for layer in cost.layers}
    assert layers["block"].macs == 2 * 5 * 64
    assert layers["block"].parameters == 72
    assert layers["head"].parameters == 0
    assert layers["head"].macs == 5 * 8 * 11
    assert cost.parameters == sum(p.numel() for p in TiedTwice().parameters())
    assert cost.bytes == 4 * (cost.parameters + 1 + 8)  # float32 parameters and the two buffers
    assert layers[""].parameters == 64


def test_attention_of_the_zoo_counts_projections_and_products() -> None:
    length = 6
    cost = measure(Attention().eval(), torch.randn(2, length, 16))
    assert cost.macs == length * 16 * (48 + 16 + 2 * 32) + 4 * length * length * (4 + 4)


def test_zeros_are_those_of_the_pruning() -> None:
    graph_module = capture(nn.Linear(8, 6, bias=False), (torch.randn(2, 8),))
    assert measure(graph_module).sparsity == 0.0
    PruneWeights(sparsity=0.75)(graph_module)
    cost = measure(graph_module)
    assert cost.total.zeros == 36
    assert cost.sparsity == 0.75
    assert cost.macs == 48


def int8(model: nn.Module, x: torch.Tensor, *passes: Any) -> Any:
    graph_module = capture(model.eval(), (x,))
    context = PassContext(calibration=[x])
    for item in (*passes, InsertFakeQuant(target="onnx"), Calibrate(), ConvertQuantized()):
        item(graph_module, context)
    return graph_module


def test_int8_weights_are_parameters_of_one_byte() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), flat=nn.Flatten(), fc=nn.Linear(8 * 36, 10)))
    x = torch.randn(4, 3, 8, 8)
    before = measure(model, x)
    after = measure(int8(model, x, PruneWeights(sparsity=0.5)))
    assert after.parameters == before.parameters
    assert after.macs == before.macs
    weights = 3 * 8 * 9 + 8 * 36 * 10
    scales = 18 * (4 + 8)  # float32 and int64 for each output channel
    assert after.bytes == weights + 4 * 18 + scales
    assert after.total.zeros >= weights // 2


def test_the_integer_that_stands_for_zero_is_the_zero() -> None:
    decomposed = decomposed_ops()
    root = nn.Module()
    root.register_buffer("w", torch.tensor([[3, 3, 0], [5, 3, 5]], dtype=torch.int8))
    root.register_buffer("s", torch.ones(2))
    root.register_buffer("z", torch.tensor([3, 5]))
    root.register_buffer("v", torch.tensor([7, 7, 0], dtype=torch.int8))
    graph = fx.Graph()
    x = graph.placeholder("x")
    w, s, z, v = (graph.get_attr(name) for name in "wszv")
    channels = decomposed.dequantize_per_channel.default
    weight = graph.call_function(channels, (w, s, z, 0, -128, 127, torch.int8))
    tensor = decomposed.dequantize_per_tensor.default
    bias = graph.call_function(tensor, (v, 0.5, 7, -128, 127, torch.int8))
    product = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output((product, bias))
    cost = measure(fx.GraphModule(root, graph), torch.ones(2, 3))
    assert (cost.parameters, cost.total.zeros) == (9, 2 + 2 + 2)
    assert cost.macs == 6
    assert cost.bytes == 6 + 3 + 2 * 4 + 2 * 8


def test_fake_quantized_graph_costs_the_same_macs_and_parameters() -> None:
    model, inputs = ConvResidual().eval(), torch.randn(2, 3, 8, 8)
    before = measure(model, inputs)
    graph_module = capture(model, (inputs,))
    InsertFakeQuant(target="onnx", qat=True)(graph_module, PassContext(calibration=[inputs]))
    Calibrate()(graph_module, PassContext(calibration=[inputs]))
    after = measure(graph_module)
    assert (after.macs, after.parameters) == (before.macs, before.parameters)


def test_measuring_touches_nothing() -> None:
    model = ConvResidual().train()
    state = copy.deepcopy(model.state_dict())
    graph_module = capture(model, (torch.randn(2, 3, 8, 8),))
    seed = torch.random.get_rng_state()
    measure(graph_module)
    measure(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert graph_module.training
    assert model.training
    assert torch.equal(seed, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bytes_follow_the_dtype() -> None:
    model = nn.Linear(4, 3)
    assert measure(model).bytes == 60
    assert measure(model.to(torch.bfloat16)).bytes == 30
    assert measure(model).macs is None


def test_inputs_that_do_not_fit_are_an_error_that_says_so() -> None:
    graph_module = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="does not run on the example inputs"):
        measure(graph_module, torch.randn(2, 5))


def test_an_empty_model_costs_nothing() -> None:
    assert measure(nn.Identity()) == ModelCost(layers=(), batch=1)
    assert measure(nn.Identity()).macs == 0
