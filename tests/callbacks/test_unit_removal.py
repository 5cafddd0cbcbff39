"""Masked units leave: the model computes what it did, optimizer and plan follow; graphs, modules, Transformers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from transformers import BertForTokenClassification, LlamaConfig, LlamaForCausalLM

from tests.callbacks.channel_models import Deep, Normed, batch, graph_of, make, optimizer_of, shapes, step, train
from tests.callbacks.loops import collate, conv_net, images, make_trainer, ragged_tokens, same_state, tiny_bert
from torchopt_passes.callbacks import Distillation, GradualChannelPruning, Session, attach
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.capture import capture, release
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning.pruned_files import load_pruned
from torchopt_passes.graph.pruning.remove_indices import RemoveIndices
from torchopt_passes.graph.verify import relative_error

FORMS = pytest.mark.parametrize("form", ["graph", "module"])


def build(form: str, kind: type[nn.Module] = Deep) -> nn.Module:
    return graph_of(kind) if form == "graph" else make(kind)


def pruning_of(**options: Any) -> GradualChannelPruning:
    return GradualChannelPruning(**{"start": 1, "end": 4, "every": 1, "example_inputs": batch()} | options)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """In both modes, on another batch size; batch norms are left as they are."""
    found = []
    state = copy.deepcopy(model.state_dict())
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            found.append(model(batch(5, seed=99)))
    model.load_state_dict(state)
    return found


@FORMS
@pytest.mark.parametrize("scope", ["group", "global"])
def test_removal_changes_nothing(form: str, scope: Any) -> None:
    """Float64, momentum and weight decay, batch norms in both modes, a residual branch: 1e-9, and gradients too."""
    model, before = build(form), list[torch.Tensor]()
    pruning = pruning_of(ratio=0.6, scope=scope)
    full = shapes(model)
    train(model, [pruning], seen=lambda number: before.extend(outputs(model) if number == 8 else []))
    assert pruning.plan
    assert sum(sum(shape) for shape in shapes(model).values()) < 0.7 * sum(sum(shape) for shape in full.values())
    assert relative_error(outputs(model), before) < 1e-9
    model.train()(batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not [name for name in model.state_dict() if name.endswith("_mask")]


@FORMS
def test_the_optimizer_goes_on_where_the_masked_one_would(form: str) -> None:
    masked, cut = build(form), build(form)
    pruning = pruning_of()
    kept: dict[str, torch.Tensor] = {}

    def keep(number: int) -> None:
        if number == 8:
            kept.update(copy.deepcopy(masked.state_dict()))

    train(masked, [pruning_of(end=4)], steps=8, seen=keep)
    optimizer = train(cut, [pruning], steps=5)
    for number in range(6, 9):
        step(cut, optimizer, number)
    for edit in pruning.plan.edits:
        if isinstance(edit, RemoveIndices):
            stays = [i for i in range(edit.size) if i not in edit.indices]
            kept[edit.target] = kept[edit.target].index_select(edit.dim, torch.tensor(stays))
    for name, tensor in cut.state_dict().items():
        assert relative_error(tensor, kept[name]) < 1e-9, name


def test_an_optimizer_that_cannot_follow_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["history"] = [parameter.detach().clone()]

    model = make()
    with (
        caplog.at_level(logging.WARNING, logger="torchopt_passes"),
        attach(model, Odd(model.parameters(), lr=0.01), [pruning_of(start=0, end=1)]) as session,
    ):
        step(model, session.optimizer, 1)  # type: ignore[arg-type]
    assert shapes(model)["conv1.weight"][0] == 4
    assert "make a new one to train on" in caplog.text
    with pytest.raises(CallbackError, match="Odd has the state of a model whose units have left since: make a new opt"):
        step(model, session.optimizer, 2)  # type: ignore[arg-type]
    step(model, Odd(model.parameters(), lr=0.01), 2)


def test_the_trainers_optimizer_follows_a_graph(tmp_path: Path) -> None:
    model = capture(conv_net(), (), collate(images(4)))
    trainer = make_trainer(model, images(16), tmp_path, [GradualChannelPruning(start=1, end=2, every=1)])
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    assert model.get_parameter("conv.weight").shape[0] == 4


def test_the_autocast_of_the_trainer_is_no_part_of_the_model(tmp_path: Path) -> None:
    model, inputs = conv_net(), collate(images(4))
    pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs=inputs)
    trainer = make_trainer(model, images(16), tmp_path, [pruning], bf16=True)
    trainer.train()
    assert [edit.kind for edit in pruning.plan.edits] == ["remove_indices"] * 6
    trainer.evaluate(images(4))


def test_other_parameters_than_those_that_were_captured_are_refused() -> None:
    model = make()
    session = Session(model, [pruning_of()])
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().clone())
    with pytest.raises(CallbackError, match="install it last"):
        session.bind(optimizer_of(model), total_steps=9)
    session.abandon()


@FORMS
def test_the_plan_fits_fresh_copies_and_the_source(form: str, tmp_path: Path) -> None:
    model = build(form)
    pruning = pruning_of()
    train(model, [pruning])
    pruning.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    for other in (make(), graph_of(seed=5)):
        plan.apply(other).load_state_dict(model.state_dict())
        assert relative_error(outputs(other), outputs(model)) < 1e-12
    assert all(edit.reason.startswith("lowest l2 while training") for edit in plan.edits)
    if form == "graph":
        source = plan.apply(release(model))  # type: ignore[arg-type]
        assert relative_error(outputs(source), outputs(model)) < 1e-12
        assert (source.fc1.in_features, source.bn1.num_features) == (6, 4)


@FORMS
def test_a_norm_over_the_units_is_of_those_that_stay(form: str) -> None:
    """Opted in: outputs jump at the end, to those of the masked model with the norm over what is left."""
    model, before = build(form, Normed), dict[str, torch.Tensor]()
    pruning = pruning_of(overrides={"a.*": 0.5})
    train(model, [pruning], seen=lambda number: before.update(copy.deepcopy(model.state_dict())))
    assert (shapes(model)["a.weight"], shapes(model)["norm.weight"]) == ((4, 2), (4,))
    stays = before["a.weight_0_mask"]
    x = batch().mean((2, 3))
    hidden = nn.functional.linear(x, before["a.weight"], before["a.bias"])[:, stays]
    hidden = nn.functional.layer_norm(hidden, (4,), before["norm.weight"][stays], before["norm.bias"][stays])
    hidden = torch.relu(nn.functional.linear(torch.relu(hidden), before["b.weight"][:, stays], before["b.bias"]))
    expected = nn.functional.linear(hidden, before["c.weight"], before["c.bias"])
    assert relative_error(model.eval()(batch()), expected) < 1e-12


@FORMS
def test_what_would_change_the_model_is_rolled_back(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(form)
    pruning = pruning_of()
    optimizer = optimizer_of(model)
    session = attach(model, optimizer, [pruning], total_steps=4)
    for number in range(1, 5):
        step(model, optimizer, number)
    before, apply = copy.deepcopy(model.state_dict()), Plan.apply

    def wrong(plan: Plan, module: nn.Module, optimizer: Any = None) -> nn.Module:
        apply(plan, module, optimizer)
        module.get_parameter("fc2.weight").data[0, 0] += 1e-2
        return module

    monkeypatch.setattr(Plan, "apply", wrong)
    with pytest.raises(CallbackError, match="nothing was removed"):
        session.close()
    assert not pruning.plan
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert set(before) - set(after) == {f"{name}.weight_0_mask" for name in ("conv1", "conv2", "fc1")}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert Student.of(model).callbacks == ()


def test_beside_distillation_in_any_order() -> None:
    found = []
    inputs = collate(images(4))
    for flip in (False, True):
        model, teacher = conv_net(), conv_net(seed=7)
        pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs=inputs)
        callbacks = [pruning, Distillation(teacher, alpha=0.5)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model.train(), optimizer, callbacks[::-1] if flip else callbacks):
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model.conv.weight.shape[0] == 4
        found.append(model)
    assert same_state(*found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_inside_ddp_and_compile() -> None:
    plain = make()
    train(plain, [pruning_of()])
    compiled = make()
    optimizer = optimizer_of(compiled)
    wrapped = torch.compile(compiled, backend="eager")
    with attach(wrapped, optimizer, [pruning_of()], total_steps=8):
        for number in range(1, 9):
            step(wrapped, optimizer, number)
    assert same_state(compiled, plain)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inner = make()
        ddp = nn.parallel.DistributedDataParallel(inner)
        optimizer = optimizer_of(ddp)
        with attach(ddp, optimizer, [pruning_of()], total_steps=8):
            for number in range(1, 9):
                step(ddp, optimizer, number)
    finally:
        torch.distributed.destroy_process_group()
    assert same_state(inner, plain)


def test_a_bert_in_the_trainer_loses_heads_and_ffn_units(tmp_path: Path) -> None:
    model, data = tiny_bert(0.1), ragged_tokens(16)
    inputs = {"input_ids": collate(data[:4])["input_ids"]}
    pruning = GradualChannelPruning(ratio=0.5, start=1, end=4, every=1, example_inputs=inputs)
    trainer = make_trainer(model, data, tmp_path, [pruning])
    trainer.train()
    layer = model.bert.encoder.layer[0]
    assert (layer.attention.self.query.out_features, layer.attention.output.dense.in_features) == (8, 8)
    assert layer.attention.self.num_attention_heads == 1
    assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (16, 16)
    width = {skip.target: skip.reason for skip in pruning.skips}["bert.encoder.layer.0.attention.output.dense.weight:0"]
    assert "layer_norm" in width
    trainer.evaluate(data)
    trainer.save_model(str(tmp_path / "final"))
    loaded = load_pruned(tmp_path / "final")
    assert isinstance(loaded, BertForTokenClassification)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        fresh = pruning.plan.apply(tiny_bert())
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(**inputs).logits, expected)


def test_a_llama_with_grouped_queries_still_generates() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).train()
    tokens = torch.arange(1, 13).view(2, 6)
    pruning = GradualChannelPruning(start=1, end=2, every=1, example_inputs={"input_ids": tokens})
    optimizer, told = torch.optim.AdamW(model.parameters(), lr=0.01), list[torch.Tensor]()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with attach(model, optimizer, [pruning], total_steps=3):
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        told.append(model.eval().generate(tokens, **options))
    attention = model.model.layers[0].self_attn
    assert (attention.k_proj.out_features, attention.q_proj.out_features) == (4, 8)
    assert model.model.layers[0].mlp.gate_proj.out_features == 12
    assert model.lm_head.weight.shape == (30, 16)
    assert torch.equal(model.generate(tokens, **options), told[0])
