"""Tensors in the place of parameters: seen by every reader of the weight, in a forward and its backward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchopt_passes.callbacks import Callback, InformationBottleneck, L0Pruning, attach
from torchopt_passes.callbacks.stand_ins import StandIns
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.capture import capture


class Halve(Callback):
    """Computes with half of some weights."""

    def __init__(self, *fqns: str) -> None:
        self.fqns, self.modes = fqns, list[bool]()

    def stand_ins(self, training: bool) -> Mapping[str, torch.Tensor]:
        self.modes.append(training)
        model = self.student.model  # type: ignore[union-attr]
        return {fqn: model.get_parameter(fqn) * 0.5 for fqn in self.fqns}


class Tied(nn.Module):
    """One weight under two names, the second read by the parent's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.embed(x), self.head.weight)


class Checkpointed(nn.Module):
    """Runs its layer again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.out, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 1), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda value: torch.tanh(self.layer(value)), x, use_reentrant=self.reentrant)
        return self.out(hidden)


def halved(model: nn.Module, *fqns: str) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for fqn in fqns:
            other.get_parameter(fqn).mul_(0.5)
    return other


def attached(model: nn.Module, *fqns: str) -> Any:
    return attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [Halve(*fqns)])


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Any, tuple[str, ...], torch.Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ("0.weight", "1.bias"), randn(2, 4)),
    "tied": (Tied, ("embed.weight",), torch.tensor([[0, 3], [1, 4]])),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2), ("weight_ih_l0", "weight_hh_l1"), randn(5, 2, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        ("self_attn.out_proj.weight", "self_attn.in_proj_weight"),
        randn(3, 2, 4),
    ),
    "captured": (
        lambda: capture(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (randn(2, 4),)),
        ("0.weight",),
        randn(2, 4),
    ),
}


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_reader_of_the_weight_sees_what_stands_in_for_it(name: str, training: bool) -> None:
    make, fqns, x = MODELS[name]
    model = make().train(training)
    state = copy.deepcopy(model.state_dict())
    expected = first(halved(model, *fqns).train(training)(x))
    with attached(model, *fqns):
        assert torch.equal(first(model(x)), expected)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        Student.of(model).lift()
        for fqn in fqns:
            assert isinstance(model.get_parameter(fqn), nn.Parameter)
    assert not torch.equal(first(model(x)), expected)


@pytest.mark.parametrize("name", ["linear", "tied", "lstm", "captured"])
def test_gradients_reach_the_parameter_through_it(name: str) -> None:
    make, fqns, x = MODELS[name]
    model = make().train()
    other = halved(model, *fqns).train()
    first(other(x)).square().sum().backward()
    with attached(model, *fqns):
        first(model(x)).square().sum().backward()
        theirs = dict(other.named_parameters())
        for fqn, parameter in model.named_parameters():
            scale = 0.5 if fqn in fqns else 1.0
            assert torch.allclose(parameter.grad, theirs[fqn].grad * scale, atol=1e-6), fqn


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_that_runs_the_layer_again_computes_with_it(reentrant: bool) -> None:
    model, x = Checkpointed(reentrant), torch.randn(3, 4, requires_grad=True)
    other = halved(model, "layer.weight")
    other(x).sum().backward()
    with attached(model, "layer.weight"):
        model.train()(x).sum().backward()
        found = dict(model.named_parameters())["layer.weight"].grad
        assert torch.allclose(found, other.layer.weight.grad * 0.5)


def test_the_parameter_is_itself_after_evaluation_errors_and_the_end() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    weight = model[0].weight
    with attached(model, "0.weight") as session:
        model.eval()(torch.ones(1, 4))
        assert model[0].weight is weight
        with torch.no_grad():
            model.train()(torch.ones(1, 4))
        assert model[0].weight is weight
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.train()(torch.ones(1, 3))
        assert model[0].weight is weight
        model.train()(torch.ones(1, 4))
        assert model[0].weight is not weight  # until the step, for gradient checkpointing
        with Student.of(model).aside():
            assert torch.equal(model(torch.ones(1, 4)), nn.functional.linear(torch.ones(1, 4), weight, model[0].bias))
        assert session.callbacks[0].modes == [False, True, True, True]
    assert model[0].weight is weight
    assert "weight" not in vars(model[0])


def test_weights_in_pieces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.tensor

    monkeypatch.setattr(torch.distributed.tensor, "DTensor", nn.Parameter)  # as if every parameter were sharded
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(CallbackError, match="need whole weights, but this model is sharded"):
        StandIns().lay(model, {"0.weight": torch.ones(2, 4)})


GATES: dict[str, Any] = {
    "weights": lambda x: L0Pruning(strength=0.1, closed=0.3, settle=None),
    "sample": lambda x: InformationBottleneck(settle=None, example_inputs=(x,)),
    "step": lambda x: InformationBottleneck(noise="step", settle=None, example_inputs=(x,)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo itself looks at it
@pytest.mark.parametrize("name", GATES)
def test_a_compiled_student_trains_and_evaluates_with_its_gates(name: str) -> None:
    x, found = torch.randn(5, 4), []
    base = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for compiled in (False, True):
        model = copy.deepcopy(base)
        run = torch.compile(model, backend="eager") if compiled else model
        outputs: list[torch.Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(run, optimizer, [GATES[name](x)]):
            for _ in range(2):
                optimizer.zero_grad()
                outputs.append(run.train()(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
            outputs.append(run.eval()(x))
        found.append([output.detach() for output in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], base(x))
