"""LotteryTicket: the rounds, and each of them against a loop of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.callbacks.loops import bare_net, conv_net, images, same_state, train_plain
from torchopt_passes.callbacks import LotteryTicket, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.functional.ticket_rounds import TicketRounds

INPUTS = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(3))


def one_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 19), st.integers(0, 200))
def test_rounds_are_those_that_one_counts(count: int, length: int, rewind: int, step: int) -> None:
    if rewind >= length:
        with pytest.raises(ConfigError, match="weights go back to step"):
            TicketRounds(count, length, rewind)
        return
    rounds = TicketRounds(count, length, rewind)
    position = done = 0
    for _ in range(step):
        position += 1
        if position == length and done < count:
            position, done = rewind, done + 1
    assert (rounds.position(step), rounds.done(step)) == (position, done)
    assert TicketRounds.over(rounds.total, count, rewind) == rounds
    assert rounds.sparsity(count, 0.9) == pytest.approx(0.9)
    left = [1 - rounds.sparsity(j, 0.9) for j in range(count + 1)]
    assert all(b / a == pytest.approx(0.1 ** (1 / count)) for a, b in pairwise(left))


def test_each_round_is_a_training_from_step_k() -> None:
    """Two prunings of a run of rounds of 5 steps, rewound to step 2, with a new Adam each time."""
    model = one_layer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ticket = LotteryTicket(sparsity=0.75, rounds=2, rewind=2, length=5)
    twin = one_layer()
    fresh = torch.optim.Adam(twin.parameters(), lr=0.1)
    kept: dict[str, torch.Tensor] = {}
    mask, position, pruned = torch.ones(4, 8), 0, 0
    with attach(model, optimizer, [ticket], total_steps=14):
        for step in range(1, 13):
            for net, opt in ((model, optimizer), (twin, fresh)):
                opt.zero_grad()
                nn.functional.mse_loss(net(INPUTS[step - 1]), TARGETS[step - 1]).backward()
                if net is twin:
                    assert twin.weight.grad is not None
                    twin.weight.grad.mul_(mask)
                opt.step()
            position += 1
            if position == 2 and not kept:
                kept = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
            if position == 5 and pruned < 2:
                pruned += 1
                share = 1 - 0.25 ** (pruned / 2)
                scores = twin.weight.detach().abs().masked_fill(mask == 0, -1.0).flatten()
                flat = torch.ones(32)
                flat[scores.argsort(stable=True)[: removed_count(share, 32)]] = 0.0
                mask = flat.view(4, 8)
                twin.load_state_dict({**kept, "weight": kept["weight"] * mask})
                fresh = torch.optim.Adam(twin.parameters(), lr=0.1)
                position = 2
            assert torch.equal(model.weight, twin.weight), f"step {step}"
            assert torch.equal(model.bias, twin.bias), f"step {step}"
            assert ticket.position(step) == position
    assert int((model.weight == 0).sum()) == 24
    assert set(model.state_dict()) == {"weight", "bias"}


def test_batch_statistics_go_back_too() -> None:
    model, seen = conv_net(), dict[int, torch.Tensor]()
    ticket = LotteryTicket(sparsity=0.5, rounds=1, rewind=1, length=3)
    train_plain(model, images(24), [ticket], seen=lambda step, m: seen.update({step: m.bn.running_mean.clone()}))
    assert torch.equal(seen[3], seen[1])
    assert not torch.equal(seen[2], seen[1])


def test_resumes_around_the_rewinding() -> None:
    data, straight, resumed = images(24), bare_net(), bare_net()
    options: dict[str, Any] = {"sparsity": 0.6, "rounds": 2, "rewind": 1, "length": 3}
    train_plain(straight, data, [LotteryTicket(**options)], steps=8)
    for stop in (2, 3, 5, 6):
        saved = train_plain(bare_net(), data, [LotteryTicket(**options)], steps=8, stop=stop)
        train_plain(resumed, data, [LotteryTicket(**options)], steps=8, resume=saved)
        assert same_state(straight, resumed), f"resumed at step {stop}"
    lost = saved | {"model": {n: torch.ones_like(t) if "mask" in n else t for n, t in saved["model"].items()}}
    with pytest.raises(CallbackError, match="masks should remove"):
        train_plain(bare_net(), data, [LotteryTicket(**options)], steps=8, resume=lost)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rewind": -1}, "rewind must be a share"),
        ({"length": 0}, "length must be at least 1"),
        ({"rewind": 5, "length": 5}, "weights go back to step 5, but a round has 5"),
        ({"scope": "layer"}, "scope must be one of"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LotteryTicket(**options)


def test_rounds_that_do_not_fit_the_run() -> None:
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CallbackError, match="last pruning is after step 20, but training ends at step 20"):
        attach(model, optimizer, [LotteryTicket(rounds=2, rewind=0, length=10)], total_steps=20)
    with pytest.raises(CallbackError, match="give total_steps=, or length="):
        attach(model, optimizer, [LotteryTicket(rewind=0)])
    with pytest.raises(CallbackError, match="not laid out yet"):
        LotteryTicket().position(3)
    assert set(model.state_dict()) == {"weight", "bias"}
