"""Masks from thresholds: SensitivityPruning, Splicing and SoftMovementPruning against loops from their papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import bare_net, images, train_plain
from torchopt_passes.callbacks import Callback, SensitivityPruning, SoftMovementPruning, Splicing, attach
from torchopt_passes.errors import CallbackError, ConfigError

STEPS = 8
INPUTS = torch.randn(STEPS, 5, 8, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(STEPS, 5, 4, generator=torch.Generator().manual_seed(3))


def one_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4, bias=False)


def loss_of(weight: torch.Tensor, step: int) -> torch.Tensor:
    return nn.functional.mse_loss(INPUTS[step] @ weight.T, TARGETS[step])


def train(callback: Callback, lr: float = 0.3) -> tuple[nn.Linear, list[torch.Tensor]]:
    """Train with SGD; the weights that the model computes with after each step."""
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    seen: list[torch.Tensor] = []
    with attach(model, optimizer, [callback], total_steps=STEPS):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model.weight, step).backward()
            optimizer.step()
            seen.append(model.weight.detach().clone())
    return model, seen


def gradient(masked: torch.Tensor, step: int) -> torch.Tensor:
    leaf = masked.clone().requires_grad_(True)
    loss_of(leaf, step).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_a_threshold_that_is_set_once_catches_what_comes_near_zero() -> None:
    """Distiller: the standard deviation is that of the first update, the mask is anew at each."""
    weight, mask, limit = one_layer().weight.detach().clone(), torch.ones(4, 8), None
    expected, counts = [], []
    for step in range(1, STEPS + 1):
        weight = weight - 0.3 * gradient(weight, step - 1)
        if 2 <= step <= 6:
            limit = limit if limit is not None else 0.5 * float(weight.std())
            mask = mask * (weight.abs() > limit)
        weight = weight * mask
        expected.append(weight)
        counts.append(int((mask == 0).sum()))
    model, seen = train(SensitivityPruning(sensitivity=0.5, start=2, end=6, every=1))
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert 0 < counts[1] < counts[5] == counts[7] < 32
    assert set(model.state_dict()) == {"weight"}


def test_sensitivities_by_name_and_a_threshold_that_grows() -> None:
    model = bare_net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = SensitivityPruning(
        sensitivity=1.0, overrides={"fc*": 0.25}, initial=0.5, schedule="linear", start=0, end=2, every=1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, [callback]):
        for share in (0.5, 0.75, 1.0):
            for name, factor in (("conv.weight", 1.0), ("fc.weight", 0.25)):
                weight = before[name]
                kept = weight.abs() > share * factor * float(weight.double().std())
                assert torch.equal(model.get_parameter(name) != 0, kept), (share, name)
            optimizer.step()


def test_splicing_is_network_surgery() -> None:
    """Guo et al., equations 3 and 4: dense weights get the gradient of the masked ones, masks close and open."""
    dense, mask, limits = one_layer().weight.detach().clone(), torch.ones(4, 8), (0.0, 0.0)
    expected: list[torch.Tensor] = []
    spliced = 0
    for step in range(1, STEPS + 1):
        dense = dense - 0.3 * gradient(dense * mask, step - 1)
        if step == 1:
            middle = float(dense.abs().mean()) + 0.1 * float(dense.abs().std())
            limits = (0.9 * middle, 1.1 * middle)
        if step <= 7:
            before = mask
            mask = torch.where(dense.abs() < limits[0], 0.0, mask)
            mask = torch.where(dense.abs() >= limits[1], 1.0, mask)
            spliced += int(((before == 0) & (mask == 1)).sum())
        expected.append(dense * mask)
    model, seen = train(Splicing(sensitivity=0.1, start=1, end=7, every=1))
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert torch.equal(ours == 0, theirs == 0)
    assert spliced > 0
    assert set(model.state_dict()) == {"weight"}


@pytest.mark.parametrize("schedule", ["linear", "one_shot"])
def test_soft_movement_is_adam_on_scores_through_the_mask(schedule: str) -> None:
    """Scores are a parameter of torch.optim.Adam, the mask a straight-through function of them."""
    dense = one_layer().weight.detach().clone().requires_grad_(True)
    scores = torch.zeros(4, 8, requires_grad=True)
    optimizer = torch.optim.SGD([dense], lr=0.3)
    scorer = torch.optim.Adam([scores], lr=0.2)
    mask, tau = torch.ones(4, 8), 0.0
    expected: list[torch.Tensor] = []
    came_back = False
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        scorer.zero_grad()
        through = mask + (scores - scores.detach())
        loss = loss_of(dense * through, step - 1) + 0.5 * tau / 0.4 * scores.sigmoid().mean()
        loss.backward()
        optimizer.step()
        if step <= 7:
            scorer.step()
        if 1 <= step <= 7:
            tau = 0.4 if schedule == "one_shot" else 0.4 * (step - 1) / 6
            before = mask
            mask = (scores.detach().sigmoid() > tau).float()
            came_back |= bool(((before == 0) & (mask == 1)).any())
        expected.append((dense * mask).detach())
    callback = SoftMovementPruning(
        threshold=0.4, penalty=0.5, score_lr=0.2, min_kept=0.0, start=1, end=7, every=1, schedule=schedule
    )
    model, seen = train(callback)
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.equal(ours == 0, theirs == 0)
    assert 0 < int((seen[-1] == 0).sum()) < 32
    assert came_back == (schedule == "one_shot")  # where the threshold rises the scores do not overtake it
    assert set(model.state_dict()) == {"weight"}


def test_a_share_of_each_weight_stays_however_large_the_penalty() -> None:
    callback = SoftMovementPruning(threshold=0.4, penalty=1e6, score_lr=0.5, min_kept=0.25, start=1, end=7, every=1)
    _, seen = train(callback)
    assert int((seen[-1] != 0).sum()) == 8


MAKERS: list[Any] = [
    lambda: SensitivityPruning(sensitivity=0.5, initial=0.5, start=1, end=5, every=1),
    lambda: Splicing(sensitivity=0.2, start=1, end=5, every=1),
    lambda: SoftMovementPruning(threshold=0.45, penalty=50.0, score_lr=0.1, start=1, end=5, every=1),
]


@pytest.mark.parametrize("make", MAKERS, ids=["sensitivity", "splicing", "soft movement"])
def test_a_checkpoint_without_its_buffers_is_refused(make: Any) -> None:
    data = images(24)
    model = bare_net()
    saved = train_plain(model, data, [make()], stop=3)
    fresh = {"mask": torch.ones_like, "limit": torch.zeros_like, "scores": torch.zeros_like}
    state = {name: fresh.get(name.rpartition("_")[2], torch.clone)(t) for name, t in saved["model"].items()}
    lost = saved | {"model": state}
    with pytest.raises(CallbackError, match="load the model's state_dict"):
        train_plain(bare_net(), data, [make()], resume=lost)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SensitivityPruning, {"sensitivity": 0.0}, "sensitivity of 'sensitivity' must be a number > 0"),
        (SensitivityPruning, {"overrides": {"fc": -1.0}}, "sensitivity of 'fc' must be a number > 0"),
        (SensitivityPruning, {"initial": 0.0}, "initial must be in"),
        (SensitivityPruning, {"start": 2.0}, "start must be a share"),
        (Splicing, {"sensitivity": float("nan")}, "must be a number"),
        (Splicing, {"low": 1.2}, "0 < low <= high"),
        (Splicing, {"initial": 1.5}, "initial must be in"),
        (SoftMovementPruning, {"threshold": 0.5}, "threshold must be in"),
        (SoftMovementPruning, {"penalty": 0.0}, "penalty must be > 0"),
        (SoftMovementPruning, {"score_lr": -1.0}, "score_lr must be > 0"),
        (SoftMovementPruning, {"min_kept": 1.0}, "min_kept must be in"),
    ],
)
def test_wrong_options_are_refused(kind: type[Callback], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_an_override_that_fits_nothing_is_an_error() -> None:
    model = bare_net()
    for kind in (SensitivityPruning, Splicing):
        with pytest.raises(ConfigError, match="matches no parameter"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [kind(overrides={"fcc": 0.1})], total_steps=9)
