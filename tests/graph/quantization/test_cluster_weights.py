"""ClusterWeights: what is stored, what it computes, how it trains, and where it goes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import torchopt_passes as top
from tests import models
from tests.hf_models import MODELS
from torchopt_passes import ClusterWeights
from torchopt_passes.errors import ConfigError, PlanError
from torchopt_passes.functional.packing import pack, unpack
from torchopt_passes.graph.quantization import StoreCodebook
from torchopt_passes.graph.quantization.codebook_weight import Layout, decode
from torchopt_passes.graph.quantization.input_moments import input_moments

OPTIONS: list[dict[str, Any]] = [
    {},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 12},
    {"outliers": 0.05},
    {"grid": "power_of_two", "bits": 4},
    {"grid": "log", "bits": 4},
]


def build(name: str) -> tuple[Any, tuple[torch.Tensor]]:
    return models.build(name)


class Wide(nn.Module):
    """Layers large enough for every granularity to shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 3)
        self.fc = nn.Linear(8, 64)
        self.out = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.norm(self.conv(x))))
        return self.out(torch.relu(self.fc(x.mean((2, 3)))))


def wide() -> tuple[Any, tuple[torch.Tensor]]:
    torch.manual_seed(1)
    return Wide().eval(), (torch.randn(3, 3, 9, 9),)


def edits(plan: top.Plan) -> dict[str, StoreCodebook]:
    return {edit.target: edit for edit in plan.edits if isinstance(edit, StoreCodebook)}


