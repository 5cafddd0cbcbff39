"""GroupLasso and GroupVariance: norms of units by loops, the proximal step, and units that leave."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.channel_models import (
    GROUPS,
    Normed,
    Shifted,
    Tied,
    batch,
    graph_of,
    make,
    optimizer_of,
    shapes,
    train,
)
from torchopt_passes.callbacks import GradualPruning, GroupLasso, GroupVariance, attach
from torchopt_passes.callbacks.unit_blocks import UnitBlocks
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.graph.channels import ChannelGroup
from torchopt_passes.graph.pruning.prune_channels import removal_of


def slow_blocks(model: nn.Module, group: ChannelGroup) -> list[list[float]]:
    """All weights of each unit: each entry of a parameter once, if any of its indices belongs to the unit."""
    found: list[list[float]] = []
    for pieces in group.slices:
        entries: list[float] = []
        for fqn in dict.fromkeys(piece.fqn for piece in pieces):
            parameter = dict(model.named_parameters()).get(fqn)
            if parameter is None:
                continue  # running statistics
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            for piece in pieces:
                if piece.fqn == fqn:
                    mask.index_fill_(piece.dim, torch.tensor(piece.indices), value=True)
            entries += parameter.detach()[mask].tolist()
        found.append(entries)
    return found


@pytest.mark.parametrize("kind", [None, Tied])
def test_the_block_of_a_unit_is_all_that_makes_scales_and_reads_it(kind: type[nn.Module] | None) -> None:
    model = make(kind) if kind is not None else make()
    lasso = GroupLasso(example_inputs=batch())
    with attach(model, optimizer_of(model), [lasso]):
        assert len(lasso.groups) == (3 if kind is None else 1)
        for unit_group in lasso._units:
            blocks, slow = UnitBlocks(unit_group), slow_blocks(model, unit_group.group)
            assert blocks.sizes(model).tolist() == [len(entries) for entries in slow]
            expected = [math.sqrt(sum(v * v for v in entries)) for entries in slow]
            assert torch.allclose(blocks.norms(model), torch.tensor(expected, dtype=torch.float64))
        total = sum(
            math.sqrt(len(entries)) * math.sqrt(sum(v * v for v in entries))
            for group in lasso.groups
            for entries in slow_blocks(model, group)
        )
        assert lasso.metrics() == {"group_lasso": pytest.approx(1e-4 * total), "channel_ratio": 0.0}


def test_the_proximal_step_shrinks_each_block_by_its_norm() -> None:
    """One group alone: the step is the exact one. Rates differ; that of the group is its largest."""
    model = make()
    lasso = GroupLasso(strength=0.2, skip=("conv1", "fc1"), example_inputs=batch())
    rates = {"conv2": 0.3, "bn3": 0.1}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.startswith(prefix)], "lr": rate}
        for prefix, rate in rates.items()
    ]
    rest = [p for n, p in model.named_parameters() if not n.startswith(tuple(rates))]
    optimizer = torch.optim.SGD([*groups, {"params": rest, "lr": 0.0}])
    with pytest.raises(ConfigError, match="no channel group"):
        GroupLasso(skip=("conv*", "fc1"), example_inputs=batch()).install(_student(model))
    lasso = GroupLasso(strength=0.2, skip=("branch", "fc2"), example_inputs=batch())
    with attach(model, optimizer, [lasso]):
        (group,) = lasso.groups
        assert group.name == "conv2.weight:0"
        before = slow_blocks(model, group)
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        optimizer.step()
        after = slow_blocks(model, group)
        for old, new in zip(before, after, strict=True):
            norm = math.sqrt(sum(v * v for v in old))
            factor = max(1 - 0.3 * 0.2 * math.sqrt(len(old)) / norm, 0.0)
            assert new == pytest.approx([factor * v for v in old])
            assert 0.0 < factor < 1.0


def _student(model: nn.Module) -> Any:
    from torchopt_passes.callbacks.student import Student

    return Student.of(model)


def test_the_gradient_form_is_that_of_the_norms() -> None:
    model = make()
    lasso = GroupLasso(strength=0.05, form="gradient", example_inputs=batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with attach(model, optimizer, [lasso]):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = {name: torch.zeros_like(p) for name, p in before.items()}
        for group in lasso.groups:
            for pieces, entries in zip(group.slices, slow_blocks(model, group), strict=True):
                scale = 0.05 * math.sqrt(len(entries)) / math.sqrt(sum(v * v for v in entries))
                for fqn in {piece.fqn for piece in pieces} & before.keys():
                    mask = torch.zeros_like(before[fqn], dtype=torch.bool)
                    for piece in pieces:
                        if piece.fqn == fqn:
                            mask.index_fill_(piece.dim, torch.tensor(piece.indices), value=True)
                    expected[fqn] += scale * before[fqn] * mask
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.allclose(before[name] - p.detach(), expected[name], atol=1e-10), name


@pytest.mark.parametrize("form", ["graph", "module"])
def test_units_that_became_zero_leave_and_nothing_changes(form: str) -> None:
    model = graph_of() if form == "graph" else make()
    lasso = GroupLasso(strength=0.5, example_inputs=batch())
    outputs: list[torch.Tensor] = []
    ratios: list[float] = []

    def look(number: int) -> None:
        ratios.append(lasso.metrics()["channel_ratio"])
        if number == 12:
            outputs.append(model.eval()(batch()).detach())
            model.train()

    optimizer = train(model, [lasso], steps=12, seen=look)
    sizes = {name: shapes(model)[name.removesuffix(":0")][0] for name in GROUPS}
    left = sum(GROUPS.values()) - sum(sizes.values())
    assert 0 < left < 30
    assert ratios[-1] == left / 30
    assert torch.allclose(model.eval()(batch()), outputs[0], atol=1e-10)
    assert {e.reason for e in lasso.plan.edits if hasattr(e, "dim")} <= {
        f"zero by group lasso ({name})" for name in GROUPS
    }
    other = make()
    lasso.plan.apply(other)
    assert shapes(other) == shapes(model)
    optimizer.step()  # it is that of the smaller model


def test_the_gradient_form_removes_nothing() -> None:
    model = make()
    lasso = GroupLasso(strength=0.5, form="gradient", example_inputs=batch())
    train(model, [lasso], steps=12)
    assert shapes(model) == shapes(make())
    assert not lasso.plan


def test_a_group_that_is_zero_as_a_whole_keeps_a_unit(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.WARNING, logger="torchopt_passes"):
        train(model, [GroupLasso(strength=100.0, example_inputs=batch())], steps=2)
    assert "GroupLasso: no unit of fc1.weight:0 is left; the first 1 stay" in caplog.text
    assert shapes(model)["fc1.weight"] == (1, 1)


def test_what_cannot_leave_is_known() -> None:
    lasso = GroupLasso(strength=0.5, example_inputs=batch())
    train(make(Normed), [lasso], steps=1)
    assert "layer_norm" in {skip.target: skip.reason for skip in lasso.skips}["a.weight:0"]
    with pytest.raises(CallbackError, match="computes something else than with them"):
        train(graph_of(Shifted), [GroupLasso(strength=100.0)], steps=1)
    model = make()
    with pytest.raises(CallbackError, match="managed by two callbacks, GradualPruning and GroupLasso"):
        attach(model, optimizer_of(model), [GradualPruning(sparsity=0.5), GroupLasso(example_inputs=batch())])
    with pytest.raises(ConfigError, match="give example_inputs="):
        train(make(), [GroupLasso()])


def test_an_error_removes_nothing() -> None:
    model, before = make(), shapes(make())
    lasso = GroupLasso(strength=100.0, example_inputs=batch())
    optimizer = optimizer_of(model)
    session = attach(model, optimizer, [lasso])
    nn.functional.cross_entropy(model(batch()), torch.arange(6) % 3).backward()
    optimizer.step()
    with pytest.raises(ZeroDivisionError), session:
        raise ZeroDivisionError
    assert shapes(model) == before
    assert not lasso.plan


def test_group_variance_is_the_formula_and_spreads_the_norms() -> None:
    model = make()
    callback = GroupVariance(strength=0.3, example_inputs=batch())

    def variances() -> list[float]:
        found = []
        for group in callback.groups:
            norms = [math.sqrt(sum(v * v for v in entries)) for entries in slow_blocks(model, group)]
            mean = sum(norms) / len(norms)
            found.append(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
        return found

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with attach(model, optimizer, [callback]) as session:
        before = variances()
        expected = 0.3 * sum(1 / (v + 1e-8) for v in before)
        assert session.metrics()["group_variance"] == pytest.approx(expected)
        for _ in range(5):
            optimizer.zero_grad()
            (sum(p.sum() for p in model.parameters()) * 0.0).backward()
            optimizer.step()
        assert all(new > old for new, old in zip(variances(), before, strict=True))
    assert shapes(model) == shapes(make())


def test_lasso_and_removal_fit_the_plan_of_prune_channels() -> None:
    """The plan names what was zero, and nothing else."""
    model = graph_of()
    lasso = GroupLasso(strength=0.5)
    zero: dict[str, list[int]] = {}

    def look(number: int) -> None:
        for unit_group, norms in zip(lasso._units, lasso._norms(), strict=True):
            zero[unit_group.group.name] = (norms == 0).nonzero().flatten().tolist()

    train(model, [lasso], steps=12, seen=look)
    removed = removal_of(lasso.plan)
    for name, units in zero.items():
        assert list(removed.get((name.removesuffix(":0"), 0), ())) == units
