"""@optimize: what comes out is proven, is still the class it was, and is made once."""

from __future__ import annotations

import abc
import copy
import inspect
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import torchopt_passes as top
from tests.models import ConvResidual, images, vectors
from torchopt_passes.decorators import OptimizeResult, optimize
from torchopt_passes.graph.fusion import FuseBatchNorm
from torchopt_passes.graph.quantization import Calibrate, ConvertQuantized, InsertFakeQuant
from torchopt_passes.recipe import load_recipe

HALF = top.PruneWeights(sparsity=0.5)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
made: list[str] = []  # what ran, in order


class Base(nn.Module):
    """A base with both spellings of super()."""

    def __init__(self, width: int) -> None:
        super(Base, self).__init__()  # noqa: UP008
        made.append("Base")
        self.fc = nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@optimize(HALF, example_inputs=X)
class Model(Base):
    """A model."""

    kind = "pruned"

    def __init__(self, width: int = 4, *, bias: bool = True) -> None:
        super(Model, self).__init__(width)  # noqa: UP008
        made.append("Model")
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x))

    @property
    def base_parameters(self) -> int:
        return sum(p.numel() for p in super().parameters())

    @classmethod
    def named(cls, width: int) -> Model:
        return cls(width)


class Child(Model):
    """A subclass that adds a layer after its parent's constructor."""

    def __init__(self) -> None:
        super().__init__(width=6)
        made.append("Child")
        self.tail = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(super().forward(x))


class Outer:
    """A name space."""

    class Inner(Base):
        """A nested model."""


def zeros(module: nn.Module) -> dict[str, float]:
    return {name: float((p == 0).float().mean()) for name, p in module.named_parameters() if p.ndim == 2}


def test_an_instance_comes_out_pruned_and_is_an_instance() -> None:
    torch.manual_seed(0)
    model = Model(4)
    assert type(model) is Model and isinstance(model, Base)
    assert not isinstance(model, fx.GraphModule)
    assert zeros(model) == {"fc.weight": 0.5, "head.weight": 0.5}
    result = model.torchopt_result
    assert isinstance(result, OptimizeResult)
    assert result.modified and result.report.proof.status == "proven"
    assert {edit.target for edit in result.plan.edits} == {"fc.weight", "head.weight"}


def test_it_equals_the_plan_applied_to_the_undecorated_model() -> None:
    class Plain(Base):
        def __init__(self) -> None:
            super().__init__(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(x))

    torch.manual_seed(0)
    model = Model(4)
    torch.manual_seed(0)
    plain = Plain()
    HALF(top.capture(plain, (X,))).plan.apply(plain)
    assert torch.equal(model(X), plain(X))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_construction_draws_the_same_random_numbers() -> None:
    torch.manual_seed(0)
    Model(4)
    after = torch.rand(3)
    torch.manual_seed(0)
    nn.Linear(8, 4), nn.Linear(4, 3)
    assert torch.equal(after, torch.rand(3))


def test_super_runs_once_and_the_passes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    whole = top.PruneWeights.__call__
    monkeypatch.setattr(top.PruneWeights, "__call__", lambda self, *a: runs.append("run") or whole(self, *a))
    made.clear()
    child = Child()
    assert made == ["Base", "Model", "Child"]
    assert runs == ["run"]
    assert type(child) is Child and isinstance(child, Model)
    assert zeros(child) == {"fc.weight": 0.5, "head.weight": 0.5, "tail.weight": 0.5}  # the layer added last too
    assert {e.target for e in child.torchopt_result.plan.edits} == {"fc.weight", "head.weight", "tail.weight"}


def test_super_without_arguments_works_in_methods_properties_and_class_methods() -> None:
    model = Model.named(4)
    assert type(model) is Model
    assert model.base_parameters == 8 * 4 + 4 + 4 * 3 + 3
    assert model(X).shape == (2, 3)


def test_a_decorated_subclass_is_optimized_by_its_own_passes_alone() -> None:
    @optimize(top.PruneWeights(sparsity=0.75), example_inputs=X)
    class Sparser(Model):
        pass

    model = Sparser(8)
    assert zeros(model) == {"fc.weight": 0.75, "head.weight": 0.75}
    assert len(model.torchopt_result.plan.passes) == 1


