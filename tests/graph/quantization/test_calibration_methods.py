"""Each calibration method on prepared graphs: the range it chooses, what it says about it, and what it is worth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import torchopt_passes as top
from tests.functional.test_ranges import laplace
from tests.graph.quantization.helpers import output, quantizers, relative
from tests.models import build, images
from torchopt_passes.functional import aciq, ranges
from torchopt_passes.functional.affine import affine_qparams, fake_quantize, fold_batch_norm
from torchopt_passes.functional.histogram import StreamingHistogram
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer
from torchopt_passes.graph.quantization.observers import METHODS, RangeObserver
from torchopt_passes.graph.verify import sqnr

OWN = ("percentile", "mse", "entropy", "gaussian", "laplace", "auto")
RULES = {
    "percentile": ranges.percentile_range,
    "mse": ranges.mse_range,
    "entropy": ranges.entropy_range,
    "gaussian": aciq.gaussian_range,
    "laplace": aciq.laplace_range,
}


def prepared(model: nn.Module, batch: Any, **options: Any) -> fx.GraphModule:
    graph_module = top.capture(model, (), batch) if isinstance(batch, dict) else top.capture(model, batch)
    graph_module.eval()
    all_options: dict[str, Any] = {"qat": False, **options}
    InsertFakeQuant(**all_options)(graph_module)
    return graph_module


def linear(bits: int = 8) -> fx.GraphModule:
    return prepared(nn.Linear(4, 3), (torch.randn(2, 4),), activation_bits=bits)


def activation(graph_module: fx.GraphModule) -> FakeQuantizer:
    (found,) = [q for n, q in quantizers(graph_module).items() if n.startswith("act_")]
    return found


def edits(method: str, graph_module: fx.GraphModule, batches: list[Any], **options: Any) -> dict[str, Edit]:
    plan = Calibrate(method=method, **options).plan(graph_module, top.PassContext(calibration=batches))  # pyright: ignore
    return {edit.target: edit for edit in plan.edits}


BATCHES = [(laplace(4000, seed).reshape(-1, 4) * (1 + seed / 4),) for seed in range(4)]
EVERYTHING = torch.cat([batch for (batch,) in BATCHES])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", RULES)
def test_range_is_that_of_the_function_on_all_batches(method: str, bits: int) -> None:
    graph_module = linear(bits)
    Calibrate(method=method)(graph_module, top.PassContext(calibration=BATCHES))  # pyright: ignore
    quantizer = activation(graph_module)
    seen = StreamingHistogram()
    seen.add(EVERYTHING)
    low, high = RULES[method](*seen.bins(), ranges.Grid(0, 2**bits - 1, symmetric=False))
    low, high = max(low, float(EVERYTHING.min())), min(high, float(EVERYTHING.max()))
    assert (float(quantizer.min_val), float(quantizer.max_val)) == pytest.approx((low, high), rel=1e-6)
    assert 0 < int(quantizer.zero_point) < 2**bits - 1


@pytest.mark.parametrize("method", METHODS)
def test_behind_a_relu_the_grid_starts_at_zero(method: str) -> None:
    graph_module = linear()
    batches = [(batch.relu(),) for (batch,) in BATCHES]
    Calibrate(method=method)(graph_module, top.PassContext(calibration=batches))  # pyright: ignore
    quantizer = activation(graph_module)
    highest = float(EVERYTHING.max())
    assert int(quantizer.zero_point) == 0 and float(quantizer.min_val) == 0.0
    assert 0.0 < float(quantizer.max_val) <= highest * 1.01
    rounded = quantizer(EVERYTHING.relu())
    assert float(rounded.min()) == 0.0 and not rounded[EVERYTHING <= 0].any()
    assert sqnr(rounded, EVERYTHING.relu()) > (15.0 if method in {"gaussian", "moving_average"} else 30.0)


@pytest.mark.parametrize("method", METHODS)
def test_negative_and_constant_and_zero_data(method: str) -> None:
    for data in (-EVERYTHING.abs() - 1.0, torch.full((8, 4), 2.5), torch.zeros(8, 4)):
        graph_module = linear()
        Calibrate(method=method)(graph_module, top.PassContext(calibration=[(data,)]))  # pyright: ignore
        quantizer = activation(graph_module)
        assert quantizer.has_range
        if method not in {"gaussian", "laplace"}:  # they clip what they expect far out
            assert relative(quantizer(data) + 1e-9, data + 1e-9) < 0.05


@pytest.mark.parametrize("method", OWN)
def test_own_methods_take_batches_in_any_order_and_size(method: str) -> None:
    first = edits(method, linear(4), BATCHES)
    again = edits(method, linear(4), BATCHES)
    mixed = EVERYTHING[torch.randperm(len(EVERYTHING), generator=torch.Generator().manual_seed(5))]
    other = edits(method, linear(4), [(part,) for part in mixed.split(97)])
    for target, edit in first.items():
        if target == "weight":
            continue
        assert edit.to_dict() | {"reason": ""} == again[target].to_dict() | {"reason": ""}
        for field in ("min_val", "max_val"):
            assert torch.equal(getattr(edit, field), getattr(other[target], field))
        assert edit.numbers == other[target].numbers


def test_observer_does_not_grow_with_batches() -> None:
    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if isinstance(value, RangeObserver | StreamingHistogram):
            return sum(size(v) for v in vars(value).values())
        return 1

    observer = RangeObserver("auto", FakeQuantizer(bits=8, signed=False))
    sizes = set()
    for i in range(60):
        observer.watch(torch.randn(500) * 1.3**i)
        sizes.add(size(observer))
    assert len(sizes) == 1 and sizes.pop() < 70_000


def test_auto_is_never_worse_and_says_which_and_how_good() -> None:
    for bits in (3, 4, 8):
        found = edits("auto", linear(bits), BATCHES)
        (edit,) = [edit for target, edit in found.items() if target != "weight"]
        tried = {n.removeprefix("sqnr_"): v for n, v in edit.numbers.items() if n.startswith("sqnr_")}
        assert set(tried) == {"minmax", *RULES}
        chosen = edit.reason.split()[0]
        assert edit.numbers["sqnr"] == tried[chosen] == max(tried.values())
        assert edit.reason == f"{chosen} of 4 batches, the best SQNR"
        for method in RULES:
            single = edits(method, linear(bits), BATCHES)
            (one,) = [e for target, e in single.items() if target != "weight"]
            assert one.numbers["sqnr"] == tried[method] <= edit.numbers["sqnr"]
            assert one.reason == f"{method} of 4 batches"
        graph_module = linear(bits)
        Calibrate(method="auto")(graph_module, top.PassContext(calibration=BATCHES))
        measured = sqnr(activation(graph_module)(EVERYTHING), EVERYTHING)
        assert edit.numbers["sqnr"] == pytest.approx(measured, abs=0.1)


def test_auto_takes_minmax_where_nothing_is_to_be_clipped() -> None:
    uniform = [(torch.linspace(0, 255, 4096).round().reshape(-1, 4),)]  # on the grid as it is
    (edit,) = [e for target, e in edits("auto", linear(8), uniform).items() if target != "weight"]
    assert edit.reason.startswith(("minmax", "mse")) and edit.numbers["max"] == pytest.approx(255, rel=2e-3)


def test_decibels_at_four_bits() -> None:
    def gained(method: str) -> float:
        graph_module = linear(4)
        Calibrate(method=method)(graph_module, top.PassContext(calibration=BATCHES))  # pyright: ignore
        return sqnr(activation(graph_module)(EVERYTHING), EVERYTHING)

    base = gained("minmax")
    assert gained("mse") > base + 3.5 and gained("laplace") > base + 3.5
    assert gained("auto") >= gained("mse") - 0.01
    assert gained("entropy") > base + 2.0


def test_percentile_option() -> None:
    highs = [
        next(e for t, e in edits("percentile", linear(), BATCHES, percentile=p).items() if t != "weight").numbers["max"]
        for p in (90.0, 99.0, 100.0)
    ]
    assert highs[0] == pytest.approx(float(EVERYTHING.quantile(0.95)), rel=0.02)
    assert highs[1] == pytest.approx(float(EVERYTHING.quantile(0.995)), rel=0.02)
    assert highs[2] == float(EVERYTHING.max())
    assert Calibrate(method="percentile", percentile=99.9).recipe() == {
        "calibrate": {"method": "percentile", "percentile": 99.9}
    }
    for bad in (
        {"percentile": 0.0},
        {"percentile": 101.0},
        {"percentile": 99.0},
        {"method": "mse", "percentile": 99.0},
    ):
        with pytest.raises(top.ConfigError, match="percentile"):
            Calibrate(**bad)  # pyright: ignore
    with pytest.raises(top.ConfigError, match="weight_method"):
        Calibrate(weight_method="entropy")  # pyright: ignore


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    graph_module = linear()
    before = {n: b.clone() for n, b in graph_module.named_buffers()}
    with pytest.raises(top.ConfigError, match=r"fake_quant\.act_.*finite"):
        Calibrate(method="mse")(graph_module, top.PassContext(calibration=[(torch.full((2, 4), math.inf),)]))
    assert all(torch.equal(before[n], b) for n, b in graph_module.named_buffers())
    with pytest.raises(top.ConfigError, match="no calibration method"):
        RangeObserver("guess", FakeQuantizer(bits=8, signed=False))
    with pytest.raises(top.ConfigError, match="no values"):
        RangeObserver("mse", FakeQuantizer(bits=8, signed=False)).choose()


# weights


def test_weights_take_the_least_squares_range_of_their_folded_channels() -> None:
    source, inputs = build("conv_residual")
    model: Any = source
    heavy = laplace(model.stem.weight.numel(), 3).reshape(model.stem.weight.shape)
    model.stem.weight.data.copy_(heavy * heavy.abs())
    exact = edits("minmax", prepared(model, inputs, weight_bits=4), [inputs])
    graph_module = prepared(model, inputs, weight_bits=4)
    least = edits("minmax", graph_module, [inputs], weight_method="mse")
    norm = model.bn1
    folded, _ = fold_batch_norm(
        model.stem.weight.detach(),
        None,
        gamma=norm.weight.detach(),
        beta=norm.bias.detach(),
        mean=norm.running_mean,
        var=norm.running_var,
        eps=norm.eps,
    )

    def error(edit: Any) -> torch.Tensor:
        scale, zero = affine_qparams(edit.min_val, edit.max_val, -7, 7, symmetric=True)
        return (fake_quantize(folded, scale, zero, -7, 7, 0) - folded).square().sum((1, 2, 3))

    before, after = exact["stem.weight"], least["stem.weight"]
    assert before.reason == "exact range of the weight" and after.reason == "least squared error of the weight"
    assert bool((error(after) <= error(before) * (1 + 1e-5)).all()) and float(error(after).sum()) < float(
        error(before).sum()
    )
    low, high = ranges.channel_mse_range(folded, ranges.Grid(-7, 7, symmetric=True), 0)
    torch.testing.assert_close(after.min_val, low, rtol=1e-5, atol=1e-6)  # pyright: ignore
    torch.testing.assert_close(after.max_val, high, rtol=1e-5, atol=1e-6)  # pyright: ignore
    signal = float(folded.square().sum())
    for edit in (before, after):
        assert edit.numbers["sqnr"] == pytest.approx(10 * math.log10(signal / float(error(edit).sum())), abs=1e-3)
    assert after.numbers["sqnr"] > before.numbers["sqnr"] + 0.3
    for target in least:
        if "sqnr" in exact[target].numbers:
            assert least[target].numbers["sqnr"] >= exact[target].numbers["sqnr"] - 1e-4

    calibrate = Calibrate(method="mse", weight_method="mse")
    context = top.PassContext(calibration=[inputs, images(3)])
    assert calibrate(graph_module, context).report.proof.status == "proven"
    assert not calibrate(graph_module, context).modified
    expected = output(graph_module, inputs)
    assert ConvertQuantized()(graph_module).report.proof.status == "proven"
    torch.testing.assert_close(output(graph_module, inputs), expected, rtol=0.1, atol=0.1)


def test_a_graph_that_learns_takes_the_exact_range_again() -> None:
    model, inputs = nn.Linear(64, 3), (torch.randn(8, 64),)
    model.weight.data.copy_(laplace(192).reshape(3, 64))
    graph_module = prepared(model, inputs, qat=True, weight_bits=4)
    Calibrate(weight_method="mse")(graph_module, top.PassContext(calibration=[inputs]))
    weight = quantizers(graph_module)["weight"]
    assert bool((weight.max_val < model.weight.detach().amax(1)).any())
    graph_module.train()(*inputs)
    assert torch.equal(weight.max_val, model.weight.detach().amax(1))


# whole models


def test_residual_net_with_an_outlier_in_its_input_is_nearer_to_float_at_three_bits() -> None:
    model, _ = build("conv_residual")
    model.eval()
    data = [images(n) for n in (8, 7, 6)]
    for (image,) in data:
        image[0, 0, 0, 0] = 40.0
    error = {}
    for method in ("minmax", "mse", "auto"):
        graph_module = prepared(model, data[0], activation_bits=3)
        Calibrate(method=method)(graph_module, top.PassContext(calibration=data))  # pyright: ignore
        error[method] = relative(output(graph_module, data[0]), output(model, data[0]))
    assert error["mse"] < 0.6 * error["minmax"] and error["auto"] < 0.6 * error["minmax"]


def test_transformer_calibrates_and_converts_with_every_method() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = BertModel(config, add_pooling_layer=False).eval()
    batches = [{"input_ids": torch.randint(0, 60, (2, n))} for n in (7, 9)]
    with torch.no_grad():
        expected = model(**batches[0]).last_hidden_state
    start = prepared(model, batches[0], target="onnx")
    for method in OWN:
        calibrate = top.on_copy(Calibrate(method=method, weight_method="mse"))  # pyright: ignore
        result = calibrate(start, top.PassContext(calibration=batches))
        rows = [row for row in result.report.rows if row.action == "changed"]
        assert len(rows) == len(quantizers(start)) and all("sqnr" in row.numbers for row in rows)
        assert min(row.numbers["sqnr"] for row in rows) > 15.0
        graph_module = result.graph_module
        assert ConvertQuantized()(graph_module).report.proof.status == "proven"
        with torch.no_grad():
            actual = graph_module(**batches[0]).last_hidden_state
        assert relative(actual, expected) < 0.1, method


class Pooled(nn.Module):
    """A convolution, a max pool, and a linear that reads an average over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.pool = nn.MaxPool2d(4)
        self.next = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.next(self.pool(torch.relu(self.conv(x))))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("method", METHODS)
