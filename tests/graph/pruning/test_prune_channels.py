"""PruneChannels: its choices against counts by hand, refusals, rounds, and removals that are not closed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchopt_passes as top
from tests.models import build
from torchopt_passes.graph.axes import analyse_axes
from torchopt_passes.graph.grouping import group_axes
from torchopt_passes.graph.pruning.choose import CostModel
from torchopt_passes.graph.pruning.prune_channels import removal_of
from torchopt_passes.graph.surgery import remove_indices


class Net(nn.Module):
    """Two hidden layers of 8 and 12, whose units are ordered by their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        with torch.no_grad():
            for layer, scale in ((self.a, 1.0), (self.b, 10.0)):
                layer.weight.copy_(scale * torch.arange(1.0, layer.out_features + 1)[:, None].expand_as(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


X = (torch.linspace(-1, 1, 20).reshape(5, 4),)


def captured(model: nn.Module | None = None) -> top.CapturedModule:
    return top.capture(model or Net(), X, prove=False)


def sizes(graph: nn.Module) -> tuple[int, int]:
    return graph.get_parameter("a.weight").shape[0], graph.get_parameter("b.weight").shape[0]


def mine(group: object, graph_module: object) -> torch.Tensor:
    return torch.arange(float(group.size))  # the first units are the least important


def test_the_lowest_of_each_group_leave() -> None:
    graph = captured()
    weights = {n: p.detach().clone() for n, p in graph.named_parameters()}
    result = top.PruneChannels(ratio=0.5, importance="mine")(graph, top.PassContext(criteria={"mine": mine}))
    removal = removal_of(result.plan)
    assert removal["a.weight", 0] == removal["a.bias", 0] == removal["b.weight", 1] == (0, 1, 2, 3)
    assert removal["b.weight", 0] == removal["c.weight", 1] == (0, 1, 2, 3, 4, 5)
    assert torch.equal(graph.get_parameter("b.weight"), weights["b.weight"][6:, 4:])
    x = X[0]
    hidden = torch.relu(x @ weights["a.weight"][4:].T + weights["a.bias"][4:])
    hidden = torch.relu(hidden @ weights["b.weight"][6:, 4:].T + weights["b.bias"][6:])
    torch.testing.assert_close(graph(x), hidden @ weights["c.weight"][:, 6:].T + weights["c.bias"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.25}, (6, 9)),
        ({"ratio": 0.5, "round_to": 4}, (4, 8)),
        ({"ratio": 0.9, "min_units": 3}, (3, 3)),
        ({"ratio": 0.5, "overrides": {"a": 0.0}}, (8, 6)),
        ({"ratio": 0.0, "overrides": {"b.weight:0": 0.25}}, (8, 9)),
        ({"ratio": 0.5, "steps": 3}, (4, 6)),
        ({"keep": {"a.weight:0": (0, 7)}}, (2, 12)),
    ],
)
def test_how_many_stay(options: dict[str, object], expected: tuple[int, int]) -> None:
    graph = captured()
    top.PruneChannels(importance="mine", **options)(graph, top.PassContext(criteria={"mine": mine}))
    assert sizes(graph) == expected


def test_global_scope_ranks_all_units_together() -> None:
    def scores(group: top.ChannelGroup, _: object) -> torch.Tensor:
        return torch.arange(float(group.size)) + (100.0 if group.name.startswith("b") else 0.0)

    graph = captured()
    top.PruneChannels(ratio=0.3, importance="s", scope="global")(graph, top.PassContext(criteria={"s": scores}))
    assert sizes(graph) == (2, 12)  # six of twenty, all of them from `a`


@pytest.mark.parametrize("scope", ["group", "global", "isomorphic"])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_is_met_and_nothing_that_left_would_fit(what: str, scope: str) -> None:
    graph = captured()
    grouping = group_axes(analyse_axes(graph, ()))
    model = CostModel(grouping, what)  # pyright: ignore[reportArgumentType]
    for share in (0.35, 0.5, 0.8):
        pass_ = top.PruneChannels(**{what: share}, scope=scope)
        removal = removal_of(pass_.plan(graph))
        left = {
            "a.weight:0": 8 - len(removal.get(("a.weight", 0), ())),
            "b.weight:0": 12 - len(removal.get(("b.weight", 0), ())),
        }

        def cost(a: int, b: int) -> int:
            return 5 * (4 * a + a * b + b * 3) if what == "macs" else 4 * a + a + a * b + b + 3 * b + 3

        assert model.full == cost(8, 12)
        budget = int(share * model.full)
        assert cost(left["a.weight:0"], left["b.weight:0"]) <= budget
        for name, most in (("a.weight:0", 8), ("b.weight:0", 12)):
            more = left | {name: left[name] + 1}
            assert left[name] == most or cost(more["a.weight:0"], more["b.weight:0"]) > budget


def test_the_cost_of_a_choice_is_what_the_pruned_graph_costs() -> None:
    for name in ("conv_residual", "attention"):
        source, inputs = build(name)
        graph = top.capture(source, inputs, prove=False)
        grouping = group_axes(analyse_axes(graph, ()))
        chosen = {n: torch.arange(len(atoms)).numpy() % 2 == 0 for n, atoms in grouping.atoms.items()}
        macs, params = CostModel(grouping, "macs"), CostModel(grouping, "params")
        before = top.measure(graph)
        assert (macs.full, params.full) == (before.macs * 2, before.parameters)
        keep = {n: tuple(i for i, gone in enumerate(mask) if not gone) for n, mask in chosen.items()}
        top.PruneChannels(keep=keep)(graph)
        after = top.measure(graph)
        assert (macs.cost(chosen), params.cost(chosen)) == (after.macs * 2, after.parameters)