def slow_weight(edit: StoreCodebook) -> torch.Tensor:
    """What an edit stands for, one weight at a time."""
    layout = edit.layout
    codes = unpack(edit.indices, edit.bits, layout.groups * layout.size).tolist()
    flat: dict[tuple[int, ...], float] = {}
    count: dict[int, int] = {}
    for place in torch.cartesian_prod(*[torch.arange(n) for n in edit.shape]).reshape(-1, len(edit.shape)).tolist():
        channel = 0 if edit.channel_dim is None else place[edit.channel_dim]
        position = count.get(channel, 0)
        count[channel] = position + 1
        group = channel * layout.per_channel + (position // layout.group_size if layout.group_size else 0)
        code = codes[group * layout.size + (position % layout.group_size if layout.group_size else position)]
        code -= edit.keep_zero
        flat[tuple(place)] = 0.0 if code < 0 else float(edit.codebook[group, code])
    weight = torch.tensor([flat[place] for place in sorted(flat)]).view(edit.shape)
    if edit.outliers is not None and edit.outlier_values is not None:
        for position, value in zip(edit.outliers.tolist(), edit.outlier_values.tolist(), strict=True):
            weight.view(-1)[position] = value
    return weight


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_result_is_the_model_with_snapped_floats(options: dict[str, Any]) -> None:
    model, inputs = wide()
    snapped = copy.deepcopy(model)
    graph = top.capture(model, inputs)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapped.requires_grad_(False)
    every: dict[str, Any] = {"bits": 2, "min_numel": 16, **options}
    result = ClusterWeights(**every)(graph)
    assert result.report.proof.status == "proven" and result.report.proof.error == 0
    found = edits(result.plan)
    assert {"conv.weight", "up.weight", "fc.weight"} <= found.keys()
    for fqn, edit in found.items():
        parameter = snapped.get_parameter(fqn)
        parameter.data.copy_(slow_weight(edit))
        error = (weights[fqn] - parameter).square().sum() / weights[fqn].square().sum()
        assert edit.numbers["sqnr_db"] == pytest.approx(-10 * math.log10(float(error)), abs=1e-3)
        assert edit.numbers["bytes_before"] == weights[fqn].nbytes > edit.numbers["bytes_after"]
    result.plan.apply(model)
    with torch.no_grad():
        expected = snapped(*inputs)
        assert torch.equal(model(*inputs), expected) and torch.equal(graph.eval()(*inputs), expected)
    assert set(model.state_dict()) == set(graph.state_dict())
    assert not any(name in model.state_dict() for name in found)
    assert {"norm.weight", "norm.running_mean", "fc.bias"} <= model.state_dict().keys()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_size_falls_by_32_over_b(bits: int, tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(512, 512, bias=False))
    graph = top.capture(model, (torch.randn(2, 512),))
    before = model[0].weight.nbytes
    plan = ClusterWeights(bits=bits)(graph).plan
    plan.apply(model)
    for name, module in (("graph", graph), ("module", model)):
        state = module.state_dict()
        assert sum(t.nbytes for t in state.values()) <= before * bits / 32 * 1.05
        save_file(state, tmp_path / name)
        assert (tmp_path / name).stat().st_size <= before * bits / 32 * 1.05
    assert edits(plan)["0.weight"].numbers["bytes_after"] == sum(t.nbytes for t in graph.state_dict().values())


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_the_gradient_of_the_codebook_is_summed_over_the_cluster(options: dict[str, Any]) -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    plan = ClusterWeights(bits=2, min_numel=16, **options)(graph).plan
    dense = copy.deepcopy(model)
    for fqn, edit in edits(plan).items():
        dense.get_parameter(fqn).data.copy_(edit.snapped())
    plan.apply(model)
    for module in (dense, graph.eval(), model):
        module(*inputs).square().sum().backward()
    for fqn, edit in edits(plan).items():
        full = dense.get_parameter(fqn).grad
        assert full is not None
        inside = torch.ones(edit.shape)
        path, _, name = fqn.rpartition(".")
        names = [f"{path}.parametrizations.{name}.original{i}" for i in range(1 if edit.outliers is None else 2)]
        if edit.outliers is not None:
            inside.view(-1)[edit.outliers.long()] = 0
        rows = edit.layout.to_rows(full * inside)
        codes = unpack(edit.indices, edit.bits, rows.numel()).view(rows.shape)
        expected = torch.zeros_like(edit.codebook)
        for group, row in enumerate(rows.tolist()):
            filled = edit.layout.size * edit.layout.per_channel - math.prod(edit.shape) // max(edit.shape[0], 1)
            last = edit.layout.padded and (group + 1) % edit.layout.per_channel == 0
            for value, code in list(zip(row, codes[group].tolist(), strict=True))[: -filled if last else None]:
                if code >= edit.keep_zero:
                    expected[group, code - edit.keep_zero] += value
        if edit.channel_dim in (None, 0):
            for module in (graph, model):
                torch.testing.assert_close(module.get_parameter(names[0]).grad, expected, rtol=1e-4, atol=1e-4)
                if edit.outliers is not None:
                    got = module.get_parameter(names[1]).grad
                    torch.testing.assert_close(got, full.view(-1)[edit.outliers.long()])


def test_fine_tuning_keeps_clusters_and_zeros() -> None:
    model, _ = build("conv_residual")
    y = torch.randint(0, 5, (32,))
    x = torch.randn(32, 3, 12, 12) * 0.3 + torch.randn(5, 3, 1, 1)[y]
    graph = top.capture(model, (x,))
    top.PruneWeights(sparsity=0.5)(graph)
    zeros = {name: (p == 0).detach().clone() for name, p in graph.named_parameters() if p.ndim > 1}
    plan = ClusterWeights(bits=3, min_numel=16)(graph).plan
    optimizer = torch.optim.AdamW(graph.parameters(), lr=2e-2, weight_decay=0.01)
    losses: list[float] = []
    graph.train()
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(graph(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    plan.apply(model)
    before = {fqn: edit.codebook for fqn, edit in edits(plan).items()}
    assert top.release(graph) is model  # the trained codebooks go to the source
    assert zeros.keys() == before.keys()
    for fqn, mask in zeros.items():
        weight = model.get_submodule(fqn.rpartition(".")[0]).weight
        assert isinstance(weight, torch.Tensor)
        assert len(weight.unique()) <= 8 and bool((weight[mask] == 0).all())
        codebook = model.get_parameter(fqn.replace(".weight", ".parametrizations.weight.original0"))
        assert not torch.equal(codebook, before[fqn])


def level_of(weight: torch.Tensor, edit: StoreCodebook) -> dict[int, torch.Tensor]:
    """Return the values of a weight by the index that the plan gave them; one value each, if clusters are kept."""
    index = unpack(edit.indices, edit.bits, weight.numel()).view(weight.shape)
    return {int(k): weight[index == k].unique() for k in index.unique()}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])  # CQAT, PCQAT
@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_quantization_aware_training_keeps_clusters_and_zeros(target: str, sparsity: float) -> None:
    """Every index keeps one level through training; pruned weights stay exactly 0, in float and in int8."""
    from torchopt_passes import ConvertQuantized, InsertFakeQuant, QuantizationSchedule, attach

    model, _ = build("conv_residual")
    x, y = torch.randn(32, 3, 12, 12), torch.randint(0, 5, (32,))
    graph = top.capture(model, (x,))
    if sparsity:
        top.PruneWeights(sparsity=sparsity)(graph)
    zeros = {name: (p == 0).detach().clone() for name, p in graph.named_parameters() if p.ndim > 1}
    plan = ClusterWeights(bits=3, min_numel=16)(graph).plan
    InsertFakeQuant(target=target)(graph)
    optimizer = torch.optim.SGD(graph.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2)
    graph.train()
    with attach(graph, optimizer, [QuantizationSchedule()], total_steps=8):
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(graph(x), y).backward()
            optimizer.step()
    # the trained codebooks, as the floats they stand for
    twin = copy.deepcopy(model)
    plan.apply(twin).load_state_dict(graph.state_dict(), strict=False)
    converted = ConvertQuantized()(graph.eval()).graph_module
    for fqn, edit in edits(plan).items():
        weight = twin.get_submodule(fqn.rpartition(".")[0]).weight
        assert isinstance(weight, torch.Tensor)
        levels = level_of(weight.detach(), edit)
        assert all(len(values) == 1 for values in levels.values()) and 2 < len(levels) <= 8
        moved = torch.cat(list(levels.values())) - torch.cat(list(level_of(edit.snapped(), edit).values()))
        assert float(moved.abs().max()) > 1e-4, "levels train"
        integers = converted.get_buffer(fqn)
        assert integers.dtype is torch.int8
        if sparsity:
            assert bool((weight[zeros[fqn]] == 0).all()) and bool((integers[zeros[fqn]] == 0).all())
            assert float((integers == 0).float().mean()) >= sparsity - 0.02
        # a scale for each channel: in each, a level is one integer
        index = unpack(edit.indices, edit.bits, integers.numel()).view(integers.shape)
        for row, indices in zip(integers, index, strict=True):
            assert all(len(row[indices == k].unique()) == 1 for k in indices.unique())


def test_levels_of_a_grid_do_not_train() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    plan = ClusterWeights(grid="power_of_two", min_numel=16)(graph).plan
    plan.apply(model)
    for module in (graph, model):
        codebook = module.get_parameter("fc.parametrizations.weight.original0")
        assert not codebook.requires_grad
        exponents = codebook.abs().log2()
        assert torch.equal(exponents, exponents.round())


def test_tied_frozen_and_called_twice() -> None:
    model, inputs = build("tied_twice")
    graph = top.capture(model, inputs)
    plan = ClusterWeights(bits=2, min_numel=16)(graph).plan
    plan.apply(model)
    assert len(plan.edits) == 4
    for module in (graph, model):
        first = module.get_parameter("embed.parametrizations.weight.original0")
        assert module.get_parameter("head.parametrizations.weight.original0") is first
        assert not module.get_parameter("frozen.parametrizations.weight.original0").requires_grad
        assert module.get_parameter("block.parametrizations.weight.original0").requires_grad
    assert type(model.embed) is not nn.Embedding and issubclass(type(model.embed), nn.Embedding)
    twin: Any = copy.deepcopy(model)
    assert twin.embed.parametrizations.weight is twin.head.parametrizations.weight
    assert twin.embed.parametrizations.weight is not model.embed.parametrizations.weight
    with torch.no_grad():
        assert torch.equal(twin.eval()(*inputs), model.eval()(*inputs))


def test_assigning_a_dense_weight_takes_the_means_of_its_clusters() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    edit = edits(ClusterWeights(bits=2, min_numel=16, outliers=0.05).plan(graph))["fc.weight"]
    top.Plan((edit,)).apply(model)
    new = torch.randn(64, 8)
    model.fc.weight = new
    codes = unpack(edit.indices, 2, 512).long()
    inside = torch.ones(512, dtype=torch.bool)
    assert edit.outliers is not None
    for code in range(4):
        own = codes == code
        expected = new.view(-1)[own].mean()
        torch.testing.assert_close(model.fc.parametrizations.weight.original0[0, code].detach(), expected)
    inside[edit.outliers.long()] = False
    assert torch.equal(model.fc.weight.view(-1)[~inside], new.view(-1)[~inside])


def test_saved_and_restored(tmp_path: Path) -> None:
    model, inputs = wide()
    fresh = copy.deepcopy(model)
    graph = top.capture(model, inputs)
    result = ClusterWeights(bits=3, min_numel=16, outliers=0.02)(graph)
    plan = top.Plan.load(result.plan.save(tmp_path / "plan"))
    result.plan.apply(model)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(1.1)
        expected = graph.eval()(*inputs)
        save_file(graph.state_dict(), tmp_path / "model.safetensors")
        plan.apply(fresh).load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(fresh(*inputs), expected)
        loaded = top.load_captured(top.save_captured(graph, tmp_path / "graph"))
        assert torch.equal(loaded(*inputs), expected)
        for module in (graph, fresh):
            exported = torch.export.export(module, inputs)
            assert torch.equal(exported.module()(*inputs), expected)


def test_runs_in_onnx_runtime(tmp_path: Path) -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    ClusterWeights(bits=3, min_numel=16)(graph)
    artifact = top.export(graph.eval(), tmp_path / "model.onnx", example_inputs=inputs)
    assert artifact.path.stat().st_size > 0  # export verifies the outputs


@pytest.mark.parametrize("name", ["gpt2"])  # tied, and its products are x W
def test_a_language_model_generates_and_is_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name].build().eval()
    kwargs = MODELS[name].case(2)[1]
    fresh = copy.deepcopy(model)
    graph = top.capture(model, (), kwargs)
    result = ClusterWeights(bits=3, min_numel=64, granularity="channel")(graph)
    assert result.report.proof.status == "proven"
    result.plan.apply(model)
    ids = kwargs["input_ids"][:1]
    with torch.no_grad():
        logits = model(**kwargs).logits
        assert torch.equal(logits, graph.eval()(**kwargs).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, **options)
    with parametrize.cached():
        assert torch.equal(model.generate(ids, **options), tokens)
    model.save_pretrained(tmp_path)
    result.plan.apply(fresh).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert torch.equal(fresh(**kwargs).logits, logits)
    save_file(graph.state_dict(), tmp_path / "graph.safetensors")  # what the Trainer's checkpoint does


