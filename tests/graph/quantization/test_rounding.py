"""Rounding repair: GPTQ, AdaRound and block reconstruction on prepared graphs of real small networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchopt_passes as top
from tests.graph.quantization.helpers import output, prepare, quantizers, relative
from torchopt_passes.functional.gptq import add_hessian
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.graph.quantization.weight_layers import find_layers

Batches = list[tuple[torch.Tensor]]


class Residual(nn.Module):
    """A residual block whose batch norms have small variances and an eps of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, eps=1e-3)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(x + self.norm2(self.second(y)))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Residual(12), Residual(12))
        self.fc = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, Batches, Batches]:
    """Return the net with statistics of its data, calibration batches and held-out batches."""
    torch.manual_seed(0)
    model = ResidualNet()
    batches: Batches = [(torch.randn(8, 3, 10, 10) * (1 + torch.rand(8, 3, 1, 1)),) for _ in range(8)]
    with torch.no_grad():
        for batch in batches[:4] * 10:
            model(*batch)
    return model.eval(), batches[:4], batches[4:]


def error(graph_module: nn.Module, model: nn.Module, batches: Batches) -> float:
    actual, expected = (torch.cat([output(one, batch) for batch in batches]) for one in (graph_module, model))
    return relative(actual, expected)


@pytest.mark.parametrize(
    ("pass_", "factor"),
    [
        (top.RoundWeights(), 0.6),
        (top.OptimizeRounding(steps=60), 0.9),
        (top.ReconstructBlocks(steps=60), 0.75),
        (top.ReconstructBlocks(steps=40, fisher=True), 0.9),
    ],
    ids=["gptq", "adaround", "blocks", "fisher"],
)
def test_each_beats_nearest_on_held_out_data_and_is_proven(residual: Any, pass_: top.GraphPass, factor: float) -> None:
    model, batches, held_out = residual
    graph_module = prepare(model, batches, target="onnx", weight_bits=3)
    nearest = error(graph_module, model, held_out)
    source = {name: value.clone() for name, value in model.state_dict().items()}
    result = pass_(graph_module, top.PassContext(calibration=batches))
    assert result.report.proof.status == "proven"
    assert error(graph_module, model, held_out) < factor * nearest
    assert len(result.plan.edits) == 6 and not result.plan.skips
    for edit in result.plan.edits:
        assert edit.numbers["error"] <= edit.numbers["error_nearest"] and edit.numbers["bits"] == 3
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


def test_weights_lie_on_their_grids_and_the_plan_fits_the_source(residual: Any) -> None:
    model, batches, held_out = residual
    graph_module = prepare(model, batches, target="inductor", weight_bits=4)
    plan = top.RoundWeights()(graph_module, top.PassContext(calibration=batches)).plan
    for name, quantizer in quantizers(graph_module).items():
        if name.startswith("act_"):
            continue
        fqn = next(edit.target for edit in plan.edits if edit.target.replace(".", "_") == name)
        weight = graph_module.get_parameter(fqn).detach()
        norm = {"first": "norm1", "second": "norm2"}.get(fqn.split(".")[-2])
        if norm is not None:
            owner: Any = model.get_submodule(fqn.rsplit(".", 2)[0]).get_submodule(norm)
            weight = weight * (owner.weight * torch.rsqrt(owner.running_var + owner.eps)).detach().view(-1, 1, 1, 1)
        steps = weight / quantizer.scale.view(-1, *[1] * (weight.ndim - 1))
        assert float((steps - steps.round()).abs().max()) < 1e-3 and float(steps.abs().max()) < 7.5
    source = copy.deepcopy(model)
    plan.apply(source)
    top.set_fake_quant(graph_module, False)
    assert error(graph_module, source, held_out) < 1e-5


def test_converted_integers_are_those_that_were_chosen(residual: Any) -> None:
    model, batches, held_out = residual
    graph_module = prepare(model, batches, target="onnx", weight_bits=4)
    top.RoundWeights()(graph_module, top.PassContext(calibration=batches))
    expected = error(graph_module, model, held_out)
    top.ConvertQuantized()(graph_module)
    assert error(graph_module, model, held_out) == pytest.approx(expected, rel=1e-2)


def test_the_same_seed_gives_the_same_bits_and_batches_may_be_a_generator(residual: Any) -> None:
    model, batches, _ = residual
    graph_module = prepare(model, batches, weight_bits=4)
    pass_ = top.ReconstructBlocks(steps=3)
    first, second = (pass_.plan(graph_module, top.PassContext(calibration=iter(batches), seed=1)) for _ in range(2))
    assert first == second
    limited = top.RoundWeights(max_batches=1).plan(graph_module, top.PassContext(calibration=batches))
    assert limited != top.RoundWeights().plan(graph_module, top.PassContext(calibration=batches))
    with pytest.raises(top.ConfigError, match="needs data"):
        pass_.plan(graph_module)
    with pytest.raises(top.ConfigError, match="empty"):
        pass_.plan(graph_module, top.PassContext(calibration=[]))


def test_blocks_are_found_or_named_and_a_wrong_name_is_refused(residual: Any) -> None:
    model, batches, _ = residual
    graph_module, context = prepare(model, batches, weight_bits=4), top.PassContext(calibration=batches[:1])

    def reasons(**options: Any) -> dict[str, str]:
        plan = top.ReconstructBlocks(steps=1, **options).plan(graph_module, context)
        return {edit.target: edit.reason for edit in plan.edits}

    found = reasons()
    assert "'blocks.0'" in found["blocks.0.first.weight"] and "'blocks.0'" in found["blocks.0.second.weight"]
    assert "'stem.weight'" in found["stem.weight"]
    assert "'blocks'" in reasons(blocks=("blocks",))["blocks.1.first.weight"]
    assert "'blocks.1.first.weight'" in reasons(blocks=("blocks.0",))["blocks.1.first.weight"]
    with pytest.raises(top.ConfigError, match="no module"):
        reasons(blocks=("blocks.7",))


