"""A plan on the user's own module: tensors, gradients and optimizer state are cut, and training goes on as masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.graph.pruning.source_plans import masked, plan_of, remove, resize
from torchopt_passes.graph.verify import relative_error


class ConvNet(nn.Module):
    """Conv, batch norm, depthwise conv, grouped conv, group norm, PReLU, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3)
        self.fc = nn.Linear(6, 5)
        with torch.no_grad():
            self.bn.running_mean.normal_()  # pyright: ignore
            self.bn.weight.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(torch.relu(self.bn(self.conv(x)))))
        x = torch.relu(self.grouped(torch.relu(self.pointwise(x))))
        return self.fc(x.mean((2, 3)))


def conv_plan() -> top.Plan:
    gone, group, units = (1, 4, 5), (4, 5, 6, 7), (2, 3)
    norm = [remove(f"bn.{n}", 0, gone, 8) for n in ("weight", "bias", "running_mean", "running_var")]
    return plan_of(
        remove("conv.weight", 0, gone, 8),
        remove("conv.bias", 0, gone, 8),
        *norm,
        remove("depthwise.weight", 0, gone, 8),
        remove("depthwise.bias", 0, gone, 8),
        remove("act.weight", 0, gone, 8),
        remove("pointwise.weight", 1, gone, 8),
        remove("pointwise.weight", 0, group, 12),
        remove("pointwise.bias", 0, group, 12),
        remove("grouped.weight", 0, units, 6),
        remove("grouped.bias", 0, units, 6),
        remove("fc.weight", 1, units, 6),
    )


