"""L0Pruning and L0ChannelPruning: the formulas inside a forward, the Lagrangian, and what closed leaves exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.channel_models import GROUPS, Shifted, batch, graph_of, make, optimizer_of, shapes, step, train
from tests.callbacks.loops import bare_net, collate, images, tiny_bert
from torchopt_passes.callbacks import InformationBottleneck, L0ChannelPruning, L0Pruning, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.draws import seed_of, uniform
from torchopt_passes.functional.hard_concrete import gate_at_test, log_alpha_of, sample_gate
from torchopt_passes.graph.axes import analyse_axes
from torchopt_passes.graph.grouping import group_axes
from torchopt_passes.graph.pruning.choose import CostModel

UNITS = {"example_inputs": batch()}


def slow_gates(shape: Any, name: str, number: int, log_alpha: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return sample_gate(log_alpha, uniform(shape, seed_of(seed, number, name)))


def test_a_training_forward_and_its_gradients_are_those_of_gated_weights() -> None:
    model, data = bare_net(), collate(images(8))
    names = ["conv.weight", "fc.weight"]
    weights = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    alphas = [torch.full(w.shape, log_alpha_of(0.3)).requires_grad_() for w in weights]
    gates = [slow_gates(w.shape, n, 0, a, seed=5) for n, w, a in zip(names, weights, alphas, strict=True)]
    hidden = nn.functional.conv2d(data["pixel_values"], weights[0] * gates[0], padding=1).relu().mean((2, 3))
    logits = nn.functional.linear(hidden, weights[1] * gates[1], model.fc.bias)
    loss = nn.functional.cross_entropy(logits, data["labels"])
    expected = torch.autograd.grad(loss, [*weights, *alphas])
    with attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [L0Pruning(strength=0.1, closed=0.3, seed=5, settle=None)]
    ):
        output = model.train()(**data)
        output.loss.backward()
        assert torch.allclose(output.loss, loss)
        found = [p.grad for n, p in model.named_parameters() if n in names or "log_alpha" in n]
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_each_gate_belongs_to_the_weight_of_its_name() -> None:
    """Names that do not sort in the order of the model, and shapes that are all alike."""
    model = nn.Sequential()
    for name in ("z", "a", "m"):
        model.add_module(name, nn.Linear(3, 3, bias=False))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [L0Pruning(strength=0.1, settle=None)]):
        with torch.no_grad():
            model.torchopt_l0_weights.log_alpha["z-weight"].fill_(-9.0)
        assert not model.eval()(torch.ones(1, 3)).any()
    assert not model.z.weight.any()
    assert torch.equal(model.a.weight, weights["a.weight"])
    assert torch.equal(model.m.weight, weights["m.weight"])


def test_the_penalty_is_strength_times_the_expected_number_of_open_gates() -> None:
    model = bare_net()
    pruning = L0Pruning(strength=0.25, closed=0.3, lr=1.0, settle=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with attach(model, optimizer, [pruning]) as session:
        alpha = dict(model.named_parameters())["torchopt_l0_weights.log_alpha.fc-weight"]
        p = float(torch.sigmoid(alpha.detach()[0, 0] - (2 / 3) * torch.log(torch.tensor(0.1 / 1.1))))
        assert session.metrics()["l0_penalty"] == pytest.approx(0.25 * 96 * p)
        assert session.metrics()["expected_sparsity"] == pytest.approx(1 - p, abs=1e-6)
        before = alpha.detach().clone()
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        optimizer.step()
        # by the gates' own rate, without weight decay
        assert torch.allclose(alpha.detach(), before - 1.0 * 0.25 * p * (1 - p))


def test_one_draw_for_each_step_the_same_in_every_micro_batch() -> None:
    model, data = bare_net(), collate(images(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, [L0Pruning(strength=0.1, closed=0.5, lr=1e-9, settle=None)]):
        state = torch.get_rng_state()
        losses = [float(model.train()(**data).loss.detach()) for _ in range(2)]
        model(**data).loss.backward()
        optimizer.step()
        losses.append(float(model(**data).loss.detach()))
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_and_the_end_have_the_gates_without_noise() -> None:
    model, data = bare_net(), collate(images(8))
    pruning = L0Pruning(strength=0.01, lr=0.5, settle=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with attach(model, optimizer, [pruning]) as session:
        for _ in range(15):
            optimizer.zero_grad()
            model.train()(**data).loss.backward()
            optimizer.step()
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        evaluated = model.eval()(**data).logits.detach()
        sparsity = session.metrics()["sparsity"]
    assert 0.1 < sparsity < 1.0
    for fqn in pruning.fqns or ("conv.weight", "fc.weight"):
        gate = gate_at_test(weights[f"torchopt_l0_weights.log_alpha.{fqn.replace('.', '-')}"])
        assert torch.equal(model.get_parameter(fqn), weights[fqn] * gate)
    assert torch.equal(model(**data).logits, evaluated)
    zeros = sum(int((model.get_parameter(f) == 0).sum()) for f in ("conv.weight", "fc.weight"))
    assert zeros / 96 == pytest.approx(sparsity)
    other = bare_net()
    pruning.plan.apply(other)
    assert all(torch.equal(other.get_parameter(e.target) == 0, ~e.mask) for e in pruning.plan.edits)  # type: ignore[attr-defined]


def test_the_lagrangian_is_the_formula() -> None:
    model = bare_net()
    pruning = L0Pruning(sparsity=0.8, start=0, end=4, ascent=0.5, closed=0.3, lr=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one, two = 0.0, 10.0
    with attach(model, optimizer, [pruning], total_steps=10) as session:
        for number in range(6):
            target = 0.8 * min(number / 4, 1.0)
            found = session.metrics()
            short = target - found["expected_sparsity"]
            assert found["target_sparsity"] == pytest.approx(target)
            assert found["l0_penalty"] == pytest.approx(one * short + two * short**2, abs=1e-6)
            optimizer.zero_grad()
            (sum(p.sum() for p in model.parameters()) * 0.0).backward()
            optimizer.step()
            short = target - float(pruning.expected_sparsity().detach())
            one, two = one + 0.5 * short, two + 0.5 * short**2
        assert model.torchopt_l0_weights.multipliers.tolist() == pytest.approx([one, two])


@pytest.mark.parametrize("kind", ["weights", "channels", "bottleneck"])
def test_held_gates_do_not_move_and_train_what_evaluation_computes(kind: str) -> None:
    """Adam has momentum by then, and the gates stay bit for bit; batch norms aside, both modes compute the same."""
    model = make()
    for part in (model.bn1, model.bn2, model.bn3):
        part.register_forward_pre_hook(lambda module, args: module.eval() and None)
    callback: Any = {
        "weights": lambda: L0Pruning(sparsity=0.5, end=2, settle=4, lr=0.3),
        "channels": lambda: L0ChannelPruning(sparsity=0.3, end=2, settle=4, lr=0.3, **UNITS),
        "bottleneck": lambda: InformationBottleneck(strength=0.1, settle=4, lr=0.3, **UNITS),
    }[kind]()
    gates: list[dict[str, torch.Tensor]] = []
    weights: list[torch.Tensor] = []
    same: list[bool] = []

    def look(number: int) -> None:
        state = {n: t.detach().clone() for n, t in model.state_dict().items() if n.startswith("torchopt")}
        gates.append(state)
        weights.append(model.fc2.weight.detach().clone())
        with torch.no_grad():
            train_mode, eval_mode = model.train()(batch()), model.eval()(batch())
        model.train()
        same.append(torch.equal(train_mode, eval_mode))
        assert callback.settled == (number >= 4)

    train(model, [callback], steps=7, seen=look)
    assert all(torch.equal(gates[3][name], later[name]) for later in gates[4:] for name in gates[3])
    assert not all(torch.equal(gates[2][name], gates[3][name]) for name in gates[3])
    assert not torch.equal(weights[4], weights[5])  # the rest trains on
    assert same == [False] * 3 + [True] * 4


def test_held_gates_wait_for_the_target() -> None:
    with pytest.raises(CallbackError, match="held from step 3 on, before the target is reached"):
        train(make(), [L0Pruning(sparsity=0.5, end=5, settle=3)])
    model = make()
    with pytest.raises(CallbackError, match=r"0.8 is a share of training, but its length is unknown"):
        attach(model, optimizer_of(model), [L0Pruning(strength=0.1)])


def test_the_lagrangian_reaches_the_sparsity() -> None:
    """Random labels: nothing to learn but the target."""
    model = make()
    pruning = L0Pruning(sparsity=0.7, end=0.4)
    seen: list[dict[str, float]] = []
    train(model, [pruning], steps=400, seen=lambda number: seen.append(pruning.metrics()) if number > 300 else None)
    assert max(abs(entry["expected_sparsity"] - 0.7) for entry in seen) < 0.03
    zeros = sum(int((~e.mask).sum()) for e in pruning.plan.edits)  # type: ignore[attr-defined]
    total = sum(e.mask.numel() for e in pruning.plan.edits)  # type: ignore[attr-defined]
    assert 0.7 <= zeros / total + 1e-9 < 0.85


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("of", ["units", "params", "macs"])
def test_closed_units_leave_and_the_model_is_what_the_last_evaluation_computed(form: str, of: Any) -> None:
    model = graph_of() if form == "graph" else make()
    full = shapes(model)
    pruning = L0ChannelPruning(sparsity=0.4, of=of, end=0.5, lr=0.2, **UNITS)
    outputs: list[torch.Tensor] = []

    def look(number: int) -> None:
        if number == 10:
            outputs.append(model.eval()(batch(5, seed=99)).detach())
            outputs.append(torch.tensor(pruning.metrics()["channel_ratio"]))
            model.train()

    optimizer = train(model, [pruning], steps=10, seen=look)
    assert torch.allclose(model.eval()(batch(5, seed=99)), outputs[0], rtol=1e-9, atol=1e-12)
    assert not any(name.startswith("torchopt") for name in model.state_dict())
    sizes = {name: shapes(model)[name.removesuffix(":0")][0] for name in GROUPS}
    assert 1 - sum(sizes.values()) / 30 == pytest.approx(float(outputs[1]))
    if of == "units":
        assert sum(sizes.values()) <= 18
    else:
        costs = [CostModel(group_axes(analyse_axes(graph)), of).full for graph in (graph_of(), _graph(model))]
        assert costs[1] <= 0.6 * costs[0]
    assert shapes(model) != full
    other = graph_of() if form == "graph" else make()
    pruning.plan.apply(other)
    assert shapes(other) == shapes(model)
    step(model.train(), optimizer, 11)  # it trains the smaller model on


def _graph(model: nn.Module) -> Any:
    from torchopt_passes.graph.capture import capture

    return model if hasattr(model, "graph") else capture(model, (batch(),))


def test_the_expected_cost_is_the_cost_of_units_that_stay_for_sure_and_multilinear_between() -> None:
    graph = graph_of()
    grouping = group_axes(analyse_axes(graph, free_outputs=()))
    for what in ("macs", "params"):
        cost = CostModel(grouping, what)  # type: ignore[arg-type]
        masks = {name: torch.arange(size) % 3 == 1 for name, size in GROUPS.items()}
        certain = {name: (~mask).float() for name, mask in masks.items()}
        assert float(cost.expected(certain)) == cost.cost({name: mask.numpy() for name, mask in masks.items()})
        assert float(cost.expected({})) == cost.full
        half = {"fc1.weight:0": torch.full((10,), 0.5, requires_grad=True)}
        value = cost.expected(half)
        gone = cost.cost({"fc1.weight:0": torch.arange(10).lt(5).numpy()})
        assert float(value.detach()) == gone
        value.backward()
        assert torch.allclose(half["fc1.weight:0"].grad, torch.full((10,), (cost.full - gone) / 5))  # type: ignore[arg-type]


def test_the_group_penalty_counts_the_weights_that_read_each_unit() -> None:
    pruning = L0ChannelPruning(strength=0.5, closed=0.3, settle=None, **UNITS)
    model = make()
    with attach(model, optimizer_of(model), [pruning]) as session:
        p = 1 - session.metrics()["expected_sparsity"]
        read = 8 * (8 * 9 + 12 * 9) + 12 * 10 + 10 * 3  # the branch and conv2 read conv1's; fc1; fc2
        assert session.metrics()["l0_penalty"] == pytest.approx(0.5 * p * read, rel=1e-5)


def test_heads_and_hidden_units_of_a_transformer_are_gated() -> None:
    from tests.callbacks.loops import ragged_tokens

    pruning = L0ChannelPruning(strength=0.1, settle=None, example_inputs=collate(ragged_tokens(4)))
    model = tiny_bert()
    with attach(model, torch.optim.AdamW(model.parameters()), [pruning]):
        kinds = sorted((group.kind, group.size) for group in pruning.groups)
        assert kinds == [("channels", 32), ("heads", 2)]
        read = {fqn for unit_group in pruning._units for fqn in unit_group.claims}
        assert read == {
            "bert.encoder.layer.0.attention.output.dense.weight",
            "bert.encoder.layer.0.output.dense.weight",
        }
        assert any("norm" in skip.reason for skip in pruning.skips)


def test_what_cannot_work_is_known_before_training() -> None:
    with pytest.raises(ConfigError, match=r"no channel group can be gated: .*there is no weight to gate them at"):
        train(graph_of(Shifted), [L0ChannelPruning(strength=0.1)])
    with pytest.raises(ConfigError, match="params cannot be brought to"):
        train(make(), [L0ChannelPruning(sparsity=0.99, **UNITS)])
    with pytest.raises(CallbackError, match="the target is reached at step 9, but training ends at 8"):
        train(make(), [L0Pruning(sparsity=0.5, end=9)])
    model = make()
    with pytest.raises(CallbackError, match="managed by two callbacks, L0Pruning and L0ChannelPruning"):
        attach(model, optimizer_of(model), [L0Pruning(strength=0.1), L0ChannelPruning(strength=0.1, **UNITS)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes exactly one of strength= and sparsity="),
        ({"strength": 0.1, "sparsity": 0.5}, "takes exactly one of strength= and sparsity="),
        ({"strength": 0.0}, "strength must be > 0"),
        ({"sparsity": 1.0}, r"sparsity must be in \(0, 1\)"),
        ({"sparsity": 0.5, "ascent": 0.0}, "ascent must be > 0"),
        ({"sparsity": 0.5, "end": 1.5}, "end must be a share"),
        ({"strength": 0.1, "beta": 0.0}, "beta"),
        ({"strength": 0.1, "closed": 1.0}, "initial rate"),
        ({"strength": 0.1, "lr": 0.0}, "lr must be > 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    for kind in (L0Pruning, L0ChannelPruning):
        with pytest.raises(ConfigError, match=message):
            kind(**options)
