"""Penalties on weights: once for an optimizer step, by the formula, with the learning rate of each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import (
    bare_net,
    collate,
    conv_net,
    images,
    make_trainer,
    ragged_tokens,
    relative_difference,
    tiny_bert,
    train_plain,
)
from torchopt_passes.callbacks import Callback, L1Penalty, L2Penalty, Orthogonality, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.recipe import load_recipe

DATA = ragged_tokens(8)
GRADIENT_FORMS: dict[str, Any] = {
    "l1": lambda: L1Penalty(strength=0.01, form="gradient"),
    "l2": lambda: L2Penalty(strength=0.1, form="gradient"),
    "soft": lambda: Orthogonality(strength=0.01),
    "srip": lambda: Orthogonality(strength=0.1, measure="srip"),
}


def slow_penalty(name: str, weights: list[torch.Tensor]) -> torch.Tensor:
    """The formula, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        rows = weight.flatten(1)
        if name == "l1":
            total = total + 0.01 * sum(row.abs().sum() for row in rows)
        elif name == "l2":
            total = total + 0.05 * sum((row * row).sum() for row in rows)
        else:
            short = rows if rows.shape[0] <= rows.shape[1] else rows.T
            gram = torch.stack([torch.stack([a @ b for b in short]) for a in short]) - torch.eye(len(short))
            v = torch.randn(len(short), generator=torch.Generator().manual_seed(0)).double()
            if name == "soft":
                total = total + 0.01 * (gram * gram).sum()
            else:
                for _ in range(2):
                    u = gram @ (v / v.norm())
                    v = gram @ u
                total = total + 0.1 * v.norm() / u.norm()
    return total


@pytest.mark.parametrize("name", GRADIENT_FORMS)
def test_a_step_has_the_gradient_of_loss_and_penalty(name: str) -> None:
    """SGD with rate 1: the weights move by the sum of the two gradients, whatever the loss is computed by."""
    model, x = conv_net().double(), torch.randn(4, 1, 6, 6, dtype=torch.float64)
    weights = [model.conv.weight, model.fc.weight]
    before = [weight.detach().clone() for weight in weights]
    loss = model(x, torch.arange(4) % 3).loss + slow_penalty(name, weights)
    expected = torch.autograd.grad(loss, weights)
    model = conv_net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with attach(model, optimizer, [GRADIENT_FORMS[name]()]) as session:
        model(x, torch.arange(4) % 3).loss.backward()
        found = session.metrics()
        optimizer.step()
    for weight, old, gradient in zip((model.conv.weight, model.fc.weight), before, expected, strict=True):
        assert torch.allclose(old - weight.detach(), gradient, atol=1e-10)
    key = {"l1": "l1_penalty", "l2": "l2_penalty"}.get(name, "orthogonality")
    assert found[key] == pytest.approx(float(slow_penalty(name, before)))


@pytest.mark.parametrize("name", [*GRADIENT_FORMS, "l1-proximal"])
@pytest.mark.parametrize("loop", ["trainer", "plain"])
def test_a_penalty_counts_once_for_a_step_of_many_micro_batches(name: str, loop: str, tmp_path: Path) -> None:
    """Labels are ragged, one micro-batch has none; SGD, so that the size of gradients matters."""
    make = GRADIENT_FORMS.get(name, lambda: L1Penalty(strength=0.01))

    def trained(accumulate: int) -> list[torch.Tensor]:
        model, callback = tiny_bert(), make()
        if loop == "trainer":
            options = {"optim": "sgd", "learning_rate": 0.5, "steps": 2, "accumulate": accumulate}
            make_trainer(model, DATA, tmp_path, [callback], **options).train()
            return [p.detach() for p in model.parameters()]
        train_plain(model, DATA, [callback], accumulate=accumulate, steps=1)
        return [p.detach() for p in model.parameters()]

    whole = trained(1)
    for accumulate in (4, 8):
        assert relative_difference(trained(accumulate), whole) < 1e-5


def test_it_works_where_the_loop_owns_the_loss() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with attach(model, optimizer, [L1Penalty(strength=0.25, form="gradient", include=("0",))]):
        (model(torch.ones(2, 4)).sum() * 0.0).backward()
        optimizer.step()
    assert torch.allclose(model[0].weight, before - 0.25 * before.sign())


def test_l1_proximal_takes_the_rate_of_each_weight_and_leaves_exact_zeros() -> None:
    model = bare_net()
    rates = {"conv.weight": 0.5, "fc.weight": 0.125}
    optimizer = torch.optim.SGD([{"params": [model.get_parameter(n)], "lr": rate} for n, rate in rates.items()])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    penalty = L1Penalty(strength=0.4)
    expected = {name: model.get_parameter(name).detach().clone() for name in rates}
    with attach(model, optimizer, [penalty]) as session:
        for step in range(3):
            optimizer.zero_grad()
            (sum(model.get_parameter(n).sum() for n in rates) * 0.0).backward()
            optimizer.step()
            scheduler.step()
            for name, rate in rates.items():
                w, t = expected[name], rate / (step + 1) * 0.4
                expected[name] = torch.tensor(
                    [[max(abs(v) - t, 0.0) * (1 if v > 0 else -1) for v in w.flatten().tolist()]]
                )
                expected[name] = expected[name].view(w.shape)
                assert torch.allclose(model.get_parameter(name), expected[name], atol=1e-7)
        zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in rates)
        assert session.metrics()["sparsity"] == zeros / 96
        assert 20 < zeros < 96
    assert [skip.target for skip in penalty.skips] == ["fc.bias"]


