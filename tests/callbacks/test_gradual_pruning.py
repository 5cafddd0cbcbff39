"""GradualPruning: the exact schedule, masks that last, and every misuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertForTokenClassification, Trainer

from tests.callbacks.loops import (
    captured_net,
    conv_net,
    images,
    make_trainer,
    quantized_net,
    ragged_tokens,
    same_state,
    tiny_bert,
    train_plain,
)
from torchopt_passes.callbacks import GradualPruning, KeepZeros, attach
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.masks import removed_count, sparsity_of
from torchopt_passes.functional.patterns import n_m_mask
from torchopt_passes.graph.plan import Plan


def managed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n}


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def test_each_step_has_exactly_the_sparsity_of_the_formula() -> None:
    """s_t = s_f + (s_i - s_f)(1 - (t - t0) / (n dt))^3 with t0 = 2, dt = 3, n = 4; Adam moves weights in between."""
    model, seen = tiny_bert(), dict[int, list[int]]()
    initial, final, start, every, count = 0.1, 0.7, 2, 3, 4

    def record(step: int, model: nn.Module) -> None:
        seen[step] = [zeros(weight) for weight in managed(model).values()]

    pruning = GradualPruning(
        sparsity=final, initial_sparsity=initial, start=start, end=start + every * count, every=every
    )
    train_plain(model, ragged_tokens(16), [pruning], steps=18, seen=record)
    sizes = [weight.numel() for weight in managed(model).values()]
    for step in range(1, 19):
        k = min((step - start) // every, count)
        share = final + (initial - final) * (1 - k / count) ** 3 if step >= start else 0.0
        assert seen[step] == [removed_count(share, size) for size in sizes], f"step {step}"
    assert [zeros(weight) for weight in managed(model).values()] == [removed_count(0.7, size) for size in sizes]


def test_the_smallest_weights_go_and_stay_gone() -> None:
    model = conv_net()
    before = model.fc.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    pruning = GradualPruning(sparsity=0.5, start=0, end=0, include=("fc",))
    with attach(model, optimizer, [pruning], total_steps=5):
        order = before.abs().flatten().argsort()
        gone = model.fc.weight.detach().flatten() == 0
        assert torch.equal(gone.nonzero().flatten(), order[:12].sort().values)  # of 24
        for _ in range(3):
            (model.fc.weight.sum() * 7).backward()  # momentum pushes the removed ones too
            optimizer.step()
            assert torch.equal(model.fc.weight.detach().flatten() == 0, gone)
        assert float((model.fc.weight - before).abs().max().detach()) > 0.1


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_trainer_ends_with_the_sparsity_and_clean_names(scope: Any, tmp_path: Path) -> None:
    model = tiny_bert()
    names = list(model.state_dict())
    pruning = GradualPruning(sparsity=0.8, scope=scope, start=0.1, end=0.7)
    trainer = make_trainer(
        model, ragged_tokens(16), tmp_path, [pruning], steps=10, logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    weights = managed(model).values()
    total = sum(weight.numel() for weight in weights)
    assert sparsity_of(weights) == pytest.approx(0.8, abs=1 / 32)
    if scope == "global":
        assert sum(map(zeros, weights)) == removed_count(0.8, total)
        assert len({zeros(weight) / weight.numel() for weight in weights}) > 1
    assert list(model.state_dict()) == names
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == sorted(logged)
    assert logged[-1] == sparsity_of(weights)
    trainer.save_model(str(tmp_path / "final"))
    loaded, info = BertForTokenClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert same_state(loaded, model)


def test_checkpoints_hold_the_masks_beside_unrenamed_weights(tmp_path: Path) -> None:
    model = tiny_bert()
    pruning = GradualPruning(sparsity=0.5, start=1, end=2, every=1)
    make_trainer(model, ragged_tokens(16), tmp_path, [pruning], steps=4, save_strategy="steps", save_steps=3).train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    masks = {name: tensor for name, tensor in saved.items() if name.endswith("_mask")}
    assert set(masks) == {f"{name}_mask" for name in managed(model)}
    for name, mask in masks.items():
        weight = saved[name.removesuffix("_mask")]
        assert mask.dtype is torch.bool
        assert torch.equal(weight == 0, ~mask)


def test_two_of_four_is_reached_gradually_and_exactly() -> None:
    model, shares = tiny_bert(), list[float]()
    pruning = GradualPruning(pattern="2:4", start=1, end=5, every=1, include=("*attention*",))
    train_plain(
        model,
        ragged_tokens(16),
        [pruning],
        seen=lambda step, m: shares.append(sparsity_of([m.bert.encoder.layer[0].attention.self.query.weight])),
    )
    assert shares[0] == 0.0
    assert 0.2 < shares[1] < 0.4
    assert shares[4] == shares[5] == 0.5
    for name, weight in managed(model).items():
        if "attention" in name:
            assert torch.equal(weight != 0, n_m_mask(weight, 2, 4, dim=1))


@pytest.mark.parametrize("scale", [0.01, 1000.0])
def test_the_kept_of_a_pattern_are_never_removed_on_the_way(scale: float) -> None:
    model = nn.Linear(32, 8)
    with torch.no_grad():
        model.weight.mul_(scale)
    kept = n_m_mask(model.weight, 1, 4, dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, [GradualPruning(pattern="1:4", start=1, end=8, every=1)]):
        for _ in range(8):
            optimizer.step()
            assert bool((model.weight != 0)[kept].all())
    assert torch.equal(model.weight != 0, kept)


def test_a_run_pruned_from_its_first_step_resumes() -> None:
    data, options = ragged_tokens(16), {"sparsity": 0.6, "initial_sparsity": 0.3, "start": 0, "end": 5, "every": 1}
    straight, resumed = tiny_bert(), tiny_bert()
    train_plain(straight, data, [GradualPruning(**options)])
    saved = train_plain(tiny_bert(), data, [GradualPruning(**options)], stop=3)
    train_plain(resumed, data, [GradualPruning(**options)], resume=saved)
    assert same_state(straight, resumed)


def test_blocks_go_as_a_whole() -> None:
    model = tiny_bert()
    train_plain(
        model, ragged_tokens(16), [GradualPruning(sparsity=0.5, pattern="block 4x4", start=1, end=3, include=("bert",))]
    )
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach()
    blocks = (weight.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)) == 0).sum((1, 3))
    assert set(blocks.flatten().tolist()) == {0, 16}
    assert sparsity_of([weight]) == 0.5


def test_weights_that_a_pattern_does_not_fit_are_skipped_with_the_reason() -> None:
    model = tiny_bert(classes=3)
    pruning = GradualPruning(sparsity=0.5, pattern="block 4x4")
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [pruning], total_steps=9):
        assert "classifier.weight" not in pruning.fqns
        reasons = {skip.target: skip.reason for skip in pruning.skips}
        assert "do not tile" in reasons["classifier.weight"]
        assert reasons["bert.embeddings.word_embeddings.weight"] == "not the weight of a matrix operation"
    with pytest.raises(ConfigError, match=r"fits no weight: classifier\.weight: 4x4 blocks do not tile"):
        attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            [GradualPruning(sparsity=0.5, pattern="block 4x4", include=("classifier",))],
            total_steps=9,
        )
    assert not [name for name in model.state_dict() if name.endswith("_mask")]


@pytest.mark.parametrize("build", [captured_net, quantized_net])
def test_on_a_captured_graph_the_same_weights_are_chosen_as_on_the_module(build: Any) -> None:
    chosen = []
    for model in (conv_net(), build()):
        pruning = GradualPruning(sparsity=0.5)
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [pruning], total_steps=9):
            chosen.append(pruning.fqns)
    assert chosen == [("conv.weight", "fc.weight")] * 2


def test_frozen_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.body = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    pruning = GradualPruning(sparsity=0.5)
    with attach(model, torch.optim.SGD(model.body.parameters(), lr=0.1), [pruning], total_steps=9):
        assert pruning.fqns == ("body.weight",)
        reasons = {skip.target: skip.reason for skip in pruning.skips}
    assert reasons["frozen.weight"] == "frozen: requires_grad is False"
    assert reasons["embed.weight"] == "not the weight of a matrix operation"


@pytest.mark.parametrize("option", ["include", "skip"])
def test_a_glob_that_matches_nothing_is_an_error(option: str) -> None:
    model = conv_net()
    pruning = GradualPruning(sparsity=0.5, **{option: ("convv.*",)})
    with pytest.raises(ConfigError, match="matches no parameter"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [pruning], total_steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity must be in"),
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity must be in"),
        ({"sparsity": 0.5, "start": 1.5}, "start must be a share"),
        ({"sparsity": 0.5, "end": -1}, "end must be a share"),
        ({"sparsity": 0.5, "start": True}, "start must be a share"),
        ({"sparsity": 0.5, "every": 0}, "every must be"),
        ({"sparsity": 0.5, "scope": "layer"}, "scope must be"),
        ({"sparsity": 0.5, "schedule": "cubik"}, "no schedule named"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "pattern must be"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "the sparsity of 2:4 is 0.5"),
        ({"pattern": "2:4", "scope": "global"}, "2:4 has the same share in each weight"),
    ],
)
def test_wrong_options_are_refused_when_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradualPruning(**options)


@pytest.mark.parametrize(
    ("options", "total", "error", "message"),
    [
        ({"start": 0.1, "end": 0.7}, None, CallbackError, "length is unknown"),
        ({"start": 1, "end": 20}, 10, CallbackError, "last update is at step 20, but training ends at step 10"),
        ({"start": 0.8, "end": 0.2}, 10, ConfigError, "0 <= start <= end"),
    ],
)
def test_moments_that_do_not_fit_the_run(options: dict[str, Any], total: int | None, error: type, message: str) -> None:
    model = conv_net()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            [GradualPruning(sparsity=0.5, **options)],
            total_steps=total,
        )
    assert list(model.state_dict()) == keys


def test_whole_steps_need_no_length() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, [GradualPruning(sparsity=0.5, start=0, end=1, every=1)]):
        optimizer.step()
    assert zeros(model.fc.weight) == 12


def test_the_chosen_masks_are_a_plan_for_other_copies_of_the_model(tmp_path: Path) -> None:
    model, other = captured_net(), conv_net()
    pruning = GradualPruning(sparsity=0.5, start=1, end=3, every=1)
    train_plain(model, images(24), [pruning])
    pruning.plan.save(tmp_path / "plan.json")
    Plan.load(tmp_path / "plan.json").apply(other)
    for name in ("conv.weight", "fc.weight"):
        assert torch.equal(other.get_parameter(name) == 0, model.get_parameter(name) == 0)
        assert sparsity_of([other.get_parameter(name)]) == 0.5
    assert {edit.target: edit.numbers["sparsity"] for edit in pruning.plan.edits} == {
        "conv.weight": 0.5,
        "fc.weight": 0.5,
    }


def test_two_callbacks_cannot_manage_one_weight() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = GradualPruning(sparsity=0.5), GradualPruning(sparsity=0.25, include=("fc",))
    with pytest.raises(CallbackError, match=r"fc\.weight is managed by two callbacks"):
        attach(model, optimizer, [first, second], total_steps=9)
    assert not [name for name in model.state_dict() if name.endswith("_mask")]
    with torch.no_grad():
        model.fc.weight[0, 0] = 0
    keep = KeepZeros()
    with attach(model, optimizer, [keep], total_steps=9):
        with pytest.raises(
            CallbackError, match=r"fc\.weight is managed by two callbacks, KeepZeros and GradualPruning"
        ):
            Student.of(model).join(second)
        assert "fc.weight_mask" in model.state_dict()
    apart = [
        GradualPruning(sparsity=0.5, start=0, end=0, skip=("fc",)),
        GradualPruning(sparsity=0.25, start=0, end=0, include=("fc",)),
    ]
    with attach(model, optimizer, apart, total_steps=9):
        assert (zeros(model.conv.weight), zeros(model.fc.weight)) == (36, 6)


def test_the_name_of_a_mask_in_use_is_refused() -> None:
    model = conv_net()
    model.fc.register_buffer("weight_mask", torch.ones(3, 8))
    with pytest.raises(CallbackError, match=r"fc\.weight has a weight_mask beside it already"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualPruning(sparsity=0.5)], total_steps=9)
    assert "conv.weight_mask" not in model.state_dict()


def test_going_on_without_the_masks_is_refused() -> None:
    """The weights of a checkpoint without its masks would silently grow back."""
    data, pruning = ragged_tokens(16), {"sparsity": 0.5, "start": 1, "end": 3, "every": 1}
    saved = train_plain(tiny_bert(), data, [GradualPruning(**pruning)], stop=3)
    for wrong in (
        {"session": {"step": 2}},
        {"model": saved["model"] | {n: torch.ones_like(t) for n, t in saved["model"].items() if n.endswith("_mask")}},
    ):
        with pytest.raises(CallbackError, match="masks should remove"):
            train_plain(tiny_bert(), data, [GradualPruning(**pruning)], resume=saved | wrong)
    with pytest.raises(CallbackError, match="resume with the options"):
        train_plain(tiny_bert(), data, [GradualPruning(**(pruning | {"sparsity": 0.6}))], resume=saved)


def test_a_run_that_ends_short_of_the_sparsity_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="torchopt_passes"):
        train_plain(tiny_bert(), ragged_tokens(16), [GradualPruning(sparsity=0.5, start=1, end=5)], stop=3)
    assert "training stopped before the last update" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="torchopt_passes"):
        train_plain(tiny_bert(), ragged_tokens(16), [GradualPruning(sparsity=0.5, start=1, end=5)])
    assert not caplog.text


def test_model_init_works_and_its_resume_is_refused(tmp_path: Path) -> None:
    """With model_init the Trainer makes the model after on_init_end, and loads the checkpoint before on_train_begin."""

    def trainer(folder: str) -> Trainer:
        pruning = GradualPruning(sparsity=0.5, start=1, end=2, every=1)
        saving = {"save_strategy": "steps", "save_steps": 3, "trainer_kwargs": {"model_init": lambda: tiny_bert()}}
        return make_trainer(None, ragged_tokens(16), tmp_path / folder, [pruning], steps=4, **saving)  # type: ignore[arg-type]

    first = trainer("a")
    first.train()
    assert sparsity_of([first.model.classifier.weight]) == 0.5
    with pytest.raises(CallbackError, match="masks should remove"):
        trainer("b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