def test_metadata_and_signature_are_those_of_the_class() -> None:
    assert (Model.__name__, Model.__qualname__, Model.__module__) == ("Model", "Model", __name__)
    assert Model.__doc__ == inspect.getdoc(Model) == "A model." and Model.kind == "pruned"
    assert optimize(HALF, example_inputs=X)(Outer.Inner).__qualname__ == "Outer.Inner"
    assert str(inspect.signature(Model)) == "(width: 'int' = 4, *, bias: 'bool' = True) -> 'None'"
    assert list(inspect.signature(Child).parameters) == []
    assert [c.__name__ for c in Model.__mro__[:3]] == ["Model", "Model", "Base"]
    assert not hasattr(Model, "from_pretrained") and not hasattr(Model, "load_from_checkpoint")


def test_constructor_errors_are_its_own() -> None:
    with pytest.raises(TypeError, match="depth"):
        Model(depth=3)  # pyright: ignore[reportCallIssue]


def test_pickle_deepcopy_and_torch_save_neither_rerun_nor_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(4)
    monkeypatch.setattr(top.PruneWeights, "__call__", lambda *a: pytest.fail("run again"))
    made.clear()
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies.append(torch.load(stream, weights_only=False))
    for other in copies:
        assert type(other) is Model
        assert torch.equal(other(X), model(X))
        assert other.torchopt_result.report == model.torchopt_result.report
        assert other.torchopt_result.plan == model.torchopt_result.plan
    assert copies[1].torchopt_result is model.torchopt_result  # its masks are not doubled
    assert made == []
    assert pickle.loads(pickle.dumps(Model)) is Model