def test_l2_proximal_is_decoupled_weight_decay() -> None:
    model, decayed = conv_net(), conv_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = model.fc.weight.detach().clone()
    with attach(model, optimizer, [L2Penalty(strength=0.5, include=("fc",))]):
        model(**collate(images(4))).loss.backward()
        optimizer.step()
    other = torch.optim.AdamW(decayed.parameters(), lr=0.1, weight_decay=0.0)
    decayed(**collate(images(4))).loss.backward()
    other.step()
    assert torch.allclose(model.fc.weight, decayed.fc.weight / 1.05)
    assert torch.equal(model.conv.weight, decayed.conv.weight)
    assert not torch.equal(model.fc.weight, before)


def test_adam_with_l1_ends_sparse_where_the_gradient_form_does_not() -> None:
    found = {}
    for form in ("proximal", "gradient"):
        model = tiny_bert()
        penalty = L1Penalty(strength=1.0, form=form, skip=("classifier",))  # type: ignore[arg-type]
        train_plain(model, ragged_tokens(24), [penalty], steps=20)
        weights = [p for n, p in model.named_parameters() if "encoder" in n and p.ndim > 1]
        found[form] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert found["proximal"] > 0.5
    assert found["gradient"] < 0.01


def test_a_weight_without_a_learning_rate_is_named() -> None:
    model = bare_net()
    optimizer = torch.optim.SGD([model.fc.weight], lr=0.1)
    for penalty in (L1Penalty(), L2Penalty()):
        with attach(model, optimizer, [penalty]):
            model(**collate(images(4))).loss.backward()
            with pytest.raises(CallbackError, match=r"learning rate of conv.weight"):
                optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Penalty(strength=0.0), "strength must be > 0"),
        (lambda: L1Penalty(form="prox"), 'form must be "proximal" or "gradient"'),  # type: ignore[arg-type]
        (lambda: L2Penalty(form="l2"), 'form must be "proximal" or "gradient"'),  # type: ignore[arg-type]
        (lambda: Orthogonality(measure="hard"), 'measure must be "soft" or "srip"'),  # type: ignore[arg-type]
        (lambda: Orthogonality(steps=0), "at least 1 step"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_recipes_know_penalties_and_not_their_bases() -> None:
    entries = [
        {"l1_penalty": {"strength": 0.1, "form": "gradient"}},
        "orthogonality",
        {"group_lasso": {"strength": 1.0}},
    ]
    made = load_recipe({"version": 1, "callbacks": entries}).make_callbacks(example_inputs=collate(images(2)))
    assert [type(callback).__name__ for callback in made] == ["L1Penalty", "Orthogonality", "GroupLasso"]
    for base in ("penalty", "weight_penalty", "unit_callback", "gates", "gradual_masks"):
        with pytest.raises(ConfigError, match=f"no callback is named '{base}'"):
            load_recipe({"version": 1, "callbacks": [base]})


def test_logs_of_the_trainer_have_the_penalty(tmp_path: Path) -> None:
    model = tiny_bert()
    penalty = L1Penalty(strength=0.1)
    trainer = make_trainer(model, DATA, tmp_path, [penalty], logging_strategy="steps", logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1 and "embed" not in n]
    assert len(logs) == 3
    assert logs[-1]["l1_penalty"] == pytest.approx(0.1 * sum(float(w.detach().abs().sum()) for w in weights))
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert logs[-1]["sparsity"] == pytest.approx(zeros / sum(w.numel() for w in weights))


def test_half_precision_weights_are_summed_in_float32() -> None:
    model = nn.Linear(300, 300).bfloat16()
    nn.init.ones_(model.weight)
    penalty = L1Penalty(strength=1.0, form="gradient")
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [penalty]):
        assert penalty.metrics()["l1_penalty"] == 90000.0


def test_a_parameter_without_a_gradient_gets_that_of_the_penalty() -> None:
    """The loss does not reach it: the penalty alone moves it."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    before = model["unused"].weight.detach().clone()

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["used"](x).sum()

    net: Any = Forward()
    callbacks: list[Callback] = [L2Penalty(strength=0.5, form="gradient")]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with attach(net, optimizer, callbacks):
        net(torch.ones(1, 2)).backward()
        optimizer.step()
    assert torch.allclose(model["unused"].weight, before * 0.5)
