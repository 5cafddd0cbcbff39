"""Masks of torch.nn.utils.prune: every method there against ours, both ways, captured, and made permanent."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import torchopt_passes as top
from torchopt_passes.errors import ConfigError, PlanError

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7))


def torch_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    suffix = "weight_mask"
    return {name[: -len("_mask")]: b.bool() for name, b in model.named_buffers() if name.endswith(suffix)}


def our_masks(model: nn.Module, context: top.PassContext | None = None, **options: object) -> dict[str, torch.Tensor]:
    plan = top.PruneWeights(**options).plan(top.capture(model, (X,)), context)  # type: ignore[arg-type]
    return {edit.target: edit.mask for edit in plan.edits if isinstance(edit, top.MaskWeights)}


def on_both(apply: Callable[[nn.Module], object]) -> dict[str, torch.Tensor]:
    model = net()
    for layer in (model[0], model[3]):  # type: ignore[index]
        apply(layer)
    return torch_masks(model)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() == {"0.weight", "3.weight"}
    for name, mask in ours.items():
        assert torch.equal(mask, theirs[name]), name


@pytest.mark.parametrize("amount", [0.1, 0.33, 0.5, 0.77, 0.9])
def test_l1_unstructured_masks_the_same_weights(amount: float) -> None:
    theirs = on_both(lambda m: prune.l1_unstructured(m, "weight", amount))
    # halves (0.5 of 135, 0.1 of 135 is 13.5) are rounded to even there and up here, on purpose: count= says which
    n = 135
    if round(amount * n) == int(amount * n + 0.5):
        assert_same(our_masks(net(), sparsity=amount), theirs)
    for name, size in (("0.weight", 135), ("3.weight", 560)):
        mask = our_masks(net(), count=round(amount * size), include=(name,))[name]
        assert torch.equal(mask, theirs[name])


def test_halves_are_rounded_up_here_and_to_even_there() -> None:
    for n, ours, theirs in ((5, 3, 2), (7, 4, 4)):
        layer = prune.l1_unstructured(nn.Linear(n, 1, bias=False), "weight", 0.5)
        assert int((layer.weight_mask == 0).sum()) == theirs
        plan = top.PruneWeights(sparsity=0.5).plan(top.capture(nn.Linear(n, 1, bias=False), (torch.ones(2, n),)))
        assert plan.edits[0].numbers["removed"] == ours


def test_ties_go_in_the_order_of_memory() -> None:
    layer = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 1, 1, 2, 1], [1, 1, 3, 1, 1, 1]]))
    theirs = prune.l1_unstructured(copy.deepcopy(layer), "weight", amount=5).weight_mask.bool()
    plan = top.PruneWeights(count=5).plan(top.capture(layer, (torch.ones(2, 6),)))
    assert isinstance(plan.edits[0], top.MaskWeights)
    ours = plan.edits[0].mask
    assert (~ours).flatten().nonzero().flatten().tolist() == [0, 2, 3, 5, 6]
    assert int((~ours).sum()) == int((~theirs).sum())
    assert bool((layer.weight[~theirs] == 1).all())  # torch removes five of the same nine, in no promised order


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("order", [1, 2, float("inf"), float("-inf"), 0, 3])
def test_ln_structured_masks_the_same_slices(order: float, dim: int) -> None:
    if order == 0:  # a norm of 0 counts non-zeros: without zeros all are equal, and torch's order of ties is its own
        model = net()
        with torch.no_grad():
            for layer in (model[0], model[3]):  # type: ignore[index]
                layer.weight *= torch.arange(layer.weight.numel()).view_as(layer.weight) % 7 > 2
                layer.weight.select(dim, 1).fill_(1.0)
        counts = [int((p != 0).flatten().sum()) for p in model.parameters()]
        assert counts[0] > 0
        masks = our_masks(model, count=1, pattern=f"dim {dim}", method="lp:0")
        for name, mask in masks.items():
            rows = model.get_parameter(name).detach().movedim(dim, 0).flatten(1)
            least = (rows != 0).sum(1).min()
            gone = ~mask.movedim(dim, 0).flatten(1)[:, 0]
            assert int(gone.sum()) == 1 and int((rows[gone] != 0).sum()) == int(least)
        return
    theirs = on_both(lambda m: prune.ln_structured(m, "weight", 0.4, n=order, dim=dim))  # type: ignore[arg-type]
    ours = our_masks(net(), sparsity=0.4, pattern=f"dim {dim}", method=f"lp:{order}")
    # 0.4 of 5, 7, 80 and 3 slices is no half
    assert_same(ours, theirs)


def test_the_magnitude_of_slices_is_their_l1_norm() -> None:
    theirs = on_both(lambda m: prune.ln_structured(m, "weight", 2, n=1, dim=0))
    assert_same(our_masks(net(), count=2, pattern="dim 0"), theirs)


@pytest.mark.parametrize("amount", [0.25, 0.6])
def test_random_methods_remove_as_many(amount: float) -> None:
    theirs = on_both(lambda m: prune.random_unstructured(m, "weight", amount))
    ours = our_masks(net(), sparsity=amount, method="random")
    assert {k: int(v.sum()) for k, v in ours.items()} == {k: int(v.sum()) for k, v in theirs.items()}
    theirs = on_both(lambda m: prune.random_structured(m, "weight", amount, dim=1))
    ours = our_masks(net(), sparsity=amount, method="random", pattern="dim 1")
    for name, mask in ours.items():
        assert int(mask.sum()) == int(theirs[name].sum())
        columns = mask.movedim(1, 0).flatten(1)
        assert bool((columns.all(1) | ~columns.any(1)).all()), "whole slices"
    again = our_masks(net(), sparsity=amount, method="random", pattern="dim 1")
    other = our_masks(net(), top.PassContext(seed=1), sparsity=amount, method="random", pattern="dim 1")
    assert torch.equal(ours["3.weight"], again["3.weight"])
    assert not torch.equal(ours["3.weight"], other["3.weight"])


@pytest.mark.parametrize("amount", [0.31, 200])
def test_global_unstructured_masks_the_same_weights(amount: float) -> None:
    model = net()
    parameters = [(model[0], "weight"), (model[3], "weight")]  # type: ignore[index]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=amount)
    share = {"count": amount} if isinstance(amount, int) else {"sparsity": amount}
    assert_same(our_masks(net(), scope="global", **share), torch_masks(model))
    random = our_masks(net(), scope="global", method="random", **share)
    assert sum(int((~m).sum()) for m in random.values()) == sum(int((~m).sum()) for m in torch_masks(model).values())


def test_scores_of_the_context_are_importance_scores() -> None:
    scores = torch.randn(7, 80, generator=torch.Generator().manual_seed(5))
    model = net()
    prune.l1_unstructured(model[3], "weight", 0.35, importance_scores=scores)  # type: ignore[index]
    ours = our_masks(net(), top.PassContext(scores={"3.weight": scores}), sparsity=0.35, include=("3.weight",))
    assert torch.equal(ours["3.weight"], torch_masks(model)["3.weight"])
    for wrong, words in (({"3.wieght": scores}, "3.wieght"), ({"3.weight": scores[0]}, "have shape")):
        with pytest.raises(ConfigError, match=words):
            our_masks(net(), top.PassContext(scores=wrong), sparsity=0.35)


def test_a_share_counts_zeros_where_torch_counts_what_is_left() -> None:
    def twice(layer: nn.Module) -> None:
        prune.l1_unstructured(layer, "weight", 0.2)
        prune.l1_unstructured(layer, "weight", 0.25)  # of the 0.8 that are left

    assert_same(our_masks(net(), sparsity=1 - 0.8 * 0.75), on_both(twice))


def test_identity_and_custom_masks_are_written_as_torch_writes_them() -> None:
    ours, theirs = net(), net()
    masks = {"0.weight": torch.ones(5, 3, 3, 3, dtype=torch.bool), "3.weight": torch.rand(7, 80) > 0.3}
    prune.identity(theirs[0], "weight")  # type: ignore[index]
    prune.custom_from_mask(theirs[3], "weight", masks["3.weight"])  # type: ignore[index]
    plan = top.Plan(tuple(top.MaskWeights(target=name, reason="mine", mask=mask) for name, mask in masks.items()))
    before = dict(ours.named_parameters())
    top.to_torch_prune(plan, ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert ours[3].weight_orig is before["3.weight"]  # type: ignore[index]
    assert torch.equal(ours(X), theirs(X))
    assert prune.is_pruned(ours)
    read = top.from_torch_prune(ours)
    assert read.to_json() == top.from_torch_prune(theirs).to_json()
    assert {e.target: torch.equal(e.mask, masks[e.target]) for e in read.edits} == {"0.weight": True, "3.weight": True}  # type: ignore[attr-defined]
    json, tensors = read.to_json(), read.tensors()
    assert top.Plan.from_json(json, tensors).to_json() == json


def test_remove_leaves_the_model_that_prune_remove_leaves() -> None:
    ours, theirs = net(), net()
    for model in (ours, theirs):
        prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
        prune.ln_structured(model[0], "weight", 1, n=2, dim=0)  # type: ignore[index]
        prune.random_unstructured(model[3], "bias", 0.4)  # type: ignore[index]
        prune.l1_unstructured(model[3], "weight", 0.9)  # type: ignore[index]
    theirs.load_state_dict(ours.state_dict())  # the random mask too
    names, originals = set(net().state_dict()), {id(p) for p in ours.parameters()}
    plan = top.remove_torch_prune(ours)
    for layer, name in ((theirs[0], "weight"), (theirs[3], "bias"), (theirs[3], "weight")):  # type: ignore[index]
        prune.remove(layer, name)
    assert not prune.is_pruned(ours)
    assert set(ours.state_dict()) == names and {n for n, _ in ours.named_parameters()} == names
    assert {id(p) for p in ours.parameters()} == originals and all(p.requires_grad for p in ours.parameters())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not any(bool((p.signbit() & (p == 0)).any()) for p in ours.parameters()), "no negative zeros"
    assert [edit.target for edit in plan.edits] == ["0.weight", "3.bias", "3.weight"]
    assert torch.equal(plan.apply(net())(X), ours(X))  # a fresh model takes the plan
    # what carries no hooks any more is read by its zeros, biases apart
    assert {e.target: e.numbers["removed"] for e in top.from_torch_prune(theirs).edits} == {
        e.target: e.numbers["removed"] for e in plan.edits if e.target != "3.bias"
    }
    assert not top.from_torch_prune(net())
    assert "0 changed" not in str(top.PruneWeights(sparsity=0.95)(top.capture(ours, (X,))).report)


def test_a_round_trip_trains_as_torch_trains() -> None:
    theirs = net()
    prune.global_unstructured(
        [(theirs[0], "weight"), (theirs[3], "weight")],  # type: ignore[index]
        prune.L1Unstructured,
        amount=0.6,
    )
    ours = top.to_torch_prune(top.from_torch_prune(theirs), net())
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_capture_of_a_hooked_model_is_exact_and_trains_the_originals(training: bool) -> None:
    model = net().train(training)
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    prune.ln_structured(model[3], "weight", 0.3, n=2, dim=0)  # type: ignore[index]
    graph_module = top.capture(model, (X,))  # the warning of export would be an error here
    assert torch.equal(graph_module(X), model(X))
    graph_module(X).sum().backward()
    original = model[3].weight_orig  # type: ignore[index]
    assert graph_module.get_parameter("3.weight_orig") is original
    assert bool((original.grad[model[3].weight_mask == 0] == 0).all())  # type: ignore[index]
    assert isinstance(model[3].weight, torch.Tensor) and torch.equal(graph_module(X), model(X))  # type: ignore[index]
    reasons = [row for row in top.PruneWeights(sparsity=0.5).plan(graph_module).skips if row.target == "3.weight_orig"]
    assert "remove_torch_prune" in reasons[0].reason


class Mask(nn.Module):
    """The parametrization of torch.ao.pruning's sparsifiers."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.mask * weight