def test_state_dict_goes_to_another_instance() -> None:
    model, other = Model(4), Model(4)
    assert not torch.equal(model(X), other(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(X), other(X))


def test_an_optimizer_made_afterwards_trains_the_model() -> None:
    model = Model(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.is_leaf and parameter.grad is not None
        assert torch.allclose(parameter, before[name] - 0.1 * parameter.grad)
        assert bool((parameter.grad != 0).any())


def test_train_mode_is_that_of_a_new_model() -> None:
    @optimize(FuseBatchNorm(), example_inputs=images())
    class Net(ConvResidual):
        pass

    net = Net()
    assert net.training and all(child.training for child in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_fused_batch_norms_stay_in_the_class_and_equal_the_plain_model() -> None:
    @optimize([{"fuse_batch_norm": {}}, {"prune_weights": {"sparsity": 0.5}}], example_inputs=images())
    class Net(ConvResidual):
        def __init__(self) -> None:
            super().__init__()
            nn.init.uniform_(self.bn1.running_var, 0.5, 2.0)

    torch.manual_seed(1)
    net = Net()
    assert type(net) is Net
    assert isinstance(net.bn1, nn.Identity)
    torch.manual_seed(1)
    plain = ConvResidual()
    nn.init.uniform_(plain.bn1.running_var, 0.5, 2.0)
    passes = top.Pipeline(FuseBatchNorm(), HALF)
    graph = passes(top.capture(plain, images())).graph_module
    assert torch.allclose(net.eval()(*images()), graph.eval()(*images()), rtol=1e-5, atol=1e-6)


INT8 = top.Pipeline(InsertFakeQuant(target="onnx", qat=False), Calibrate(), ConvertQuantized())


def test_int8_comes_out_as_a_captured_graph(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[nn.Module] = []

    def data(model: nn.Module) -> top.PassContext:
        seen.append(model)
        return top.PassContext(calibration=[images(4)])

    @optimize(INT8, example_inputs=images(), context=data)
    class Net(ConvResidual):
        pass

    torch.manual_seed(0)
    net: Any = Net()
    torch.manual_seed(0)
    plain = ConvResidual().eval()
    assert isinstance(net, top.CapturedModule) and not isinstance(net, Net)
    assert not [r for r in caplog.records if r.name.startswith("torchopt_passes") and r.levelno >= logging.WARNING]
    assert any(t.dtype is torch.int8 for t in net.state_dict().values())
    assert type(seen[0]) is Net
    assert net.torchopt_result.modified
    with torch.no_grad():
        expected = plain(*images())
        error = float((net.eval()(*images()) - expected).norm() / expected.norm())
    assert 0 < error < 0.1


def test_a_function_keeps_its_name_and_arguments() -> None:
    @optimize(HALF, example_inputs=lambda model: (torch.ones(2, model.in_features),))
    def build(width: int, out: int = 4) -> nn.Linear:
        """Build it."""
        return nn.Linear(width, out)

    model = build(6, out=2)
    assert isinstance(model, nn.Linear) and model.weight.shape == (2, 6)
    assert zeros(model) == {"weight": 0.5}
    assert (build.__name__, build.__doc__) == ("build", "Build it.")
    assert list(inspect.signature(build).parameters) == ["width", "out"]


def test_a_function_may_return_a_captured_graph() -> None:
    graph = top.capture(nn.Linear(8, 4), (X,))
    passes = top.Pipeline(HALF, InsertFakeQuant(target="onnx"))
    result = optimize(passes, example_inputs=X)(lambda: graph)()
    assert result is graph
    assert zeros(graph) == {"weight": 0.5}
    assert hasattr(graph, "fake_quant")


@pytest.mark.parametrize(
    "inputs", [X, (X,), {"x": X}, ((X,), {}), lambda model: X], ids=["tensor", "tuple", "dict", "call", "function"]
)
def test_forms_of_example_inputs(inputs: Any) -> None:
    model = optimize(HALF, example_inputs=inputs)(lambda: Base(4))()
    assert zeros(model) == {"fc.weight": 0.5}


def test_forms_of_passes(tmp_path: Path) -> None:
    recipe = load_recipe({"version": 1, "passes": [{"prune_weights": {"sparsity": 0.5}}]})
    file = recipe.save(tmp_path / "recipe.yaml")
    for passes in (recipe, file, str(file), recipe.to_dict(), {"prune_weights": {"sparsity": 0.5}}, [HALF.recipe()]):
        model = optimize(passes, example_inputs=X)(lambda: Base(4))()
        assert zeros(model) == {"fc.weight": 0.5}


def test_nothing_to_do_gives_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = optimize(FuseBatchNorm(), example_inputs=X)(lambda: Base(4))()
    torch.manual_seed(0)
    assert torch.equal(model(X), Base(4)(X))
    assert type(model) is Base and not model.torchopt_result.modified


def test_context_skips_reach_the_passes() -> None:
    context = top.PassContext(skip=("head",))

    @optimize(HALF, example_inputs=X, context=context)
    class Net(Base):
        def __init__(self) -> None:
            super().__init__(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(x))

    assert zeros(Net()) == {"fc.weight": 0.5, "head.weight": 0.0}


def test_abstract_base_and_generic_bases_keep_their_meta_class() -> None:
    class Interface(abc.ABC):
        @abc.abstractmethod
        def width(self) -> int: ...

    @optimize(HALF, example_inputs=X)
    class Whole(Base, Interface):
        def __init__(self) -> None:
            super().__init__(4)

        def width(self) -> int:
            return 4

    @optimize(HALF, example_inputs=X)
    class Half(Base, Interface):
        pass

    assert isinstance(Whole(), Interface)
    with pytest.raises(TypeError, match="abstract"):
        Half(4)  # pyright: ignore[reportAbstractUsage]


def test_from_pretrained_is_optimized_with_the_loaded_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    inputs = {"input_ids": torch.arange(12).view(2, 6)}

    @optimize(HALF, example_inputs=inputs)
    class Bert(BertForSequenceClassification):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)

    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    sparse = Bert.from_pretrained(tmp_path / "dense")
    assert type(sparse) is Bert
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight, full = sparse.get_parameter(name), dense.get_parameter(name)
    assert float((weight == 0).float().mean()) == 0.5
    assert torch.equal(weight[weight != 0], full[weight != 0])
    again, info = Bert.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert torch.equal(again.get_parameter(name), weight) and not info["missing_keys"]
    sparse.save_pretrained(tmp_path / "sparse")
    back = BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert torch.equal(back.eval()(**inputs).logits, sparse.eval()(**inputs).logits)


def test_an_own_from_pretrained_is_kept() -> None:
    @optimize(HALF, example_inputs=X)
    class Net(Base):
        @classmethod
        def from_pretrained(cls, width: int) -> Net:
            net = cls(width)
            nn.init.constant_(net.fc.weight, 2.0)
            net.fc.weight.data[0] = 1.0
            return net

    class Sub(Net):
        pass

    for kind in (Net, Sub):
        net = kind.from_pretrained(2)
        assert type(net) is kind
        assert (net.fc.weight[0] == 0).all() and (net.fc.weight[1] == 2).all()
        assert zeros(kind(2)) == {"fc.weight": 0.5}  # a constructor afterwards is a constructor again


def test_a_plan_that_does_not_fit_the_source_gives_the_graph_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class OwnConv(nn.Module):  # no nn.Conv2d: the source has no place for a bias
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(nn.functional.conv2d(x, self.weight))

    with caplog.at_level(logging.WARNING):
        model = optimize(FuseBatchNorm(), example_inputs=images())(OwnConv)()
    assert isinstance(model, top.CapturedModule)
    assert "returns a captured graph" in caplog.text and "may not add a bias" in caplog.text


def test_a_model_that_is_not_what_was_proven_is_refused() -> None:
    class Off(top.MaskWeights):
        """An edit that does something else on the source."""

        def apply(self, module: nn.Module) -> None:
            super().apply(module)
            if not isinstance(module, fx.GraphModule):
                with torch.no_grad():
                    module.get_parameter(self.target).add_(1.0)

    class MisprunedWeights(top.GraphPass):
        def plan(self, graph_module: fx.GraphModule, context: Any = None) -> top.Plan:
            found = HALF.plan(graph_module, context)
            return top.Plan(tuple(Off(**edit.to_dict()) for edit in found.edits))

        def reference_state(self, graph_module: fx.GraphModule, plan: top.Plan) -> Any:
            return {e.target: graph_module.get_parameter(e.target).detach() * e.mask for e in plan.edits}  # pyright: ignore

    with pytest.raises(top.ProofError, match=r"fc\.weight of Base is not what was proven"):
        optimize(MisprunedWeights(), example_inputs=X)(lambda: Base(4))()


def test_wrong_decorations_are_refused_at_once() -> None:
    with pytest.raises(top.ConfigError, match="int is not"):
        optimize(HALF, example_inputs=X)(int)  # pyright: ignore
    with pytest.raises(top.ConfigError, match="a class or a function"):
        optimize(HALF, example_inputs=X)(3)  # pyright: ignore
    with pytest.raises(top.ConfigError, match="no pass is named 'prune'"):
        optimize("prune", example_inputs=X)
    recipe = {"version": 1, "callbacks": [{"gradual_pruning": {"sparsity": 0.5}}]}
    with pytest.raises(top.ConfigError, match="need training"):
        optimize(recipe, example_inputs=X)


def test_what_is_no_model_or_has_no_weights_is_refused() -> None:
    with pytest.raises(top.ConfigError, match=r"an nn\.Module was to be made, not None"):
        optimize(HALF, example_inputs=X)(lambda: None)()  # pyright: ignore
    with torch.device("meta"), pytest.raises(top.ConfigError, match=r"fc\.weight of Model has no values yet"):
        Model(4)


def test_errors_of_capture_and_passes_come_through() -> None:
    class Branches(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(top.CaptureError, match="Branches"):
        optimize(HALF, example_inputs=X)(Branches)(4)
    with pytest.raises(top.ConfigError, match="matches no parameter"):
        optimize(HALF, example_inputs=X, context=top.PassContext(skip=("nope",)))(Base)(4)


def test_a_class_that_cannot_be_subclassed_says_what_to_do() -> None:
    class Needs:
        def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)

    class Net(Base, Needs, tag="a"):
        pass

    with pytest.raises(top.ConfigError, match="decorate a function"):
        optimize(HALF, example_inputs=X)(Net)


def test_a_class_in_use_stays_as_it_is() -> None:
    small = optimize(HALF, example_inputs=X)(Base)
    model = small(4)
    assert isinstance(model, Base) and type(model) is small
    assert zeros(model) == {"fc.weight": 0.5}
    dense = Base(4)
    assert type(dense) is Base and zeros(dense) == {"fc.weight": 0.0}
    assert not hasattr(dense, "torchopt_result")


def test_two_bases_one_decorated() -> None:
    class Mixin:
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append("Mixin")

    class Both(Model, Mixin):
        pass

    model = Both(4)
    assert type(model) is Both and zeros(model) == {"fc.weight": 0.5, "head.weight": 0.5}


def test_decorating_twice_is_refused() -> None:
    with pytest.raises(top.ConfigError, match="decorated already"):
        optimize(HALF, example_inputs=X)(Model)


def test_functions_wrapped_in_the_body_find_super() -> None:
    @optimize(HALF, example_inputs=vectors())
    class Net(nn.Module):
        @torch.no_grad()
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    assert zeros(Net()) == {"fc.weight": 0.5}
