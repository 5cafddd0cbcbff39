"""Optimizers of torchao that keep their moments in 8, 4 or fp8 bits, passed through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao import optim

from tests.callbacks.loops import images, make_trainer
from torchopt_passes.callbacks import (
    CompressionAwareLR,
    GradualChannelPruning,
    GradualPruning,
    LotteryTicket,
    RigL,
    attach,
)
from torchopt_passes.callbacks.optimizer_entries import forget_entries
from torchopt_passes.errors import CallbackError

INPUTS = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The step of torchao's optimizers is compiled for each shape; the same step runs without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def one_layer() -> nn.Linear:
    """4096 weights: fewer keep their moments in full."""
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=False)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    model(INPUTS[index]).square().mean().backward()
    optimizer.step()


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_after_units_have_left_a_new_optimizer_is_needed(name: str) -> None:
    """Quantized moments cannot be cut: without an error of ours the next step would fail on shapes."""
    model = TwoLayers()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01)
    pruning = GradualChannelPruning(ratio=0.5, start=1, end=2, example_inputs=INPUTS[0])
    with attach(model, optimizer, [pruning], total_steps=2):
        for index in range(2):
            step_once(model, optimizer, index)
    assert model.first.weight.shape == (64, 64)
    with pytest.raises(CallbackError, match=f"{name} has the state of a model whose units have left since"):
        step_once(model, optimizer, 2)
    step_once(model, getattr(optim, name)(model.parameters(), lr=0.01), 2)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_masks_hold_and_grown_entries_have_no_moments(name: str) -> None:
    model = one_layer()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01)
    rigl = RigL(sparsity=0.5, scope="tensor", every=2, end=5, drop=0.5)
    with attach(model, optimizer, [rigl], total_steps=6):
        for index in range(6):
            before = model.weight_mask.clone()
            step_once(model, optimizer, index)
            grown = model.weight_mask & ~before
            assert int((~model.weight_mask).sum()) == 2048
            assert not model.weight.detach()[~model.weight_mask].any()
            assert bool(grown.any()) == (index + 1 in (2, 4))
            for moment in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[model.weight][moment]
                assert type(state) is not torch.Tensor
                values = state.dequantize()
                # the grid of a 4-bit square has no zero, so that nothing is divided by it: its lowest step is 1/16
                lowest = float(values.max()) / 16 if (name, moment) == ("AdamW4bit", "exp_avg_sq") else 0.0
                assert not grown.any() or float(values[grown].abs().max()) <= lowest * 1.001
                assert bool(values[before & model.weight_mask].any())
    assert int((model.weight == 0).sum()) >= 2048


def test_the_moments_of_the_others_stay() -> None:
    model = one_layer()
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.01)
    step_once(model, optimizer, 0)
    state = optimizer.state[model.weight]
    before = state["exp_avg"].dequantize().clone()
    entries = torch.zeros(64, 64, dtype=torch.bool)
    entries[3, 5:9] = True
    forget_entries(optimizer, model.weight, entries)
    after = state["exp_avg"].dequantize()
    assert not after[entries].any()
    step = before.abs().max() * 0.02  # of the quantization, where the largest of a block was forgotten
    assert float((after - before)[~entries].abs().max()) <= float(step)


def test_gradual_pruning_and_a_learning_rate_that_is_a_tensor() -> None:
    model = one_layer()
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    used: list[float] = []
    optimizer.register_step_post_hook(lambda o, a, k: used.append(float(o.param_groups[0]["lr"])))
    callbacks = [
        GradualPruning(sparsity=0.75, criterion="movement", start=2, end=2),
        CompressionAwareLR(peak=1.0, warmup=1, plateau=0, decay=1),
    ]
    with attach(model, optimizer, callbacks, total_steps=6):
        for index in range(6):
            step_once(model, optimizer, index)
            scheduler.step()
    assert used == pytest.approx([0.01, 0.005, 0.01, 0.00125, 0.000625, 0.0003125])
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert int((model.weight == 0).sum()) == 3072


def test_a_rewound_weight_begins_with_new_moments() -> None:
    model = one_layer()
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.01)
    with attach(model, optimizer, [LotteryTicket(sparsity=0.5, rounds=1, rewind=0, length=3)], total_steps=6):
        for index in range(3):
            step_once(model, optimizer, index)
        assert not optimizer.state[model.weight]
        assert int((model.weight == 0).sum()) == 2048
        assert torch.equal(model.weight, one_layer().weight * model.weight_mask)
        step_once(model, optimizer, 3)
        assert float(optimizer.state[model.weight]["step"]) == 1.0


def test_the_trainers_choice_by_name(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(36, 128), nn.Linear(128, 3)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(torch.relu(self.body(pixel_values.flatten(1))))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model: Any = Wide()
    callbacks = [RigL(sparsity=0.5, every=2, end=5, skip=("head",), scope="tensor")]
    trainer = make_trainer(model, images(24), tmp_path, callbacks, optim="adamw_torch_8bit")
    trainer.train()
    optimizer: Any = trainer.optimizer
    assert isinstance(getattr(optimizer, "optimizer", optimizer), optim.AdamW8bit)
    assert int((model.body.weight == 0).sum()) >= 2304