def test_trains_under_the_trainer_and_its_checkpoint_loads(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = MODELS["llama"].build()
    batch = {k: v[0] for k, v in MODELS["llama"].case(1)[1].items()}
    graph = top.capture(model, (), MODELS["llama"].case(2)[1])
    plan = ClusterWeights(bits=2, min_numel=64)(graph).plan
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=5e-2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_steps=12, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(graph, arguments, train_dataset=[batch] * 24)  # pyright: ignore[reportArgumentType]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    state = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    for fqn, edit in edits(plan).items():
        path, _, name = fqn.rpartition(".")
        prefix = f"{path}.parametrizations.{name}"
        assert torch.equal(state[f"{prefix}.0.indices"], edit.indices)
        assert state[f"{prefix}.original0"].shape == edit.codebook.shape


def test_moments_of_linears_and_embeddings() -> None:
    model, _ = build("tied_twice")
    batches = [(torch.randint(0, 11, (n, 6)),) for n in (2, 3)]
    graph = top.capture(model, batches[0]).eval()
    found = input_moments(graph, batches)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for (ids,) in batches:
            x = model.embed(ids)
            counts = torch.bincount(ids.flatten(), minlength=11).float()
            first = torch.tanh(model.block(x))
            second = torch.tanh(model.block(first))
            last = (model.frozen(second) * model.scale + model.shift * 0.01) @ model.direct
            for fqn, moment in (
                ("block.weight", x.square().sum((0, 1)) + first.square().sum((0, 1))),
                ("frozen.weight", second.square().sum((0, 1))),
                ("embed.weight", last.square().sum((0, 1)) + counts.unsqueeze(1)),
            ):
                seen[fqn] = seen.get(fqn, torch.zeros(())) + moment / 2
    for fqn, moment in seen.items():
        torch.testing.assert_close(found[fqn], moment.expand_as(found[fqn]), rtol=1e-5, atol=1e-6)


def test_moments_of_convolutions_are_those_of_their_patches() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2))
    x = torch.randn(2, 4, 7, 7)
    found = input_moments(top.capture(model, (x,)), [(x,)])["0.weight"]
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).square().sum((0, 2)).view(2, 2, 3, 3)
    expected = patches.repeat_interleave(3, 0)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[..., 0, 0], found[..., 1, 1])  # the padding is seen