def masked_conv_net(model: nn.Module) -> nn.Module:
    """Zero what reads the removed channels: the input channels of `pointwise`, the columns of `fc`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter("pointwise.weight")[:, [1, 4, 5]] = 0
        model.get_parameter("fc.weight")[:, [2, 3]] = 0
    return model


@pytest.mark.parametrize("training", [False, True])
def test_conv_net_equals_the_masked_one(training: bool) -> None:
    model = ConvNet().double().train(training)
    reference = masked_conv_net(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert conv_plan().apply(model) is model
    assert relative_error(model(x), reference(x)) < 1e-9
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert (model.conv.out_channels, model.bn.num_features, model.act.num_parameters) == (5, 5, 5)
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (5, 5, 5)
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (2, 8, 4)
    assert (model.pointwise.in_channels, model.pointwise.out_channels, model.fc.in_features) == (5, 8, 4)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


MLP_PLAN = plan_of(
    remove("0.weight", 0, (1, 4), 6),
    remove("0.bias", 0, (1, 4), 6),
    remove("2.weight", 1, (1, 4), 6),
    remove("2.weight", 0, (0,), 5),
    remove("2.bias", 0, (0,), 5),
    remove("4.weight", 1, (0,), 5),
)
KEPT: dict[str, Any] = {
    "0.weight": ([0, 2, 3, 5],),
    "0.bias": ([0, 2, 3, 5],),
    "2.weight": ([1, 2, 3, 4], [0, 2, 3, 5]),
    "2.bias": ([1, 2, 3, 4],),
    "4.weight": ([0, 1, 2], [1, 2, 3, 4]),
    "4.bias": ([0, 1, 2],),
}


def kept(name: str, tensor: torch.Tensor) -> torch.Tensor:
    for dim, indices in enumerate(KEPT[name]):
        tensor = tensor.index_select(dim, torch.tensor(indices))
    return tensor


def zero_outside(name: str, tensor: torch.Tensor) -> None:
    for dim, indices in enumerate(KEPT[name]):
        gone = [i for i in range(tensor.shape[dim]) if i not in indices]
        tensor.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    torch.manual_seed(3)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_the_masked_model_would(name: str) -> None:
    model = mlp().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        loss = train_step(model, optimizer)
    reference, gradients = copy.deepcopy(model), {n: p.grad for n, p in model.named_parameters()}
    other = OPTIMIZERS[name](reference.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for fqn, parameter in reference.named_parameters():
            zero_outside(fqn, parameter)
            for value in other.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    zero_outside(fqn, value)
    MLP_PLAN.apply(model, optimizer=optimizer)
    for fqn, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, kept(fqn, gradients[fqn]))
    for _ in range(3):  # the old `loss`, and the graph behind it, are alive during the first of these
        loss = train_step(model, optimizer)
        assert torch.allclose(loss, train_step(reference, other), rtol=1e-9)
    for fqn, parameter in model.named_parameters():
        assert relative_error(parameter, kept(fqn, reference.get_parameter(fqn))) < 1e-9, fqn


def test_prune_train_prune() -> None:
    model = mlp().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer)
    MLP_PLAN.apply(model, optimizer)
    train_step(model, optimizer)
    second = plan_of(remove("0.weight", 0, (3,), 4), remove("0.bias", 0, (3,), 4), remove("2.weight", 1, (3,), 4))
    reference = masked(model, second, "2.weight")
    second.apply(model, optimizer)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert relative_error(model(x), reference(x)) < 1e-9
    train_step(model, optimizer)
    assert model[0].out_features == 3 and model[2].in_features == 3


@pytest.mark.parametrize("size", [6, 4])
def test_adafactor_row_and_column_vectors(size: int) -> None:
    """Both libraries' Adafactor keep a vector for rows and one for columns; a square matrix tells them by name."""
    from transformers.optimization import Adafactor

    for make in (torch.optim.Adafactor, Adafactor):
        model = nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, 3)).double()
        optimizer: Any = make(model.parameters())
        train_step(model, optimizer)
        before = {k: v.clone() for k, v in optimizer.state[model[0].weight].items() if isinstance(v, torch.Tensor)}
        gone = (1, 2)
        plan_of(
            remove("0.weight", 0, gone, size), remove("0.bias", 0, gone, size), remove("2.weight", 1, gone, size)
        ).apply(model, optimizer)
        state, left = optimizer.state[model[0].weight], [i for i in range(size) if i not in gone]
        row, column = ("row_var", "col_var") if "row_var" in state else ("exp_avg_sq_row", "exp_avg_sq_col")
        assert torch.equal(state[row], before[row][left]) and torch.equal(state[column], before[column])
        train_step(model, optimizer)


def test_an_optimizer_that_cannot_be_cut_is_refused_and_nothing_changes() -> None:
    model = mlp().double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, history_size=3)
    x = torch.randn(7, 4, dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = dict(optimizer.state[model[0].weight])
    with pytest.raises(top.PlanError, match=r"LBFGS keeps .* make a new optimizer"):
        MLP_PLAN.apply(model, optimizer)
    assert all(torch.equal(before[name], p) and p.grad is gradients[name] for name, p in model.named_parameters())
    assert dict(optimizer.state[model[0].weight]).keys() == state.keys() and model[0].out_features == 6
    optimizer.step(closure)


def test_another_models_optimizer_is_refused() -> None:
    model = mlp().double()
    optimizer = OPTIMIZERS["sgd"](mlp().parameters())
    with pytest.raises(top.PlanError, match="holds none of the parameters"):
        MLP_PLAN.apply(model, optimizer)
    assert model[0].weight.shape == (6, 4)


def test_tied_weights_stay_tied_and_both_layers_are_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6, padding_idx=2)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    model, ids = Tied().double(), torch.arange(11)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.embed.weight[:, [0, 5]] = 0
    plan_of(remove("embed.weight", 1, (0, 5), 6)).apply(model)
    assert model.head.weight is model.embed.weight and model.head.in_features == model.embed.embedding_dim == 4
    assert relative_error(model(ids), reference(ids)) < 1e-9


