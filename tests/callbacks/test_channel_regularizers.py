"""BatchNormSlimming, GrowingRegularization and DropFilter: their formulas, and what goes at the end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.channel_models import GROUPS, Tied, batch, graph_of, make, optimizer_of, shapes, step, train
from tests.callbacks.loops import bare_net, collate, images
from torchopt_passes.callbacks import BatchNormSlimming, DropFilter, GrowingRegularization, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.draws import seed_of, uniform
from torchopt_passes.graph.pruning.prune_channels import removal_of

UNITS = {"example_inputs": batch()}
GAMMAS = ("bn1.weight", "bn2.weight", "bn3.weight")


@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_slimming_shrinks_scales_by_the_formula(form: Any) -> None:
    model = make()
    with torch.no_grad():
        for number, name in enumerate(GAMMAS):
            gamma = model.get_parameter(name)
            gamma.copy_(torch.linspace(-0.3, 0.4, len(gamma)) + 0.01 * number)
    before = {name: model.get_parameter(name).detach().clone() for name in GAMMAS}
    slimming = BatchNormSlimming(strength=0.5, form=form, **UNITS)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.2), [slimming]) as session:
        total = sum(float(gamma.abs().sum()) for gamma in before.values())
        assert session.metrics() == {"batch_norm_slimming": pytest.approx(0.5 * total), "zero_scales": 0.0}
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        session.optimizer.step()  # type: ignore[union-attr]
        for name, old in before.items():
            moved = old.sign() * (old.abs() - 0.1).clamp(min=0) if form == "proximal" else old - 0.1 * old.sign()
            assert torch.allclose(model.get_parameter(name), moved), name
        zeros = sum(int((old.abs() <= 0.1).sum()) for old in before.values())
        assert session.metrics()["zero_scales"] == (zeros / 28 if form == "proximal" else 0.0)
    assert {skip.target: skip.reason for skip in slimming.skips}["fc1.weight:0"] == "no batch norm scales its units"


def test_slimming_plans_by_one_threshold_over_all_groups() -> None:
    model = make()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6]))
        model.bn2.weight.fill_(0.05)
        model.bn2.weight[0] = 5.0  # the unit stays: its other norm scales it
        model.bn3.weight.copy_(torch.linspace(1.0, 0.45, 12))
    slimming = BatchNormSlimming(strength=1e-9, ratio=0.4, **UNITS)
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.0), [slimming])
    session.close()
    # the 8 smallest of 20: 0.2, 0.3, 0.4 and, of the first group, 0.6; the others of bn3
    scales = [max(a, b) for a, b in zip(model.bn1.weight.tolist(), model.bn2.weight.tolist(), strict=True)]
    ranked = sorted(
        [(s, "conv1.weight", i) for i, s in enumerate(scales)]
        + [(s, "conv2.weight", i) for i, s in enumerate(model.bn3.weight.tolist())]
    )[:8]
    assert slimming.threshold == pytest.approx(ranked[-1][0])
    removed = removal_of(slimming.plan)
    for name in ("conv1.weight", "conv2.weight"):
        assert sorted(removed.get((name, 0), ())) == sorted(i for _, owner, i in ranked if owner == name)
    assert shapes(model) == shapes(make())  # planned, not removed
    slimming.plan.apply(model)
    assert shapes(model)["conv2.weight"][0] == 12 - sum(owner == "conv2.weight" for _, owner, _ in ranked)
    model(batch())


def test_slimming_needs_batch_norms_and_sound_options() -> None:
    model = make(Tied)
    with pytest.raises(ConfigError, match="no channel group of Tied has a batch norm"):
        attach(model, optimizer_of(model), [BatchNormSlimming(**UNITS)])
    for options, message in (({"ratio": 1.0}, "ratio"), ({"min_units": 0}, "min_units"), ({"form": "l1"}, "form")):
        with pytest.raises(ConfigError, match=message):
            BatchNormSlimming(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["graph", "module"])
def test_chosen_units_get_a_growing_penalty_and_are_zero_at_the_end(form: str) -> None:
    """lambda_k = ceiling k / n after update k; SGD with rate r moves a chosen weight by -r (g + lambda w)."""
    model = graph_of() if form == "graph" else make()
    growing = GrowingRegularization(ratio=0.5, start=2, end=6, every=2, ceiling=0.8, **UNITS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen: dict[str, list[int]] = {}
    with attach(model, optimizer, [growing], total_steps=8):
        for number in range(1, 9):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            factor = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.4, 5: 0.4}.get(number - 1)
            optimizer.zero_grad()
            (sum(p.sum() for p in model.parameters()) * 0.0).backward()
            optimizer.step()
            masks = {g.group.name: (~g.mask).nonzero().flatten().tolist() for g in growing._groups}
            assert {n: len(u) for n, u in masks.items()} == {n: s // 2 if number >= 2 else 0 for n, s in GROUPS.items()}
            assert number < 3 or masks == chosen
            chosen = masks
            gone = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.items()}
            for group in growing.groups:
                for unit in masks[group.name]:
                    for piece in group.slices[unit]:
                        if piece.fqn in gone:
                            gone[piece.fqn].index_fill_(piece.dim, torch.tensor(piece.indices), value=True)
            for name, p in model.named_parameters():
                if number >= 6:
                    assert not p.detach()[gone[name]].any(), (number, name)
                elif factor is not None:
                    assert torch.allclose(p.detach(), before[name] * (1 - 0.1 * factor * gone[name])), (number, name)
    assert {name: shapes(model)[name.removesuffix(":0")][0] for name in GROUPS} == {
        n: s // 2 for n, s in GROUPS.items()
    }
    assert "lowest l1 while training" in growing.plan.edits[0].reason


def test_growing_that_ends_early_removes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.WARNING, logger="torchopt_passes"):
        train(model, [GrowingRegularization(start=1, end=7, every=1, **UNITS)], stop=5)
    assert "GrowingRegularization ends before its units are zero: nothing is removed" in caplog.text
    assert shapes(model) == shapes(make())
    with pytest.raises(ConfigError, match="ceiling must be > 0"):
        GrowingRegularization(ceiling=0.0)


def test_dropped_filters_are_those_of_the_draw_and_the_others_are_scaled() -> None:
    model, data = bare_net(), collate(images(6))
    kept = uniform((8,), seed_of(7, 0, "conv.weight")) >= 0.4
    assert 0 < int(kept.sum()) < 8
    scale = kept.float() / 0.6
    weight = model.conv.weight.detach().clone().requires_grad_()
    hidden = nn.functional.conv2d(data["pixel_values"], weight * scale.view(-1, 1, 1, 1), padding=1).relu().mean((2, 3))
    loss = nn.functional.cross_entropy(model.fc(hidden), data["labels"])
    (expected,) = torch.autograd.grad(loss, weight)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.0), [DropFilter(rate=0.4, seed=7, skip=("fc",))]) as s:
        assert s.metrics() == {"dropped_filters": 1 - int(kept.sum()) / 8}
        for _ in range(2):  # the same in every micro-batch of the step
            output = model.train()(**data)
            assert torch.allclose(output.loss, loss)
        output.loss.backward()
        assert torch.allclose(dict(model.named_parameters())["conv.weight"].grad, expected, atol=1e-7)
        s.optimizer.step()  # type: ignore[union-attr]
        again = uniform((8,), seed_of(7, 1, "conv.weight")) >= 0.4
        assert s.metrics()["dropped_filters"] == 1 - int(again.sum()) / 8
        assert not torch.equal(kept, again)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_filter_that_is_left_out_has_no_bias_either(form: str) -> None:
    model = graph_of() if form == "graph" else make()
    drop = DropFilter(rate=0.5, seed=1, include=("fc1",))
    seen: list[torch.Tensor] = []
    with attach(model, optimizer_of(model), [drop]):
        found = drop.stand_ins(training=True)
        seen = [found["fc1.weight"], found["fc1.bias"]]
        assert drop.stand_ins(training=False) == {}
    gone = seen[0].abs().sum(1) == 0
    assert 0 < int(gone.sum()) < 10
    assert torch.equal(seen[1] == 0, gone)


def test_the_window_and_the_options_of_dropping() -> None:
    model = make()
    drop = DropFilter(rate=0.5, start=1, end=3, include=("conv2",))
    active: list[bool] = []
    with attach(model, optimizer_of(model), [drop], total_steps=5) as session:
        for number in range(5):
            active.append(bool(drop.stand_ins(training=True)))
            step(model, session.optimizer, number)  # type: ignore[arg-type]
    assert active == [False, True, True, False, False]
    for options in ({"rate": 0.0}, {"rate": 1.0}, {"start": -1}, {"end": 2.0}):
        with pytest.raises(ConfigError):
            DropFilter(**options)  # type: ignore[arg-type]
    with pytest.raises(CallbackError, match="managed by two callbacks"):
        attach(model, optimizer_of(model), [DropFilter(), DropFilter()])