@pytest.mark.parametrize("weighted", ["activation", "hessian"])
def test_weighting_lowers_the_error_of_the_output(weighted: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64, bias=False))
    scale = torch.logspace(-1.5, 0.5, 64)
    x = torch.randn(256, 64) * scale
    with torch.no_grad():
        model[0].weight.div_(scale.sqrt())  # what multiplies large inputs is small
    errors: dict[str, float] = {}
    for option in ("none", weighted):
        graph = top.capture(model, (x,))
        exact = model(x).detach()
        ClusterWeights(bits=2, weighted=option)(graph, top.PassContext(calibration=[(x,)]))
        errors[option] = float((graph.eval()(x) - exact).detach().square().sum())
    assert errors[weighted] < 0.7 * errors["none"]


def test_without_data_weighting_is_refused() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    with pytest.raises(ConfigError, match="calibration"):
        ClusterWeights(weighted="hessian").plan(graph)
    with pytest.raises(ConfigError, match="empty"):
        ClusterWeights(weighted="hessian", min_numel=16).plan(graph, top.PassContext(calibration=[]))


def test_what_is_left_and_why() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    plan = ClusterWeights(min_numel=400, overrides={"fc": 2}, granularity="channel").plan(graph)
    reasons = {skip.target: skip.reason for skip in plan.skips}
    assert "small: 320 weights" in reasons["out.weight"]
    assert "not the weight of a matrix operation" in reasons["fc.bias"]
    assert (
        "would not shrink: 2048 bytes"
        in ClusterWeights(min_numel=400, granularity="channel").plan(graph).skips[-1].reason
    )
    found = edits(plan)
    assert found["fc.weight"].bits == 2 and found["conv.weight"].bits == 4
    assert found["conv.weight"].channel_dim == 0 and found["up.weight"].channel_dim == 1
    assert found["up.weight"].codebook.shape == (8, 16)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    assert "finite" in str(ClusterWeights().plan(graph, top.PassContext()).skips) or model.fc.weight.numel() < 1024
    with pytest.raises(ConfigError, match="overrides pattern 'nothing'"):
        ClusterWeights(overrides={"nothing": 2}).plan(graph)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    plan = ClusterWeights(min_numel=16)(graph).plan
    with pytest.raises(PlanError, match=r"no parameter or buffer 'conv.weight'"):
        plan.apply(graph)  # it is clustered already
    with pytest.raises(PlanError, match="its codebook"):
        plan.apply(copy.deepcopy(model).half())
    before = dict(model.named_parameters())
    broken = StoreCodebook(
        target="out.bias",
        reason="-",
        shape=(7,),
        bits=1,
        codebook=torch.zeros(1, 2),
        indices=pack(torch.zeros(7).int(), 1),
    )
    with pytest.raises(PlanError, match=r"out\.bias is"):
        top.Plan((*plan.edits, broken)).apply(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters()) and type(model.fc) is nn.Linear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": torch.zeros(1, 5)}, "do not fit into 2 bits"),
        ({"keep_zero": True}, "do not fit into 2 bits"),
        ({"codebook": torch.zeros(2, 4)}, r"\(1, levels\)"),
        ({"indices": torch.zeros(3, dtype=torch.uint8)}, "4 bytes"),
        ({"outliers": torch.zeros(1, dtype=torch.int32)}, "come together"),
        ({"outliers": torch.tensor([16], dtype=torch.int32), "outlier_values": torch.zeros(1)}, "positions below 16"),
    ],
)
def test_an_edit_that_is_broken_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"target": "w", "reason": "-", "shape": (4, 4), "bits": 2}
    good |= {"codebook": torch.zeros(1, 4), "indices": torch.zeros(4, dtype=torch.uint8)}
    StoreCodebook(**good)
    with pytest.raises(PlanError, match=message):
        StoreCodebook(**(good | change))


