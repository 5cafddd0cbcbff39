"""Size attributes of the user's own modules are found by trial, verified by numbers, or refused with the line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import torchopt_passes as top
from tests.graph.pruning.source_plans import (
    BERT_READERS,
    GPT2_READERS,
    bert_plan,
    gpt2_plan,
    masked,
    plan_of,
    remove,
)
from tests.hf_models import MODELS
from torchopt_passes.graph.pruning import RemoveIndices, ResizeAttribute
from torchopt_passes.graph.pruning.attributes import find_attributes
from torchopt_passes.graph.tracing import no_cache
from torchopt_passes.graph.verify import in_eval_mode, relative_error


class Attention(nn.Module):
    """Attention with its sizes as numbers: heads, features of a head, and the width of all heads together."""

    def __init__(self, *, scale_by_head_dim: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.inner = 16, 4, 4, 16
        self.scale_by_head_dim = scale_by_head_dim
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).split(self.inner, dim=-1)
        q, k, v = (t.view(n, length, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        scale = self.head_dim**-0.5 if self.scale_by_head_dim else 0.5
        x = ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(**options) for _ in range(3))
        self.num_heads, self.depth = 4, 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def cut(path: str, rows: list[int]) -> list[RemoveIndices]:
    inside = [16 * part + row for part in range(3) for row in rows]
    return [
        remove(f"{path}.qkv.weight", 0, inside, 48),
        remove(f"{path}.qkv.bias", 0, inside, 48),
        remove(f"{path}.out.weight", 1, rows, 16),
    ]


def found_and_right(model: nn.Module, edits: list[RemoveIndices], inputs: Any, expected: nn.Module, **more: Any) -> Any:
    """Find the attributes, apply the whole plan, and compare; return them as path -> (old, new)."""
    args, kwargs = inputs
    args, kwargs = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    expected = copy.deepcopy(expected).double()
    with no_cache(expected), in_eval_mode(expected):
        outputs = pytree.tree_leaves(expected(*args, **kwargs))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = find_attributes(model, edits, inputs, outputs, **more)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items()), "the source was touched"
    model = copy.deepcopy(model).double()
    top.Plan((*edits, *attributes)).apply(model)
    with no_cache(model), in_eval_mode(model):
        assert relative_error(pytree.tree_leaves(model(*args, **kwargs)), outputs) < 1e-9
    return {edit.target: (edit.old, edit.new) for edit in attributes}


def test_heads_of_the_users_own_attention() -> None:
    model, x = Model(), torch.randn(2, 5, 16)
    edits = [edit for layer in (0, 2) for edit in cut(f"blocks.{layer}", [4, 5, 6, 7])]
    expected = masked(model, plan_of(*edits), "out.weight")
    found = found_and_right(model, edits, ((x,), {}), expected)
    assert found == {
        f"blocks.{layer}.{name}": sizes
        for layer in (0, 2)
        for name, sizes in (("num_heads", (4, 3)), ("inner", (16, 12)))
    }


def test_features_of_every_head() -> None:
    model, x = Model(), torch.randn(2, 5, 16)
    edits = cut("blocks.1", [4 * head + place for head in range(4) for place in (0, 3)])
    expected = copy.deepcopy(model)
    with torch.no_grad():
        rows = [i for edit in edits[:1] for i in edit.indices if i < 32]
        expected.blocks[1].qkv.weight[rows] = 0  # pyright: ignore
        expected.blocks[1].qkv.bias[rows] = 0  # pyright: ignore
        expected.blocks[1].out.weight[:, list(edits[2].indices)] = 0  # pyright: ignore
    found = found_and_right(model, edits, ((x,), {}), expected)
    assert found == {"blocks.1.head_dim": (4, 2), "blocks.1.inner": (16, 8)}


def test_what_no_attribute_can_mend_is_refused_with_the_line() -> None:
    """The scale follows from `head_dim`, so no value of it computes what the masked model does."""
    model, x = Model(scale_by_head_dim=True), torch.randn(2, 5, 16)
    edits = cut("blocks.1", [4 * head + place for head in range(4) for place in (0, 3)])
    with pytest.raises(top.PlanError, match=r"test_source_attributes.py:\d+ \(.*split.*captured graph"):
        find_attributes(model, edits, ((x,), {}), [torch.zeros(2, 5, 16)])
    assert model.blocks[1].head_dim == 4 and model.blocks[1].qkv.weight.shape == (48, 16)  # pyright: ignore


def test_a_number_in_the_code_is_refused_with_the_line() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).view(-1, 8))

    edits = [remove("up.weight", 0, (1, 2), 8), remove("up.bias", 0, (1, 2), 8), remove("down.weight", 1, (1, 2), 8)]
    with pytest.raises(top.PlanError, match=r"view\(-1, 8\).*read its size from tensors"):
        find_attributes(Fixed(), edits, ((torch.ones(5, 4),), {}), [torch.ones(5, 4)])


def test_layers_without_tensors_are_told() -> None:
    """`Unflatten`, a norm without weights, and a view of the user's own hold sizes of what other layers lost."""

    class View(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, self.width)

    model = nn.Sequential(
        nn.Linear(6, 12),
        nn.Unflatten(1, (3, 4)),
        nn.Flatten(),
        View(12),
        nn.GroupNorm(3, 12, affine=False),
        nn.Linear(12, 5),
    )
    gone = [4, 5, 6, 7]
    edits = [remove("0.weight", 0, gone, 12), remove("0.bias", 0, gone, 12), remove("5.weight", 1, gone, 12)]
    expected = masked(model, plan_of(*edits), "5.weight")
    found = found_and_right(model, edits, ((torch.randn(7, 6),), {}), expected)
    assert found["1.unflattened_size"] == ((3, 4), (2, 4)) and found["3.width"] == (12, 8)
    assert found["4.num_groups"] == (3, 2)