def test_values_in_front_of_a_max_pool_count_as_far_as_it_keeps_them(method: str) -> None:
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(8, 1, 16, 16)
    graph_module = prepared(model, (x,))
    (place,) = [name for name, q in quantizers(graph_module).items() if name == "act_relu"]
    chosen = edits(method, graph_module, [(x,)])["relu"]
    observer = RangeObserver(method, quantizers(graph_module)[place])
    with torch.no_grad():
        values = torch.relu(model.conv(x))
        observer.watch(model.pool(values))
    assert torch.equal(chosen.max_val, observer.choose().high) and torch.equal(chosen.min_val, observer.choose().low)
    if method == "minmax":
        assert torch.equal(chosen.max_val, values.max().reshape(1))


def test_a_value_that_others_read_too_counts_whole() -> None:
    class Both(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.conv(x))
            return self.next(self.pool(x)).mean() + self.next(x).mean()

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(8, 1, 16, 16)
    graph_module = prepared(model, (x,))
    observer = RangeObserver("mse", quantizers(graph_module)["act_relu"])
    with torch.no_grad():
        observer.watch(torch.relu(model.conv(x)))
    assert torch.equal(edits("mse", graph_module, [(x,)])["relu"].max_val, observer.choose().high)


@pytest.mark.parametrize("method", ["histogram", "minmax", "mse"])
def test_headroom_widens_averages_alone(method: str) -> None:
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(8, 1, 16, 16)
    graph_module = prepared(model, (x,))
    plain, wide = (edits(method, graph_module, [(x,)], headroom=factor) for factor in (1.0, 2.0))
    changed = [name for name in plain if not torch.equal(plain[name].max_val, wide[name].max_val)]
    assert changed == ["adaptive_avg_pool2d"]
    (name,) = changed
    assert torch.equal(wide[name].max_val, 2 * plain[name].max_val)
    assert torch.equal(wide[name].min_val, 2 * plain[name].min_val)
    assert "2 times as wide" in wide[name].reason and "sqnr" not in wide[name].numbers
    with pytest.raises(top.ConfigError, match="headroom must be >= 1"):
        Calibrate(headroom=0.5)