def test_an_optimizer_gets_the_codebooks() -> None:
    model, inputs = wide()
    graph = top.capture(model, inputs)
    plan = ClusterWeights(min_numel=16, outliers=0.05).plan(graph)
    optimizer = torch.optim.Adam(graph.parameters(), lr=1e-2)
    graph.train()(*inputs).square().sum().backward()
    optimizer.step()
    plan.apply(graph, optimizer)
    managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert managed == {id(p) for p in graph.parameters()}
    assert {id(p) for p in optimizer.state} <= managed
    codebook = graph.get_parameter("fc.parametrizations.weight.original0")
    before = codebook.detach().clone()
    optimizer.zero_grad()
    graph(*inputs).square().sum().backward()
    optimizer.step()
    assert not torch.equal(codebook, before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_layout_and_its_inverse(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    size = 0 if dim is None else data.draw(st.integers(0, 7))
    layout = Layout(tuple(shape), dim, size)
    weight = torch.arange(math.prod(shape)).view(shape)
    rows = layout.to_rows(weight)
    assert rows.shape == (layout.groups, layout.size)
    assert torch.equal(layout.from_rows(rows), weight)


def test_half_precision_keeps_its_dtype() -> None:
    codebook = torch.randn(1, 4, dtype=torch.bfloat16)
    weight = decode(codebook, pack(torch.arange(8) % 4, 2), layout=Layout((2, 4)), bits=2, keep_zero=False)
    assert weight.dtype is torch.bfloat16 and torch.equal(weight, codebook.repeat(2, 1))
    model, inputs = wide()
    model = model.bfloat16()
    graph = top.capture(model, (inputs[0].bfloat16(),))
    plan = ClusterWeights(bits=3, min_numel=16)(graph).plan
    assert {edit.codebook.dtype for edit in edits(plan).values()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "outliers"), [("gpt2", 0.01), ("llama", 0.0)])  # tied, and not
def test_from_pretrained_builds_codebooks_in_a_fresh_process(name: str, outliers: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name].build().eval()
    kwargs = {k: v for k, v in MODELS[name].case(2)[1].items() if k != "labels"}
    graph = top.capture(model, (), kwargs)
    ClusterWeights(bits=3, min_numel=64, granularity="channel", outliers=outliers).plan(graph).apply(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        save_file(kwargs | {"logits": model(**kwargs).logits}, tmp_path / "expected")
    code = f"""
import torch, torchopt_passes as top
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
top.register_codebooks()
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not any(info.values()), info
expected = load_file({str(tmp_path / "expected")!r})
with torch.no_grad():
    inputs = {{k: v for k, v in expected.items() if k != "logits"}}
    assert torch.equal(model.eval()(**inputs).logits, expected["logits"])
model.generate(expected["input_ids"][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
tied = {name == "gpt2"}
one, other = model.get_input_embeddings(), model.get_output_embeddings()
assert (one.parametrizations.weight.original0 is other.parametrizations.weight.original0) == tied
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}).eval()
with torch.no_grad():
    assert torch.equal(again(expected["input_ids"]).logits, model(expected["input_ids"]).logits)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    from torchopt_passes.graph.quantization.pretrained_codebooks import prepare_codebook

    model = nn.Sequential(nn.Linear(4, 6))
    facts = {"shape": [6, 5], "channel_dim": None, "group_size": 0, "bits": 2, "levels": 4, "keep_zero": False}
    with pytest.raises(top.PlanError, match=r"stores 0\.weight with shape"):
        prepare_codebook(model, "0.weight", facts | {"outliers": 0})
    with pytest.raises(top.PlanError, match="more outliers than values"):
        prepare_codebook(model, "0.weight", facts | {"shape": [6, 4], "outliers": 25})
    prepare_codebook(model, "0.weight", facts | {"shape": [6, 4], "outliers": 1})
    assert model(torch.randn(2, 4)).shape == (2, 6)
