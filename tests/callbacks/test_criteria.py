"""What ranks weights in GradualPruning: each criterion against a slow loop written from its paper."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.loops import bare_net, collate, conv_net, images, same_state, train_plain
from torchopt_passes.callbacks import GradualPruning, attach
from torchopt_passes.callbacks.criteria import Criterion, Magnitude, RandomOrder, Snip
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.masks import removed_count

STEPS = 8
INPUTS = torch.randn(STEPS, 5, 6, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(STEPS, 5, 4, generator=torch.Generator().manual_seed(3))


def one_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=False)


def train(model: nn.Module, pruning: GradualPruning, momentum: float = 0.9) -> list[torch.Tensor]:
    """Train on the batches above; the weights that the model computes with after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    seen: list[torch.Tensor] = []
    with attach(model, optimizer, [pruning], total_steps=STEPS):
        for step in range(STEPS):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(INPUTS[step]), TARGETS[step]).backward()
            optimizer.step()
            seen.append(model.weight.detach().clone())
    return seen


def top(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask of the highest scores, one at a time."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    order = sorted(range(scores.numel()), key=lambda i: (float(scores.flatten()[i]), i))
    mask[order[: removed_count(sparsity, scores.numel())]] = False
    return mask.view(scores.shape)


def cubic(step: int, start: int, end: int, final: float) -> float:
    return final * (1 - (1 - (min(step, end) - start) / (end - start)) ** 3) if step >= start else 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_movement_is_the_straight_through_loop_of_the_paper(momentum: float) -> None:
    """W and S are parameters, the forward computes with W * M, and autograd gives W its gradient through the mask."""
    dense = one_layer().weight.detach().clone().requires_grad_(True)
    scores, mask = torch.zeros(4, 6), torch.ones(4, 6)
    optimizer = torch.optim.SGD([dense], lr=0.1, momentum=momentum, weight_decay=0.0)
    expected: list[torch.Tensor] = []
    came_back = False
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        masked = dense * mask
        masked.retain_grad()
        nn.functional.mse_loss(INPUTS[step - 1] @ masked.T, TARGETS[step - 1]).backward()
        assert masked.grad is not None
        scores -= masked.grad * dense.detach()
        optimizer.step()
        if 2 <= step <= 6:
            before = mask
            mask = top(scores, cubic(step, 2, 6, 0.7)).float()
            came_back |= bool(((before == 0) & (mask == 1)).any())
        expected.append((dense * mask).detach())
    model = one_layer()
    seen = train(model, GradualPruning(sparsity=0.7, start=2, end=6, every=1, criterion="movement"), momentum)
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert torch.equal(ours == 0, theirs == 0)
    assert came_back, "the example must show that a removed weight comes back"
    assert set(model.state_dict()) == {"weight"}
    assert torch.equal(model.weight, seen[-1])


def test_movement_keeps_what_moves_away_from_zero() -> None:
    """Growing weights score high however small they are; magnitude would take them."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.01, -0.01, 2.0, -2.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruning = GradualPruning(sparsity=0.5, start=3, end=3, criterion="movement")
    with attach(model, optimizer, [pruning]):
        for _ in range(3):
            optimizer.zero_grad()
            # -dL/dw has the sign of w for the small ones and the other one for the large ones
            (model.weight * torch.tensor([[-1.0, 1.0, 1.0, -1.0]])).sum().backward()
            optimizer.step()
    assert (model.weight != 0).tolist() == [[True, True, False, False]]


def test_dense_magnitude_is_training_through_a_mask() -> None:
    """Distiller's double copies: the gradient of the masked weight goes to the dense one, so that weights recover."""
    dense, mask = one_layer().weight.detach().clone(), torch.ones(4, 6)
    expected: list[torch.Tensor] = []
    came_back = False
    for step in range(1, STEPS + 1):
        masked = (dense * mask).requires_grad_(True)
        nn.functional.mse_loss(INPUTS[step - 1] @ masked.T, TARGETS[step - 1]).backward()
        assert masked.grad is not None
        dense = dense - 0.1 * masked.grad
        before, mask = mask, top(dense.abs(), 0.5).float()
        came_back |= bool(((before == 0) & (mask == 1)).any())
        expected.append(dense * mask)
    pruning = GradualPruning(
        sparsity=0.5, start=1, end=STEPS, every=1, schedule="one_shot", criterion=Magnitude(dense=True)
    )
    for ours, theirs in zip(train(one_layer(), pruning, 0.0), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert came_back


def test_taylor_sums_the_squared_products_since_the_last_update() -> None:
    weight, mask, total = one_layer().weight.detach().clone(), torch.ones(4, 6), torch.zeros(4, 6)
    expected: list[torch.Tensor] = []
    for step in range(1, STEPS + 1):
        leaf = weight.clone().requires_grad_(True)
        nn.functional.mse_loss(INPUTS[step - 1] @ leaf.T, TARGETS[step - 1]).backward()
        assert leaf.grad is not None
        total += (weight * leaf.grad) ** 2
        weight = weight - 0.1 * leaf.grad
        if step in (2, 4, 6):
            mask = top(total.masked_fill(mask == 0, -math.inf), cubic(step, 2, 6, 0.7)).float()
            total = torch.zeros(4, 6)
        weight = weight * mask
        expected.append(weight)
    pruning = GradualPruning(sparsity=0.7, start=2, end=6, every=2, criterion="taylor")
    for ours, theirs in zip(train(one_layer(), pruning, 0.0), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def connection_sensitivity(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SNIP, equation 6, from the derivative by a factor c on each weight, normalized over all weights."""
    factors = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters() if p.ndim > 1}
    weights = {n: p.detach() * factors[n] if n in factors else p.detach() for n, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.func.functional_call(model.train(), weights | buffers, (), batch).loss.backward()
    products = {name: factor.grad.abs() for name, factor in factors.items() if factor.grad is not None}
    whole = sum(float(product.sum()) for product in products.values())
    return {name: product / whole for name, product in products.items()}


def test_snip_on_a_batch_is_single_shot_before_the_first_step() -> None:
    model, batch = conv_net(), collate(images(6))
    scores = connection_sensitivity(conv_net(), batch)
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = top(flat, 0.6)
    kept = {n: m.view(scores[n].shape) for n, m in zip(scores, mask.split([72, 24]), strict=True)}
    state, random = conv_net().state_dict(), torch.get_rng_state()
    pruning = GradualPruning(sparsity=0.6, scope="global", criterion=Snip(batches=[batch]), start=0, end=0)
    model.eval()
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [pruning]):
        for name, parameter in model.named_parameters():
            if name in kept:
                assert torch.equal(parameter != 0, kept[name])
                assert torch.equal(parameter, state[name] * kept[name])
            assert parameter.grad is None
        for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
            assert torch.equal(model.state_dict()[name], state[name])
        assert torch.equal(random, torch.get_rng_state())
        assert not model.training


def test_snip_without_batches_takes_the_steps_up_to_the_first_update() -> None:
    weight = one_layer().weight.detach().clone()
    total = torch.zeros(4, 6)
    for step in range(2):
        leaf = weight.clone().requires_grad_(True)
        nn.functional.mse_loss(INPUTS[step] @ leaf.T, TARGETS[step]).backward()
        assert leaf.grad is not None
        total += weight * leaf.grad
        weight = weight - 0.1 * leaf.grad
    order = total.abs()
    pruning = GradualPruning(sparsity=0.75, start=2, end=6, every=2, schedule="linear", criterion="snip")
    seen = train(one_layer(), pruning, 0.0)
    for step, share in ((2, 0.0), (4, 0.375), (6, 0.75), (8, 0.75)):
        assert torch.equal(seen[step - 1] != 0, top(order, share)), f"step {step}"


def test_random_order_is_nested_and_drawn_from_seed_and_name() -> None:
    seen = train(one_layer(), GradualPruning(sparsity=0.75, start=1, end=6, every=1, criterion="random"))
    removed = [set((weight == 0).flatten().nonzero().flatten().tolist()) for weight in seen]
    assert all(first <= second for first, second in pairwise(removed))
    assert len(removed[-1]) == 18
    other = train(one_layer(), GradualPruning(sparsity=0.75, start=1, end=6, every=1, criterion=RandomOrder(seed=1)))
    assert not torch.equal(other[-1] == 0, seen[-1] == 0)


@pytest.mark.parametrize("criterion", ["taylor", "snip", "movement", Magnitude(dense=True)])
@pytest.mark.parametrize("scope", ["erk", "global"])
def test_what_a_criterion_gathers_resumes(criterion: Any, scope: Any) -> None:
    options: dict[str, Any] = {
        "sparsity": 0.6, "scope": scope, "criterion": criterion, "start": 2, "end": 5, "every": 1
    }  # fmt: skip
    data = images(24)
    straight, resumed = bare_net(), bare_net()
    train_plain(straight, data, [GradualPruning(**options)])
    for stop in (1, 3):
        saved = train_plain(bare_net(), data, [GradualPruning(**options)], stop=stop)
        train_plain(resumed, data, [GradualPruning(**options)], resume=saved)
        assert same_state(straight, resumed)


def test_masked_gradients_leave_no_momentum() -> None:
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruning = GradualPruning(sparsity=0.5, start=0, end=0, mask_gradients=True)
    with attach(model, optimizer, [pruning]):
        for step in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(INPUTS[step]), TARGETS[step]).backward()
            optimizer.step()
        momentum = optimizer.state[model.weight]["momentum_buffer"]
        assert torch.equal(momentum == 0, model.weight == 0)
        assert int((model.weight == 0).sum()) == 12


def test_scopes_share_the_sparsity_as_they_say() -> None:
    """Of 72 and 24 weights; ERK by bisection on eps."""
    shapes = {"conv.weight": (8, 1, 3, 3), "fc.weight": (3, 8)}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1.0, middle * raw[name]) * math.prod(shape) for name, shape in shapes.items())
        low, high = (middle, high) if kept < 0.3 * 96 else (low, middle)
    erk = {n: removed_count(1 - min(1.0, low * raw[n]), math.prod(shape)) for n, shape in shapes.items()}
    expected = {"tensor": (50, 17), "uniform": (0, 17), "erk": tuple(erk.values())}
    for scope, counts in expected.items():
        model = conv_net()
        options: dict[str, Any] = {"scope": scope, "start": 0, "end": 0}
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualPruning(sparsity=0.7, **options)]):
            found = tuple(int((weight == 0).sum()) for weight in (model.conv.weight, model.fc.weight))
            assert found == counts, scope


def test_a_criterion_of_ones_own() -> None:
    class LastFirst(Criterion):
        name = "last first"

        def scores(self, target: Any) -> torch.Tensor:
            return -torch.arange(target.weight.numel()).view(target.weight.shape)

    seen = train(one_layer(), GradualPruning(sparsity=0.25, start=1, end=1, criterion=LastFirst()))
    assert (seen[-1] == 0).flatten().tolist() == [False] * 18 + [True] * 6


@pytest.mark.parametrize("criterion", ["taylor", "snip", "movement"])
def test_gradients_are_needed_before_the_first_update(criterion: Any) -> None:
    model = one_layer()
    with pytest.raises(CallbackError, match=f"criterion '{criterion}' needs the gradients of a step"):
        attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            [GradualPruning(sparsity=0.5, start=0, end=1, criterion=criterion)],
        )
    assert set(model.state_dict()) == {"weight"}


def test_wrong_criteria_are_refused() -> None:
    for name, message in (("magnitudes", "no criterion named"), ("soft_movement", "SoftMovementPruning")):
        wrong: Any = name
        with pytest.raises(ConfigError, match=message):
            GradualPruning(sparsity=0.5, criterion=wrong)
    silent = nn.Linear(2, 2)
    pruning = GradualPruning(sparsity=0.5, start=0, end=0, criterion=Snip(batches=[torch.ones(1, 2)]))
    with pytest.raises(CallbackError, match="Snip needs the loss of Linear"):
        attach(silent, torch.optim.SGD(silent.parameters(), lr=0.1), [pruning])


def test_a_name_in_use_is_refused() -> None:
    model = one_layer()
    model.register_buffer("weight_scores", torch.zeros(3))
    with pytest.raises(CallbackError, match="weight has a weight_scores beside it already"):
        attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), [GradualPruning(sparsity=0.5, criterion="taylor")],
            total_steps=9,
        )  # fmt: skip
    assert set(model.state_dict()) == {"weight", "weight_scores"}