def test_hints_say_how_many_heads_stay() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.lin, self.out = 4, nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lin(x).view(len(x), self.h, 2).flatten(1))

    model, x = Bare(), torch.randn(5, 8)
    edits = [remove("lin.weight", 0, (2, 3), 8), remove("lin.bias", 0, (2, 3), 8), remove("out.weight", 1, (2, 3), 8)]
    expected = masked(model, plan_of(*edits), "out.weight")
    assert found_and_right(model, edits, ((x,), {}), expected, counts={"lin.weight": {4: 3}}) == {"h": (4, 3)}
    assert found_and_right(model, edits, ((x,), {}), expected) == {"h": (4, 3)}


def test_nothing_is_set_where_nothing_is_needed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    edits = [remove("0.weight", 0, (1, 2), 8), remove("0.bias", 0, (1, 2), 8), remove("2.weight", 1, (1, 2), 8)]
    expected = masked(model, plan_of(*edits), "2.weight")
    assert found_and_right(model, edits, ((torch.randn(3, 4),), {}), expected) == {}


def test_the_configuration_is_told_what_all_layers_lost_alike() -> None:
    model = MODELS["bert"].build().eval()
    for layers, told in (((0, 1), {"config.intermediate_size": (32, 29)}), ((1,), {})):
        plan = bert_plan(model, (0,), (3, 4, 5), layers)
        edits = [edit for edit in plan.edits if isinstance(edit, RemoveIndices)]
        found = found_and_right(model, edits, MODELS["bert"].case(2), masked(model, plan, *BERT_READERS))
        assert {target: sizes for target, sizes in found.items() if target.startswith("config")} == told


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_models(name: str) -> None:
    model = MODELS[name].build().eval()
    inputs = MODELS[name].case(2)
    plan = bert_plan(model, (0, 2), (3, 4, 5), (0,)) if name == "bert" else gpt2_plan(model, (1,), (0, 9))
    readers = BERT_READERS if name == "bert" else GPT2_READERS
    edits = [edit for edit in plan.edits if isinstance(edit, RemoveIndices)]
    by_hand = {edit.target: (edit.old, edit.new) for edit in plan.edits if isinstance(edit, ResizeAttribute)}
    assert found_and_right(model, edits, inputs, masked(model, plan, *readers)) == by_hand


def test_phi3_reads_its_heads_from_the_configuration() -> None:
    model = MODELS["phi3"].build().eval()
    edits: list[RemoveIndices] = []
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        edits.append(remove(f"{path}.qkv_proj.weight", 0, [*range(8), *range(16, 20), *range(24, 28)], 32))
        edits.append(remove(f"{path}.o_proj.weight", 1, range(8), 16))
    found = found_and_right(model, edits, MODELS["phi3"].case(2), masked(model, plan_of(*edits), "o_proj.weight"))
    assert found["config.num_attention_heads"] == (4, 2) and found["model.layers.1.self_attn.num_key_value_heads"] == (
        2,
        1,
    )
    half = found_and_right  # one layer alone cannot be told through the shared configuration
    with pytest.raises(top.PlanError, match="captured graph"):
        half(model, edits[:2], MODELS["phi3"].case(2), masked(model, plan_of(*edits[:2]), "o_proj.weight"))


class Dead(nn.Module):
    """Computes a branch that nothing reads, as the last layer of a WaveNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.rest = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        self.rest(hidden)
        return self.down(hidden)


def test_code_that_no_output_depends_on_is_named() -> None:
    model, x = Dead().eval(), torch.randn(3, 6)
    graph_module = top.capture(model, (x,))
    result = top.PruneChannels(ratio=0.5)(graph_module)
    assert result.report.proof.status == "proven"
    assert tuple(result.graph_module.get_parameter("up.weight").shape) == (4, 6)
    why = r"No output depends on rest.weight, rest.bias: take that code out of the source"
    with pytest.raises(top.PlanError, match=why):
        result.plan.apply(copy.deepcopy(model))
