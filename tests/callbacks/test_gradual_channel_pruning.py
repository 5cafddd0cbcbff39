"""GradualChannelPruning: the exact schedule of units, what is masked and what is left alone, and every misuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.callbacks.channel_models import (
    GROUPS,
    Blocks,
    Normed,
    Shifted,
    Stubborn,
    Tied,
    batch,
    graph_of,
    make,
    optimizer_of,
    shapes,
    train,
)
from tests.callbacks.loops import captured_net, collate, images, make_trainer, tiny_bert, train_plain
from torchopt_passes.callbacks import GradualChannelPruning, GradualPruning, attach
from torchopt_passes.callbacks.unit_groups import count_bounds
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.importance import taylor_terms
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.graph.pruning import PruneChannels
from torchopt_passes.graph.pruning.choose import Candidate, choose_by_ratio
from torchopt_passes.graph.pruning.prune_channels import removal_of


def masked(model: nn.Module, pruning: GradualChannelPruning) -> dict[str, list[int]]:
    """The masked units of each group, by the buffers in the state_dict."""
    state, found = model.state_dict(), {}
    for group in pruning.groups:
        fqn, _, place = group.name.partition(":")
        found[group.name] = (~state[f"{fqn}_{place.replace(':', '_')}_mask"]).nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("form", ["graph", "module"])
def test_each_step_masks_exactly_the_units_of_the_formula(form: str) -> None:
    """r_t = r (1 - (1 - (t - t0) / (n dt))^3) with t0 = 2, dt = 3, n = 4; every slice of a masked unit is zero."""
    model = graph_of() if form == "graph" else make()
    start, every, count = 2, 3, 4
    pruning = GradualChannelPruning(
        ratio=0.7, start=start, end=start + every * count, every=every, overrides={"fc1*": 0.4}, example_inputs=batch()
    )
    seen: dict[int, dict[str, list[int]]] = {}

    def record(number: int) -> None:
        seen[number] = masked(model, pruning)
        weights = dict(model.named_parameters())
        for group in pruning.groups:
            for unit in seen[number][group.name]:
                for piece in group.slices[unit]:
                    if piece.fqn in weights:
                        cut = weights[piece.fqn].index_select(piece.dim, torch.tensor(piece.indices))
                        assert not cut.any(), (number, piece.fqn)

    train(model, [pruning], steps=18, seen=record)
    for number in range(1, 19):
        k = min((number - start) // every, count)
        way = 1 - (1 - k / count) ** 3 if number >= start else 0.0
        ratios = {"conv1.weight:0": 0.7, "conv2.weight:0": 0.7, "fc1.weight:0": 0.4}
        expected = {name: removed_count(ratios[name] * way, size) for name, size in GROUPS.items()}
        assert {name: len(units) for name, units in seen[number].items()} == expected, number
        assert number == 1 or all(set(seen[number - 1][name]) <= set(seen[number][name]) for name in GROUPS)
    assert {name: size - len(seen[18][name]) for name, size in GROUPS.items()} == {
        name: shapes(model)[name.removesuffix(":0")][0] for name in GROUPS
    }


@pytest.mark.parametrize("importance", ["l1", "lp:3", "bn_scale", "fpgm", "lamp", "random"])
@pytest.mark.parametrize("scope", ["group", "global"])
def test_all_at_once_is_prune_channels(importance: str, scope: Any) -> None:
    model, options = graph_of(), {"ratio": 0.5, "importance": importance, "scope": scope, "round_to": 2}
    expected = PruneChannels(**options).plan(model)
    pruning = GradualChannelPruning(**options, start=0, end=0)
    with attach(model, optimizer_of(model), [pruning]):
        assert pruning.metrics() == {"channel_ratio": sum(map(len, masked(model, pruning).values())) / 30}
    assert removal_of(pruning.plan) == removal_of(expected)
    fallen = {skip.target for skip in pruning.skips if "ranked by l2" in skip.reason}
    assert fallen == ({"fc1.weight:0"} if importance == "bn_scale" else set())


def test_in_small_steps_one_group_ends_where_one_step_does() -> None:
    """Weights that do not move keep their order, whatever is masked on the way."""
    model = captured_net()
    expected = PruneChannels(ratio=0.75).plan(model)
    pruning = GradualChannelPruning(ratio=0.75, start=0, end=6, every=1, schedule="linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, [pruning]):
        for _ in range(6):
            optimizer.step()
    assert removal_of(pruning.plan) == removal_of(expected)


def test_taylor_is_that_of_the_gradients_of_the_step() -> None:
    """mean over the axes of |sum_k w_k g_k| / mean, with biases left out."""
    model = graph_of(Tied)
    pruning = GradualChannelPruning(ratio=0.5, start=1, end=1, importance="taylor")
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.0), [pruning]) as session:
        nn.functional.cross_entropy(model(batch()), torch.arange(6) % 3).backward()
        scores = []
        for name, dim in (("a.weight", 0), ("out.weight", 1)):
            weight = model.get_parameter(name)
            terms = taylor_terms(weight.movedim(dim, 0), weight.grad.movedim(dim, 0)).abs()
            scores.append(terms / terms.mean())
        expected = torch.stack(scores).mean(0).argsort()[:4].sort().values.tolist()
        session.optimizer.step()  # type: ignore[union-attr]
        assert masked(model, pruning) == {"a.weight:0": expected}


def test_limits_of_every_group_hold() -> None:
    pruning = GradualChannelPruning(ratio=0.9, start=0, end=0, min_units=3, round_to=4, skip=("fc1.bias",))
    model = graph_of()
    with attach(model, optimizer_of(model), [pruning]):
        pass
    assert (shapes(model)["conv1.weight"][0], shapes(model)["conv2.weight"][0]) == (4, 4)
    assert shapes(model)["fc1.weight"] == (10, 4)
    reasons = {skip.target: skip.reason for skip in pruning.plan.skips}
    assert reasons["fc1.weight:0"] == "skip pattern 'fc1.bias'"


def test_bounds_hold_whatever_the_scores_are() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        candidates = [
            Candidate(
                name=str(number),
                scores=random.random(int(random.integers(2, 12))),
                ratio=0.5 if random.random() < 0.2 else None,
                min_units=int(random.integers(1, 4)),
                round_to=int(random.integers(1, 5)),
                shape=(),
            )
            for number in range(int(random.integers(1, 5)))
        ]
        ratio = float(random.random())
        for scope in ("group", "global"):
            least, most = count_bounds(candidates, ratio, scope)
            found = sum(int(mask.sum()) for mask in choose_by_ratio(candidates, ratio, scope).values())
            assert least <= found <= most
            assert scope == "global" or least == most


def test_a_schedule_that_comes_back_keeps_what_is_masked() -> None:
    model, seen = graph_of(), list[float]()
    pruning = GradualChannelPruning(
        ratio=0.5, start=0, end=4, every=1, schedule=lambda p: [0.0, 1.0, 0.2, 0.5, 1.0][round(4 * p)]
    )
    train(model, [pruning], seen=lambda number: seen.append(pruning.metrics()["channel_ratio"]))
    assert seen == [0.5] * 8


def test_groups_under_a_norm_are_left_alone_with_the_reason() -> None:
    model = make(Normed)
    pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs=batch())
    train(model, [pruning])
    assert shapes(model)["a.weight"] == (8, 2)
    assert shapes(model)["b.weight"] == (3, 8)
    reason = {skip.target: skip.reason for skip in pruning.plan.skips}["a.weight:0"]
    assert "layer_norm (aten.layer_norm.default) at " in reason
    assert "channel_models.py" in reason
    assert "overrides={name: ratio}" in reason


def test_whole_blocks_of_a_group_norm_are_no_part_of_its_statistics() -> None:
    model, kinds = graph_of(Blocks), list[str]()
    pruning = GradualChannelPruning(start=1, end=2, every=1)
    train(model, [pruning], seen=lambda number: kinds.extend(group.kind for group in pruning.groups))
    assert set(kinds) == {"blocks"}
    assert shapes(model)["conv.weight"][0] == 4


def test_tied_weights_lose_their_unit_once() -> None:
    model = make(Tied)
    train(model, [GradualChannelPruning(start=1, end=2, every=1, example_inputs=batch())])
    assert model.a.weight is model.b.weight
    assert shapes(model) == {"a.weight": (4, 2), "out.weight": (3, 4), "out.bias": (3,)}


def test_frozen_weights_are_left_alone() -> None:
    model = make()
    model.branch.weight.requires_grad_(False)
    pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs=batch())
    train(model, [pruning])
    assert shapes(model)["conv1.weight"][0] == 8
    reasons = {skip.target: skip.reason for skip in pruning.skips}
    assert reasons["conv1.weight:0"] == "branch.weight is frozen: requires_grad is False"


def test_what_cannot_be_removed_is_known_before_training() -> None:
    model = make(Stubborn)
    keys = list(model.state_dict())
    pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs=batch())
    with pytest.raises(CallbackError, match=r"channel_models.py:\d+ .*view.*Way out: train the captured graph"):
        train(model, [pruning])
    shifted = graph_of(Shifted)
    with pytest.raises(CallbackError, match="computes something else than with them"):
        train(shifted, [GradualChannelPruning(start=1, end=2, every=1)])
    assert (list(model.state_dict()), shapes(shifted)["a.weight"]) == (keys, (8, 2))
    graph = graph_of(Stubborn)
    train(graph, [pruning])
    assert shapes(graph)["a.weight"] == (4, 2)


def test_a_run_that_ends_early_removes_what_is_masked_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = graph_of()
    with caplog.at_level(logging.WARNING, logger="torchopt_passes"):
        train(model, [GradualChannelPruning(start=1, end=7, every=2, schedule="linear")], stop=5)
    assert "GradualChannelPruning ends with 10 of 15 units removed" in caplog.text
    assert shapes(model)["conv2.weight"][0] == 12 - 4


def test_an_error_removes_nothing() -> None:
    model = graph_of()
    before, keys = shapes(model), list(model.state_dict())
    pruning = GradualChannelPruning(start=0, end=0)
    with pytest.raises(ZeroDivisionError), attach(model, optimizer_of(model), [pruning]):
        raise ZeroDivisionError
    assert (shapes(model), list(model.state_dict())) == (before, keys)
    assert not pruning.plan
    session = attach(model, optimizer_of(model), [pruning])
    pruning.close()
    session.close()
    assert shapes(model) == before


@pytest.mark.parametrize("scope", ["group", "global"])
def test_going_on_without_the_masks_is_refused(scope: Any) -> None:
    options = {"ratio": 0.5, "start": 1, "end": 3, "every": 1, "scope": scope}
    saved = train_plain(captured_net(), images(16), [GradualChannelPruning(**options)], stop=3)
    bare = {n: torch.ones_like(t) if n.endswith("_mask") else t for n, t in saved["model"].items()}
    for wrong in ({"session": {"step": 1}}, {"model": bare}):
        with pytest.raises(CallbackError, match=r"masks should remove .* units, but remove"):
            train_plain(captured_net(), images(16), [GradualChannelPruning(**options)], resume=saved | wrong)
    with pytest.raises(CallbackError, match="resume with the options"):
        train_plain(captured_net(), images(16), [GradualChannelPruning(**options | {"ratio": 0.8})], resume=saved)


def test_checkpoints_hold_the_masks_and_the_trainer_logs(tmp_path: Path) -> None:
    model = captured_net()
    pruning = GradualChannelPruning(ratio=0.5, start=1, end=4, every=1)
    options = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    trainer = make_trainer(model, images(16), tmp_path, [pruning], **options)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    mask = saved["conv.weight_0_mask"]
    assert (mask.dtype, int((~mask).sum())) == (torch.bool, 4)
    assert not saved["conv.weight"][~mask].any()
    assert not saved["fc.weight"][:, ~mask].any()
    logged = [entry["channel_ratio"] for entry in trainer.state.log_history if "channel_ratio" in entry]
    assert logged == [removed_count(0.5 * (1 - (1 - min(k, 3) / 3) ** 3), 8) / 8 for k in range(6)]
    trainer.save_model(str(tmp_path / "final"))
    assert load_file(tmp_path / "final" / "model.safetensors")["conv.weight"].shape[0] == 4
    trainer.evaluate(images(4))


def test_the_best_checkpoint_is_the_one_that_shrinks(tmp_path: Path) -> None:
    model = captured_net()
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(
        model,
        images(16),
        tmp_path,
        [GradualChannelPruning(ratio=0.5, start=0, end=5, every=1)],
        trainer_kwargs={"eval_dataset": images(8)},
        **options,
        **best,
    )
    trainer.train()
    state = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    kept = state["conv.weight_0_mask"]
    assert torch.equal(model.get_parameter("conv.weight"), state["conv.weight"][kept])


def test_two_callbacks_cannot_manage_one_weight() -> None:
    model = graph_of()
    both = [GradualChannelPruning(start=0, end=0), GradualPruning(sparsity=0.5, start=0, end=0)]
    with pytest.raises(CallbackError, match="is managed by two callbacks"):
        attach(model, optimizer_of(model), both)
    assert not [name for name in model.state_dict() if name.endswith("_mask")]
    channels = GradualChannelPruning(ratio=0.0, start=0, end=0, overrides={"fc1*": 0.5}, skip=("conv1", "conv2"))
    with attach(
        model, optimizer_of(model), [channels, GradualPruning(sparsity=0.5, include=("conv1",), end=0, start=0)]
    ):
        pass
    assert shapes(model)["fc1.weight"] == (5, 12)
    assert int((model.get_parameter("conv1.weight") == 0).sum()) == 72


def test_the_name_of_a_mask_in_use_is_refused() -> None:
    model = make()
    model.fc1.register_buffer("weight_0_mask", torch.ones(3))
    with pytest.raises(CallbackError, match=r"fc1\.weight has a weight_0_mask beside it already"):
        attach(model, optimizer_of(model), [GradualChannelPruning(start=0, end=0, example_inputs=batch())])
    assert "fc1.weight_0_mask" in model.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "the ratio of 'ratio' must be in"),
        ({"overrides": {"fc": 1.5}}, "the ratio of 'fc' must be in"),
        ({"ratio": 0.0, "overrides": {"fc": 0.0}}, "nothing would be pruned"),
        ({"scope": "isomorphic"}, "scope must be"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"start": 1.5}, "start must be a share"),
        ({"schedule": "cubik"}, "no schedule named"),
        ({"importance": "l0"}, "there is no importance 'l0'"),
        ({"importance": "wanda"}, "looks at activations .* PruneChannels takes it"),
        ({"importance": "fisher"}, "single samples.*'taylor' takes them"),
    ],
)
def test_wrong_options_are_refused_when_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradualChannelPruning(**options)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (make, {}, ConfigError, "groups of a Deep, give example_inputs="),
        (graph_of, {"overrides": {"fc9": 0.5}}, ConfigError, r"overrides \['fc9'\] match no group"),
        (graph_of, {"skip": ("fc9",)}, ConfigError, "skip pattern 'fc9' matches no parameter"),
        (graph_of, {"kinds": ("heads",)}, ConfigError, "channels are not in kinds"),
        (graph_of, {"ratio": 0.01}, ConfigError, "leave no unit to remove"),
        (graph_of, {"importance": "taylor", "start": 0}, CallbackError, "give start=1"),
        (graph_of, {"end": 99}, CallbackError, "last update is at step 99"),
    ],
)
def test_what_does_not_fit_the_model_or_the_run(build: Any, options: Any, error: type, message: str) -> None:
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        attach(model, optimizer_of(model), [GradualChannelPruning(**options)], total_steps=9)
    assert list(model.state_dict()) == keys


def test_heads_need_their_own_kind() -> None:
    model, inputs = tiny_bert(), {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    pruning = GradualChannelPruning(start=0, end=0, kinds=("heads",), example_inputs=inputs)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [pruning]):
        assert {group.kind for group in pruning.groups} == {"heads"}
    assert model.bert.encoder.layer[0].attention.self.query.weight.shape == (8, 16)
    assert model(**collate([{"input_ids": torch.arange(8)}])).logits.shape == (1, 8, 3)