def test_masks_of_parametrizations() -> None:
    model, masks = net(), [torch.rand(5, 3, 3, 3) > 0.5, (torch.rand(7, 80) > 0.5).float()]
    parametrize.register_parametrization(model[0], "weight", Mask(masks[0]))  # type: ignore[index]
    parametrize.register_parametrization(model[3], "weight", Mask(masks[1]))  # type: ignore[index]
    original = model[0].parametrizations.weight.original  # type: ignore[index]
    expected = model(X)
    assert torch.equal(top.capture(model, (X,))(X), expected)
    plan = top.remove_torch_prune(model)
    assert [torch.equal(e.mask, m.bool()) for e, m in zip(plan.edits, masks, strict=True)] == [True, True]  # type: ignore[attr-defined]
    assert not parametrize.is_parametrized(model)
    assert model[0].weight is original and torch.equal(model(X), expected)  # type: ignore[index]
    assert torch.equal(plan.apply(net())(X), expected)


def test_sparsifiers_of_torch_ao() -> None:
    from torch.ao.pruning import WeightNormSparsifier

    model = net()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "3.weight"}])
    sparsifier.step()
    plan = top.from_torch_prune(model)
    assert [(e.target, e.numbers["sparsity"]) for e in plan.edits] == [("3.weight", 0.25)]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model, mask = Tied(), torch.rand(4, 4) > 0.5
    plan = top.Plan((top.MaskWeights(target="a.weight", reason="mine", mask=mask),))
    top.to_torch_prune(plan, model)
    assert model.a.weight_orig is model.b.weight_orig
    assert torch.equal(model.b.weight != 0, mask)
    assert [e.target for e in top.from_torch_prune(model).edits] == ["a.weight"]
    model.b.weight_mask.fill_(1)
    with pytest.raises(PlanError, match=r"a\.weight and b\.weight are one parameter with two masks"):
        top.from_torch_prune(model)