def test_a_budget_out_of_reach_names_the_least() -> None:
    least = 5 * (4 + 1 + 3)
    with pytest.raises(top.ConfigError, match=f"the least that can be reached is {least}"):
        top.PruneChannels(macs=least - 1).plan(captured())
    graph = captured()
    top.PruneChannels(macs=least)(graph)
    assert sizes(graph) == (1, 1)
    assert not top.PruneChannels(macs=least)(graph).modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "overrides": {"d.*": 0.1}}, r"match no group; the groups are \['a.weight:0'"),
        ({"ratio": 0.5, "importance": "magic"}, "there is no importance 'magic'"),
        ({"keep": {"d": (1,)}}, "there is no group 'd'"),
        ({"keep": {"a.weight:1": (1,)}}, "cannot lose units: meets an axis that keeps its size, in linear"),
        ({"keep": {"a.weight:0": ()}}, "one must stay"),
        ({"keep": {"a.weight:0": (8,)}}, "are 0..7"),
        ({"ratio": 0.5, "free_outputs": ("logits",)}, "matches no output: they are"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(top.ConfigError, match=message):
        top.PruneChannels(**options).plan(captured())


def test_locked_skipped_and_secondary_groups_are_reported() -> None:
    source, inputs = build("attention")
    result = top.PruneChannels(ratio=0.5)(top.capture(source, inputs), top.PassContext(skip=("up",)))
    reasons = {skip.target: skip.reason for skip in result.plan.skips}
    assert reasons["up.weight:0"] == "skip pattern 'up'"
    assert reasons["qkv.weight:0:head_dim"] == "qkv.weight:0:heads is removed instead"
    assert (
        "meets an axis that keeps its size, in add" in reasons["out.weight:0"]
        and "models.py" in reasons["out.weight:0"]
    )


def test_an_output_that_may_get_narrower_does() -> None:
    graph = captured()
    names = [g.name for g in top.find_channel_groups(graph, ["output"]) if not g.locked]
    assert names == ["a.weight:0", "b.weight:0", "c.weight:0"]
    full = copy.deepcopy(graph)
    result = top.PruneChannels(keep={"c.weight:0": (0, 2)}, free_outputs=("output",))(graph)
    assert result.report.proof.status == "proven"
    torch.testing.assert_close(graph(*X), full(*X)[:, [0, 2]])


def test_rounds_measure_anew() -> None:
    """Once its readers are gone a unit is worth less: what leaves in rounds is not what leaves at once."""
    calls: list[int] = []

    def scores(group: top.ChannelGroup, graph: nn.Module) -> torch.Tensor:
        calls.append(group.size)
        return graph.get_parameter(group.axes[0].fqn).detach().abs().sum(1)

    graph = captured()
    plan = top.PruneChannels(ratio=0.5, steps=4, importance="s").plan(graph, top.PassContext(criteria={"s": scores}))
    assert calls == [8, 12, 7, 10, 6, 9, 5, 7] and sizes(graph) == (8, 12)
    assert removal_of(plan)["a.weight", 0] == (0, 1, 2, 3)
    assert removal_of(plan)["b.weight", 0] == (0, 1, 2, 3, 4, 5)


def test_three_times_in_a_row_with_training_in_between() -> None:
    graph = captured()
    optimizer = torch.optim.AdamW(graph.parameters(), lr=1e-2)
    for expected in ((6, 9), (4, 7), (3, 5)):
        graph(*X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        plan = top.PruneChannels(ratio=0.25).plan(graph)
        plan.apply(graph, optimizer=optimizer)
        assert sizes(graph) == expected
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in graph.parameters()}
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in graph.parameters())


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({("a.weight", 0): (1,), ("a.bias", 0): (1,)}, "index 1 of dimension 1 of 'b.weight' belongs to it and stays"),
        ({("c.weight", 0): (0,)}, "belongs to it and stays"),
        ({("a.weight", 1): (0,)}, "meets an axis that keeps its size"),
        ({("z.weight", 1): (0,)}, "does not compute with dimension 1 of 'z.weight'"),
    ],
)
def test_a_removal_that_is_not_closed_is_refused(removal: dict, message: str) -> None:
    graph = captured()
    with pytest.raises(top.PlanError, match=message):
        remove_indices(graph, removal)
    assert sizes(graph) == (8, 12)


def test_a_wrong_rule_is_caught_rolled_back_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchopt_passes.graph import axis_rules

    class Reversed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)).flip(1))))

    graph = captured(Reversed())
    before = {n: p.detach().clone() for n, p in graph.named_parameters()}
    monkeypatch.setitem(axis_rules._RULES, "flip", axis_rules._RULES["clone"])  # as if nothing moved
    with pytest.raises(top.ProofError, match=r"rolled back.*|first node that differs: .*linear"):
        top.PruneChannels(keep={"a.weight:0": (0, 1, 2)})(graph)
    assert all(torch.equal(p, before[n]) for n, p in graph.named_parameters())


def test_verify_removal_on_its_own() -> None:
    graph = captured()
    before = copy.deepcopy(graph)
    removal = removal_of(top.PruneChannels(ratio=0.5)(graph).plan)
    assert top.verify_removal(before, graph, removal) <= 1e-9
    with torch.no_grad():
        graph.get_parameter("b.weight")[0, 0] += 1.0
    with pytest.raises(top.ProofError, match="first node that differs: linear_1"):
        top.verify_removal(before, graph, removal, (torch.ones(2, 4),))


def test_the_pytest_helper_passes_and_fails() -> None:
    result = top.assert_removal_is_exact(Net(), X)
    assert sizes(result.graph_module) == (4, 6)
    with pytest.raises(AssertionError, match="nothing can be removed from ReLU"):
        top.assert_removal_is_exact(nn.ReLU(), (torch.ones(2, 3),))
