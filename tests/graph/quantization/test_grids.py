"""The grids of InsertFakeQuant: bits by layer, reduced ranges, symmetric and affine, power-of-two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchopt_passes as top
from tests.graph.quantization.helpers import convert, nodes, output, prepare, quantizers
from tests.models import build
from torchopt_passes._compat import decomposed_ops
from torchopt_passes.graph.quantization import InsertFakeQuant
from torchopt_passes.graph.quantization.targets import TARGETS


def made(option: str, value: object) -> InsertFakeQuant:
    options: dict[str, Any] = {option: value}
    return InsertFakeQuant(**options)


def bits_of(name: str, **options: Any) -> dict[str, int]:
    model, inputs = build(name)
    graph_module = top.capture(model, inputs)
    InsertFakeQuant(**options)(graph_module)
    return {quantizer: q.bits for quantizer, q in quantizers(graph_module).items()}


def test_bits_by_layer() -> None:
    found = bits_of("conv_residual", weight_bits_of={"stem": 4, "conv.weight": 2}, activation_bits_of={"fc": 6})
    assert found == {
        "stem_weight": 4, "conv_weight": 2, "depthwise_weight": 8, "fc_weight": 8,
        "act_x": 8, "act_relu": 8, "act_relu_1": 8, "act_mean": 6,
    }  # fmt: skip


def test_the_first_glob_counts() -> None:
    found = bits_of("conv_residual", weight_bits_of={"conv": 3, "*": 5})
    assert {n: b for n, b in found.items() if not n.startswith("act")} == {
        "stem_weight": 5, "conv_weight": 3, "depthwise_weight": 5, "fc_weight": 5,
    }  # fmt: skip
    assert set(bits_of("conv_residual", weight_bits_of={"*": 5, "conv": 3}).values()) == {5, 8}


def test_a_value_read_by_several_gets_the_widest_of_what_they_want() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    model.forward = lambda x: model["a"](x) + model["b"](x)  # pyright: ignore
    graph_module = top.capture(model, (torch.randn(2, 4),))
    plan = InsertFakeQuant(activation_bits_of={"a": 4, "b": 6}).plan(graph_module)
    (edit,) = [e for e in plan.edits if e.quantizer == "act_x"]  # pyright: ignore
    assert edit.bits == 6 and "widest" in edit.reason and "4" in edit.reason  # pyright: ignore
    plan = InsertFakeQuant(activation_bits_of={"a": 4, "b": 4}).plan(graph_module)
    assert [e.bits for e in plan.edits if e.quantizer == "act_x"] == [4]  # pyright: ignore


def test_sums_follow_the_convolution_that_reads_the_same_value() -> None:
    # relu is read by conv and by the residual sum
    assert bits_of("conv_residual", target="onnx", activation_bits_of={"conv": 4})["act_relu"] == 4


@pytest.mark.parametrize("width", [0, 32])
@pytest.mark.parametrize("option", ["weight_bits_of", "activation_bits_of"])
def test_layers_may_stay_float(width: int, option: str) -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    pass_ = made(option, {"conv": 8, "fc": width})
    report = pass_(graph_module).report
    assert {n for n in quantizers(graph_module) if not n.startswith("act")} == {
        "stem_weight", "conv_weight", "depthwise_weight",
    }  # fmt: skip
    (row,) = [row for row in report.skipped if row.target == "fc.weight"]
    assert row.reason == f"float: {option} gives 'fc' {width} bits"
    again = pass_(graph_module)
    assert not again.modified, "the globs are found again on the prepared graph"


def test_all_but_one_stay_float() -> None:
    found = bits_of("conv_residual", weight_bits_of={"fc": 8, "*": 32})
    assert set(found) == {"fc_weight", "act_mean"}


@pytest.mark.parametrize("option", ["weight_bits_of", "activation_bits_of"])
def test_wrong_globs_and_widths_are_refused(option: str) -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs)
    with pytest.raises(top.ConfigError, match=rf"{option} \['haed'\] match no matrix operation"):
        made(option, {"haed": 4})(graph_module)
    with pytest.raises(top.ConfigError, match="match no matrix operation"):
        made(option, {"bn1": 4})(graph_module)
    for width in (1, 9, 16, -1):
        with pytest.raises(top.ConfigError, match=rf"{option}\['fc'\] must be 2 to 8"):
            made(option, {"fc": width})
    pass_ = made(option, {"conv": 4, "fc": 0})
    assert top.make_pass(pass_.recipe()) == pass_


def test_reduced_range_keeps_two_products_in_16_bits() -> None:
    model, inputs = build("conv_residual")
    prepared = prepare(model, [inputs], reduce_range=True, weight_bits_of={"fc": 6, "stem": 8, "conv": 32})
    found = quantizers(prepared)
    assert {n: (q.quant_min, q.quant_max) for n, q in found.items() if n.endswith("weight")} == {
        "stem_weight": (-63, 63), "depthwise_weight": (-63, 63), "fc_weight": (-31, 31),
    }  # fmt: skip
    assert all((q.quant_min, q.quant_max) == (0, 255) for n, q in found.items() if n.startswith("act"))
    assert 2 * 255 * 63 < 2**15 <= 2 * 255 * 127  # what kernels without VNNI add in int16


def test_mixed_bits_convert_exactly() -> None:
    model, inputs = build("conv_residual")
    options: dict[str, Any] = {"weight_bits_of": {"conv": 4, "fc": 32}, "activation_bits_of": {"depthwise": 5}}
    prepared = prepare(build("conv_residual")[0], [inputs], **options)
    converted = convert(model, [inputs], **options)
    torch.testing.assert_close(output(converted, inputs), output(prepared, inputs), rtol=1e-4, atol=1e-4)
    integers = {n: t for n, t in converted.state_dict().items() if t.dtype is torch.int8}
    assert set(integers) == {"stem.weight", "conv.weight", "depthwise.weight"}
    assert int(integers["conv.weight"].abs().max()) == 7


GRIDS: list[dict[str, Any]] = [
    {"weight_symmetric": False},
    {"weight_symmetric": False, "per_channel": False, "weight_bits": 4},
    {"activation_symmetric": True},
    {"activation_symmetric": True, "weight_symmetric": False, "power_of_two": True},
    {"power_of_two": True},
]


def test_activations_are_what_the_target_computes_with() -> None:
    for target in TARGETS:
        assert InsertFakeQuant(target=target).signed_activations == (target == "tensorrt")
    assert InsertFakeQuant(target="onnx", activation_symmetric=True).signed_activations
    with pytest.raises(top.ConfigError, match="'tensorrt' cannot run uint8 activations"):
        InsertFakeQuant(target="tensorrt", activation_symmetric=False)
    model, inputs = build("conv_residual")
    converted = convert(model, [inputs], target="tensorrt")
    assert all(node.args[2] == 0 for node in nodes(converted, decomposed_ops().quantize_per_tensor.default))


@pytest.mark.parametrize("options", GRIDS, ids=lambda o: " ".join(o))
def test_every_grid_converts_exactly(options: dict[str, Any]) -> None:
    model, inputs = build("conv_residual")
    prepared = prepare(build("conv_residual")[0], [inputs], target="onnx", **options)
    for name, quantizer in quantizers(prepared).items():
        is_weight = name.endswith("weight")
        symmetric = options.get("weight_symmetric", True) if is_weight else options.get("activation_symmetric", False)
        assert quantizer.dtype is (torch.int8 if symmetric else torch.uint8)
        assert bool((quantizer.zero_point == 0).all()) or not symmetric
        exponent = torch.log2(quantizer.scale)
        assert bool((exponent == exponent.round()).all()) == options.get("power_of_two", False)
    converted = convert(model, [inputs], target="onnx", **options)
    torch.testing.assert_close(output(converted, inputs), output(prepared, inputs), rtol=1e-4, atol=1e-4)
    expected = torch.int8 if options.get("weight_symmetric", True) else torch.uint8
    assert sum(t.dtype is expected for t in converted.state_dict().values()) >= 4


def test_affine_weights_fit_a_lopsided_weight_better() -> None:
    model = torch.nn.Linear(32, 8)
    with torch.no_grad():
        model.weight.abs_().add_(1.0)
    x = torch.randn(4, 32)
    errors: list[float] = []
    for symmetric in (True, False):
        prepared = prepare(model, [(x,)], target="onnx", weight_symmetric=symmetric, weight_bits=3)
        rounded = quantizers(prepared)["weight"](model.weight)
        errors.append(float((rounded - model.weight).detach().square().mean()))
    assert errors[1] < errors[0] / 2


def test_power_of_two_steps_are_learned_in_training() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs).train()
    InsertFakeQuant(power_of_two=True)(graph_module)
    graph_module(*inputs)
    for quantizer in quantizers(graph_module).values():
        exponent = torch.log2(quantizer.scale)
        assert quantizer.has_range and torch.equal(exponent, exponent.round())
        levels = quantizer.quant_max - quantizer.quant_min
        assert bool((quantizer.scale * levels >= (quantizer.max_val - quantizer.min_val) * 0.99).all())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"activation_symmetric": True}, "'inductor' cannot run int8 activations"),
        ({"weight_symmetric": False}, "'inductor' cannot run uint8 weights"),
        ({"weight_bits": 16}, "weight_bits must be 2 to 8"),
    ],
)
def test_grids_that_a_target_lacks_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(top.ConfigError, match=what):
        InsertFakeQuant(**options)


def test_the_step_that_is_reported_is_the_step_that_rounds() -> None:
    model, inputs = build("conv_residual")
    graph_module = top.capture(model, inputs).eval()
    InsertFakeQuant(qat=False, power_of_two=True)(graph_module)
    plan = top.Calibrate(method="minmax")(graph_module, top.PassContext(calibration=[inputs])).plan
    found = quantizers(graph_module)
    for edit in plan.edits:
        step = edit.numbers["step"]
        assert step == float(found[edit.quantizer.removeprefix("fake_quant.")].scale.max())  # pyright: ignore
        assert torch.frexp(torch.tensor(step)).mantissa == 0.5, "a power of two"