def test_what_is_no_mask() -> None:
    layer = prune.custom_from_mask(nn.Linear(2, 2), "weight", torch.tensor([[0.5, 1], [1, 0]]))
    with pytest.raises(PlanError, match="more than 0 and 1"):
        top.remove_torch_prune(layer)
    assert prune.is_pruned(layer)
    ones = torch.ones(3, 2, dtype=torch.bool)
    for edit, words in (
        (top.MaskWeights(target="weight", reason="", mask=ones), "has shape"),
        (top.MaskWeights(target="wieght", reason="", mask=ones), "close names"),
        (top.RemoveIndices(target="weight", reason="", dim=0, indices=(0,), size=2), "masks alone"),
    ):
        with pytest.raises(PlanError, match=words):
            top.to_torch_prune(top.Plan((edit,)), nn.Linear(2, 2))
    embedding = nn.Embedding(4, 3, padding_idx=0)
    adapter = nn.Linear(3, 3)
    nn.init.zeros_(adapter.weight)
    plan = top.from_torch_prune(nn.ModuleList([embedding, adapter]))
    assert not plan.edits and [s.target for s in plan.skips] == ["1.weight"]


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "method": "lp:2"},
        {"sparsity": 0.5, "method": "lp:nan", "pattern": "dim 0"},
        {"sparsity": 0.5, "method": "l2", "pattern": "dim 0"},
        {"sparsity": 0.5, "pattern": "dim 0", "scope": "global"},
        {"sparsity": 0.5, "count": 3},
        {"count": -1},
        {"threshold": 0.5, "pattern": "dim 0"},
        {"sparsity": 0.5, "pattern": "dim x"},
    ],
)
def test_options_that_contradict(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        top.PruneWeights(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_reported() -> None:
    graph_module = top.capture(net(), (X,))
    plan = top.PruneWeights(count=200).plan(graph_module)
    assert [e.target for e in plan.edits] == ["3.weight"]
    assert "more than the 135" in next(s.reason for s in plan.skips if s.target == "0.weight")
    plan = top.PruneWeights(sparsity=0.5, pattern="dim 3").plan(graph_module)
    assert "does not fit" in next(s.reason for s in plan.skips if s.target == "3.weight")
    with pytest.raises(ConfigError, match="more than the 695"):
        top.PruneWeights(count=700, scope="global").plan(graph_module)
