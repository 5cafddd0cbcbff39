"""RigL and SET: the exchange of the paper, exact counts, and an optimizer that forgets what grows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import bare_net, images, same_state, train_plain
from tests.functional.test_sparse_training import slow_exchange
from torchopt_passes.callbacks import SET, Epochs, RigL, attach
from torchopt_passes.callbacks.optimizer_entries import forget_entries
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.noise import named_noise

INPUTS = torch.randn(10, 5, 8, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(3))


def one_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4, bias=False)


def loss_of(weight: torch.Tensor, step: int) -> torch.Tensor:
    return nn.functional.mse_loss(INPUTS[step] @ weight.T, TARGETS[step])


@pytest.mark.parametrize("kind", [RigL, SET])
def test_the_loop_of_the_paper(kind: type[RigL | SET]) -> None:
    """Updates after steps 2, 4 and 6 of 8; momentum by hand."""
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    callback = kind(sparsity=0.5, scope="tensor", every=2, end=8, drop=0.5, seed=3)
    weight, momentum = one_layer().weight.detach().clone(), torch.zeros(4, 8)
    order = named_noise(3, "0 weight", weight).flatten().argsort(stable=True)
    mask = torch.ones(32, dtype=torch.bool)
    mask[order[:16]] = False
    mask = mask.view(4, 8)
    weight = weight * mask
    exchanged = 0
    with attach(model, optimizer, [callback], total_steps=10):
        assert torch.equal(model.weight, weight)
        for step in range(1, 11):
            optimizer.zero_grad()
            loss_of(model.weight, step - 1).backward()
            optimizer.step()
            leaf = weight.clone().requires_grad_(True)
            loss_of(leaf, step - 1).backward()
            assert leaf.grad is not None
            momentum = 0.9 * momentum + leaf.grad * mask
            weight = (weight - 0.1 * momentum) * mask
            if step in (2, 4, 6):
                growth = leaf.grad.abs() if kind is RigL else named_noise(3, f"{step} weight", weight)
                fraction = 0.25 * (1 + math.cos(math.pi * step / 8))
                flat = [each.flatten().tolist() for each in (weight.abs(), growth, mask)]
                new, grown = (torch.tensor(each).view(4, 8) for each in slow_exchange(*flat, fraction))
                exchanged += int(grown.sum())
                momentum = momentum.masked_fill(grown, 0.0)
                weight, mask = weight.masked_fill(~new | grown, 0.0), new
            assert torch.allclose(model.weight, weight, atol=1e-6), f"step {step}"
            assert torch.equal(model.weight_mask, mask), f"step {step}"
            assert torch.allclose(optimizer.state[model.weight]["momentum_buffer"], momentum, atol=1e-6)
    assert exchanged > 3
    assert set(model.state_dict()) == {"weight"}


@pytest.mark.parametrize("scope", ["erk", "uniform", "tensor"])
def test_every_step_has_the_sparsity(scope: Any) -> None:
    model, counts = bare_net(), set[tuple[int, ...]]()
    weights = (model.conv.weight, model.fc.weight)
    train_plain(
        model,
        images(24),
        [RigL(sparsity=0.7, scope=scope, every=1, end=1.0, drop=0.4)],
        steps=8,
        seen=lambda step, m: counts.add(tuple(int((~layer.weight_mask).sum()) for layer in (m.conv, m.fc))),
    )
    assert len(counts) == 1
    if scope == "uniform":
        assert counts == {(0, 17)}
    assert sum(int((weight == 0).sum()) for weight in weights) >= sum(counts.pop())


@pytest.mark.parametrize("kind", [RigL, SET])
def test_resumes_from_any_step(kind: type[RigL | SET]) -> None:
    options: dict[str, Any] = {"sparsity": 0.6, "every": 2, "end": 7, "drop": 0.5}
    data, straight, resumed = images(24), bare_net(), bare_net()
    train_plain(straight, data, [kind(**options)], steps=8)
    for stop in (1, 2, 5):
        saved = train_plain(bare_net(), data, [kind(**options)], steps=8, stop=stop)
        train_plain(resumed, data, [kind(**options)], steps=8, resume=saved)
        assert same_state(straight, resumed)
    lost = saved | {"model": {n: torch.ones_like(t) if "mask" in n else t for n, t in saved["model"].items()}}
    with pytest.raises(CallbackError, match="masks should remove"):
        train_plain(resumed, data, [kind(**options)], steps=8, resume=lost)


def test_a_trained_model_begins_with_its_largest_weights() -> None:
    model = one_layer()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = RigL(sparsity=0.75, scope="tensor", initial="magnitude", every=Epochs(1), end=Epochs(3))
    with attach(model, optimizer, [callback], total_steps=10, steps_per_epoch=2):
        kept = before.abs() >= before.abs().flatten().sort().values[24]
        assert torch.equal(model.weight != 0, kept)


def test_a_skipped_step_has_no_update() -> None:
    """In the Trainer, after_step comes after a step that fp16 skipped too: there are no gradients to grow by."""
    model = one_layer()
    callback = RigL(sparsity=0.5, scope="tensor", every=1, end=9)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [callback], total_steps=10) as session:
        mask = model.weight_mask.clone()
        session.step += 1
        callback.after_step(session.progress)
        assert torch.equal(model.weight_mask, mask)


def test_adam_forgets_both_moments_of_what_grows() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    entries = torch.tensor([[True, False, False], [False, True, False]])
    forget_entries(optimizer, parameter, entries)  # nothing there yet
    parameter.sum().backward()
    optimizer.step()
    forget_entries(optimizer, parameter, entries)
    state = optimizer.state[parameter]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[moment] == 0, entries)
    assert float(state["step"]) == 1.0


def test_a_moment_in_integers_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"codes": torch.ones(2, dtype=torch.uint8), "step": 3, "rows": torch.ones(1)}
    forget_entries(optimizer, parameter, torch.tensor([True, False]))
    assert "keeps 'codes' as torch.uint8" in caplog.text
    assert optimizer.state[parameter]["codes"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", [RigL, SET])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "sparsity must be in"),
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"scope": "global"}, "keeps its own number"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"drop": 0.0}, "drop must be in"),
        ({"every": 0}, "every must be at least 1"),
        ({"end": 1.5}, "end must be a share"),
        ({"initial": "zeros"}, "initial must be"),
    ],
)
def test_wrong_options_are_refused(kind: type[RigL | SET], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_updates_that_end_after_training_are_refused() -> None:
    model = one_layer()
    with pytest.raises(CallbackError, match="updates end at step 20, but training ends at step 10"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [RigL(end=20)], total_steps=10)
    assert set(model.state_dict()) == {"weight"}