def test_masks_beside_weights_are_cut_with_them() -> None:
    model = mlp()
    mask = torch.rand(6, 4) < 0.5
    model[0].register_buffer("weight_mask", mask.clone())
    MLP_PLAN.apply(model)
    assert torch.equal(model[0].get_buffer("weight_mask"), mask[[0, 2, 3, 5]])


def test_a_failed_plan_puts_everything_back() -> None:
    model = mlp().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    state = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    with pytest.raises(top.PlanError, match="num_heads"):
        (MLP_PLAN + plan_of(resize("0.num_heads", 4, 2))).apply(model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(optimizer.state[p][k] is v for name, p in model.named_parameters() for k, v in state[name].items())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert model[0].out_features == 6
    train_step(model, optimizer)
    MLP_PLAN.apply(model, optimizer)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ((remove("0.weight", 0, (1,), 9),), "made for 9"),
        ((remove("0.weight", 2, (1,), 6),), "in dimension 2"),
        ((remove("9.weight", 0, (1,), 6),), "no parameter or buffer"),
        ((remove("0.weight", 0, (1,), 6), remove("0.weight", 0, (2,), 6)), "two edits cut dimension 0"),
        ((remove("0.weight", 0, (1,), 6), remove("0.bias", 0, (1,), 7)), r"shape \(6,\), the plan was made for \(7,\)"),
    ],
)
def test_a_plan_of_another_model_is_refused(edits: tuple[Any, ...], says: str) -> None:
    model = mlp()
    with pytest.raises(top.PlanError, match=says):
        plan_of(*edits).apply(model)
    assert model[0].weight.shape == (6, 4)


def test_a_plan_is_not_applied_twice() -> None:
    model = mlp()
    MLP_PLAN.apply(model)
    with pytest.raises(top.PlanError, match="applied already"):
        MLP_PLAN.apply(model)
    assert top.Plan.from_json(MLP_PLAN.to_json()) == MLP_PLAN


def test_tensors_that_were_cut_before_have_their_layers_told() -> None:
    """`release` puts the smaller tensors of a graph into the source; the plan then sets the sizes."""
    model, other = mlp().double(), mlp().double()
    MLP_PLAN.apply(other)
    for name, parameter in other.named_parameters():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, parameter)
    MLP_PLAN.apply(model)
    assert [model[i].out_features for i in (0, 2, 4)] == [4, 4, 3]
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_of_a_captured_graph_goes_on_with_its_new_parameters(name: str) -> None:
    model, x = mlp().double(), torch.randn(7, 4, dtype=torch.float64)
    graph_module, reference = top.capture(model, (x,)), copy.deepcopy(model)
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (graph_module, reference))
    train_step(graph_module, optimizer)
    train_step(reference, other)
    MLP_PLAN.apply(graph_module, optimizer)
    MLP_PLAN.apply(reference, other)
    for _ in range(2):
        train_step(graph_module, optimizer)
        train_step(reference, other)
    for fqn, parameter in reference.named_parameters():
        assert relative_error(graph_module.get_parameter(fqn), parameter) < 1e-12
    assert model[0].weight.shape == (6, 4), "the source keeps its own parameters"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in graph_module.parameters()} and len(optimizer.state) == 6


def test_a_failed_plan_gives_a_graphs_optimizer_its_parameters_back() -> None:
    x = torch.randn(7, 4, dtype=torch.float64)
    graph_module = top.capture(mlp().double(), (x,))
    optimizer = OPTIMIZERS["adamw"](graph_module.parameters())
    train_step(graph_module, optimizer)
    before = [p.shape for p in graph_module.parameters()]
    bad = top.MaskWeights(target="0.weight", reason="", mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(top.PlanError, match="its mask"):
        (MLP_PLAN + plan_of(bad)).apply(graph_module, optimizer)
    assert [p.shape for p in graph_module.parameters()] == before
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in graph_module.parameters()} == {id(p) for p in optimizer.state}
    train_step(graph_module, optimizer)