def test_uncalibrated_graphs_are_refused_and_tied_weights_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    graph_module = top.capture(model, (torch.randn(2, 8),))
    top.InsertFakeQuant(qat=False)(graph_module)
    with pytest.raises(top.PassError, match="run Calibrate first"):
        top.RoundWeights().plan(graph_module, top.PassContext(calibration=[torch.randn(2, 8)]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2), (3, 6, 9, 11)),
        (nn.Conv2d(4, 4, 4, padding="same"), (2, 4, 7, 8)),
        (nn.Conv1d(6, 6, 5, padding=2, groups=6), (3, 6, 12)),
        (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
        (nn.Linear(6, 4), (3, 5, 6)),
    ],
    ids=["grouped", "same", "depthwise1d", "conv3d", "linear"],
)
def test_a_layer_is_the_product_of_its_matrices_and_columns(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    graph_module = top.capture(nn.Sequential(layer).eval(), (x,))
    (found,) = find_layers(graph_module)
    assert found.fqn == "0.weight" and not found.why_not
    weight: Any = layer.weight
    matrix, columns = found.matrix(weight.detach()), found.columns(x)
    product = torch.einsum("gsc,grc->sgr", columns, matrix).flatten(1) + layer.bias  # pyright: ignore
    expected = layer(x).detach()
    rows = expected.movedim(1, -1) if found.is_convolution else expected
    torch.testing.assert_close(product, rows.reshape(-1, rows.shape[-1]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.weight(matrix, weight.detach()), weight.detach())


def test_a_plain_product_is_transposed() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w + functional.linear(x, self.w.T)

    (layer,) = find_layers(top.capture(Product().eval(), (torch.randn(3, 6),)))
    assert layer.transposed and layer.uses == 2 and layer.matrix(torch.zeros(6, 4)).shape == (1, 4, 6)


def test_a_walk_sees_what_the_rounded_layers_before_give() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    graph_module = top.capture(model, (batches[0],)).eval()
    changed = torch.randn(6, 6)
    hessian, expected = torch.zeros(6, 6), torch.zeros(6, 6)
    with walking(graph_module, batches, "Test") as flat:
        walk = Walk(graph_module, flat)
        first, second = find_layers(graph_module, walk.graph)
        walk.advance(first.operation)
        walk.set(first.fqn, changed)
        walk.advance(second.operation)
        for batch, x in enumerate(batches):
            inside = walk.input(batch, second.operation, 0)
            torch.testing.assert_close(inside, torch.tanh(functional.linear(x, changed, model[0].bias)))  # pyright: ignore
            add_hessian(hessian, inside)
            add_hessian(expected, torch.tanh(x @ changed.T + model[0].bias))  # pyright: ignore
        assert all(len(values) <= 2 for values in walk.values)  # what nothing reads any more is gone
    torch.testing.assert_close(hessian, expected)


def test_a_transformers_encoder() -> None:
    from tests.callbacks.loops import tiny_bert

    model = tiny_bert().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 20, (4, 8), generator=generator)} for _ in range(4)]
    graph_module = prepare(model, batches, target="onnx", weight_bits=3)
    expected = torch.cat([output(model, batch) for batch in batches])
    before = relative(torch.cat([output(graph_module, batch) for batch in batches]), expected)
    result = top.RoundWeights()(graph_module, top.PassContext(calibration=batches))
    after = relative(torch.cat([output(graph_module, batch) for batch in batches]), expected)
    assert len(result.plan.edits) == 7 and after < before


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))])
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks[0](x))


@pytest.mark.parametrize("fisher", [False, True])
def test_the_objective_of_blocks_is_that_of_the_paper(fisher: bool) -> None:
    """BRECQ, equation 10, one output at a time: sum of (dL/dz_i)^2 (z_i - z~_i)^2, for rounding to nearest."""
    torch.manual_seed(1)
    model, batch = Mlp().eval(), torch.randn(16, 6)
    graph_module = prepare(model, [(batch,)], weight_bits=3)
    plan = top.ReconstructBlocks(steps=1, fisher=fisher).plan(graph_module, top.PassContext(calibration=[(batch,)]))
    edit = next(edit for edit in plan.edits if edit.target == "blocks.0.0.weight")
    q = quantizers(graph_module)
    up, down = model.blocks[0][0], model.blocks[0][2]  # pyright: ignore
    with torch.no_grad():
        hidden = functional.linear(q["act_x"](batch), q["blocks_0_0_weight"](up.weight), up.bias).relu()
        rounded = functional.linear(q["act_relu"](hidden), q["blocks_0_2_weight"](down.weight), down.bias)
        rounded = q["act_linear_1"](rounded)  # what the next block reads
        exact = model.blocks[0](batch)
    importance = torch.ones_like(exact)
    for n in range(len(batch)) if fisher else ():
        z = exact[n].clone().requires_grad_()
        logits = model.fc(z)
        (-torch.log(logits.exp().max() / logits.exp().sum())).backward()
        assert z.grad is not None
        importance[n] = z.grad**2
    error = size = 0.0
    for n in range(16):
        for i in range(6):
            error += float(importance[n, i] * (exact[n, i] - rounded[n, i]) ** 2)
            size += float(importance[n, i] * exact[n, i] ** 2)
    assert edit.numbers["error_nearest"] == pytest.approx(error / size, rel=1e-4)
    assert 1e-4 < error / size < 1.0
