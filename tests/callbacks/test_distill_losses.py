"""Each loss in the callback against its formula on the models' own features: masks, labels, weights, projectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.distill_models import (
    batch_of,
    bert,
    features_of,
    loss_with,
    padded_tokens,
    res_net,
    sentence_bert,
)
from tests.callbacks.loops import collate, images, ragged_tokens
from torchopt_passes.callbacks import (
    DIST,
    DKD,
    FSP,
    JSD,
    RKD,
    AttentionRelations,
    AttentionTransfer,
    Cosine,
    Distillation,
    Hint,
    SimKD,
    SoftTargets,
    ValueRelations,
    attach,
)
from torchopt_passes.callbacks.distill.base import loss_types, make_losses
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.logit_losses import decoupled_divergence, js_divergence, relation_distances
from torchopt_passes.functional.losses import soft_cross_entropy, soft_kl_divergence

LAYER = "bert.encoder.layer.{i}"


def logits_of(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits.double()


def test_losses_on_logits_are_their_formulas_over_the_labels_that_count() -> None:
    student, teacher, batch = bert(layers=1), bert(seed=7, layers=1), collate(ragged_tokens(6))
    losses = [SoftTargets(form="ce", scale_t2=False), DKD(beta=3.0), DIST(gamma=2.0, temperature=1.0), JSD(beta=0.2)]
    total, logged = loss_with(student, Distillation(teacher, alpha=0.4, temperature=2.5, losses=losses), batch)
    valid = batch["labels"].ne(-100)
    z_s, z_t, y = logits_of(student.train(), batch)[valid], logits_of(teacher, batch)[valid], batch["labels"][valid]
    decoupled, relations = decoupled_divergence(z_s, z_t, y, 2.5), relation_distances(z_s, z_t, 1.0)
    expected = {
        "soft_targets_loss": soft_cross_entropy(z_s, z_t, 2.5).mean(),
        "dkd_loss": 6.25 * (decoupled.target + 3.0 * decoupled.rest).mean(),
        "dist_loss": relations.inter + 2.0 * relations.intra,
        "jsd_loss": 6.25 * js_divergence(z_s, z_t, 0.2, 2.5).mean(),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-3), name
    assert logged["kd_loss"] == pytest.approx(sum(map(float, expected.values())), rel=1e-3)
    assert total == pytest.approx(0.6 * logged["ce_loss"] + 0.4 * logged["kd_loss"], rel=1e-5)


def test_weights_and_the_weight_of_the_hard_loss() -> None:
    student, teacher, batch = bert(layers=1), bert(seed=7, layers=1), collate(ragged_tokens(6))
    losses = [SoftTargets(weight=0.5), SoftTargets(weight=3.0, temperature=1.0)]
    total, logged = loss_with(student, Distillation(teacher, alpha=0.7, hard_weight=2.0, losses=losses), batch)
    parts = [logged["soft_targets_loss"], logged["soft_targets_2_loss"]]
    assert parts[0] != pytest.approx(parts[1], rel=1e-2)
    assert logged["kd_loss"] == pytest.approx(0.5 * parts[0] + 3.0 * parts[1], rel=1e-5)
    assert total == pytest.approx(2.0 * logged["ce_loss"] + 0.7 * logged["kd_loss"], rel=1e-5)


def weighted(values: list[torch.Tensor], labels: torch.Tensor) -> float:
    """The mean of one value for each example, which weighs by how many of its labels count."""
    counts = labels.ne(-100).flatten(1).sum(1) if labels.ndim > 1 else labels.ne(-100)
    return float(sum(c * v for c, v in zip(counts, values, strict=True)) / counts.sum())


@pytest.mark.parametrize("per_token", [True, False])
def test_hidden_states_are_compared_on_tokens_that_are_no_padding(per_token: bool) -> None:
    model = bert if per_token else sentence_bert
    student, teacher = model(layers=2), model(layers=4, seed=7)
    batch = batch_of(padded_tokens(6, per_token=per_token))
    losses = [Hint(), Hint(normalized=True), Cosine(pool="mean"), Hint(pool="first")]
    callback = Distillation(teacher, losses=losses, layers={LAYER: LAYER})
    _, logged = loss_with(student, callback, batch)
    ours = features_of(student.train(), batch, *(LAYER.format(i=i) for i in (0, 1)))
    theirs = features_of(teacher.eval(), batch, *(LAYER.format(i=i) for i in (1, 3)))
    expected = dict.fromkeys(("hint_loss", "hint_2_loss", "cosine_loss", "hint_3_loss"), 0.0)
    for s, t in zip(ours, theirs, strict=True):
        sizes = [int(size) for size in batch["attention_mask"].sum(1)]
        rows = [(a[:size], b[:size]) for a, b, size in zip(s, t, sizes, strict=True)]
        values = {
            "hint_loss": [(a - b).square().mean() for a, b in rows],
            "hint_2_loss": [(a - b).square().sum() / b.square().sum() for a, b in rows],
            "cosine_loss": [1 - torch.cosine_similarity(a.mean(0), b.mean(0), dim=0) for a, b in rows],
            "hint_3_loss": [(a[0] - b[0]).square().mean() for a, b in rows],
        }
        for name, found in values.items():
            expected[name] += weighted(found, batch["labels"]) / 2
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


def test_maps_of_convolutions() -> None:
    student, teacher, batch = res_net(4), res_net(6, depth=4, seed=7), collate(images(6))
    losses = [AttentionTransfer(), RKD(pool="mean"), Hint()]
    callback = Distillation(teacher, losses=losses, layers={"blocks.{i}": "blocks.{i}"}, match="last")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with attach(student, optimizer, [callback], total_steps=9) as session:
        student.train()(**batch)
        logged = session.metrics()
        owned = student.torchopt_distillation.projectors
        projectors = [(p.weight.detach().double(), p.bias.detach().double()) for p in owned]
    ours = features_of(student, batch, "blocks.0", "blocks.1")
    theirs = features_of(teacher.eval(), batch, "blocks.2", "blocks.3")
    attention = hint = 0.0
    for s, t, (weight, bias) in zip(ours, theirs, projectors, strict=True):
        assert weight.shape == (6, 4)
        maps = [nn.functional.normalize(x.square().sum(1).flatten(1), dim=1) for x in (s, t)]
        attention += weighted(list((maps[0] - maps[1]).square().sum(1)), batch["labels"]) / 2
        projected = torch.einsum("dc,bchw->bdhw", weight, s) + bias.view(1, -1, 1, 1)
        hint += weighted(list((projected - t).square().mean((1, 2, 3))), batch["labels"]) / 2
    assert logged["attention_transfer_loss"] == pytest.approx(attention, rel=1e-4)
    assert logged["hint_loss"] == pytest.approx(hint, rel=1e-4)
    assert logged["rkd_loss"] > 1e-4


def test_examples_without_a_label_have_no_part_in_the_relations_of_a_batch() -> None:
    batch = collate(images(6))
    counted = {name: value[batch["labels"].ne(-100)] for name, value in batch.items()}
    values = []
    for data in (batch, counted):
        student, teacher = res_net(4), res_net(6, seed=7)
        student.blocks, teacher.blocks = nn.Sequential(), nn.Sequential()  # no batch statistics
        _, logged = loss_with(student, Distillation(teacher, losses=[RKD(layers=("stem",)), DIST()]), data)
        values.append([logged["rkd_loss"], logged["dist_loss"]])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_flow_between_layers() -> None:
    student, teacher, batch = res_net(4, depth=3), res_net(4, depth=3, seed=7), collate(images(6))
    _, logged = loss_with(student, Distillation(teacher, losses=[FSP(layers=("blocks.{i}",))]), batch)
    paths = [f"blocks.{i}" for i in range(3)]
    ours, theirs = features_of(student, batch, *paths), features_of(teacher.eval(), batch, *paths)
    expected = 0.0
    for i in range(2):
        flows = [torch.einsum("bchw,bdhw->bcd", f[i], f[i + 1]) / 36 for f in (ours, theirs)]
        expected += weighted(list((flows[0] - flows[1]).square().mean((1, 2))), batch["labels"]) / 2
    assert logged["fsp_loss"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="name at least 2 layers"):
        loss_with(student, Distillation(teacher, losses=[FSP(layers=("stem",))]), batch)


def test_minilm_compares_what_tokens_look_at() -> None:
    student, teacher = bert(16, 2, 2), bert(24, 3, 2, seed=7)
    batch = batch_of(padded_tokens(5))
    options: Any = {"heads": 2, "layers": {f"{LAYER}.attention.self": f"{LAYER}.attention.self"}, "match": "only_last"}
    losses = [AttentionRelations(**options), ValueRelations(**options)]
    _, logged = loss_with(student, Distillation(teacher, losses=losses), batch)

    def relation(model: nn.Module, layer: int, left: str, right: str, n: int, size: int) -> torch.Tensor:
        path = f"bert.encoder.layer.{layer}.attention.self"
        q, k = features_of(model, batch, f"{path}.{left}", f"{path}.{right}")
        q, k = (x[n, :size].unflatten(-1, (2, -1)).transpose(0, 1) for x in (q, k))
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)

    for name, sides in {
        "attention_relations_loss": ("query", "key"),
        "value_relations_loss": ("value", "value"),
    }.items():
        values = []
        for n, size in enumerate(int(size) for size in batch["attention_mask"].sum(1)):
            p_s, p_t = relation(student, 1, *sides, n, size), relation(teacher, 2, *sides, n, size)
            values.append((p_t * (p_t / p_s).log()).sum(-1).mean())
        assert logged[name] == pytest.approx(weighted(values, batch["labels"]), rel=2e-3, abs=1e-7), name


def test_heads_that_do_not_fit_are_refused() -> None:
    layers = ("bert.encoder.layer.0.attention.self",)
    student, batch = bert(), batch_of(padded_tokens(2))
    with pytest.raises(CallbackError, match="a projection of width 16 has no 3 heads"):
        loss_with(student, Distillation(bert(seed=7), losses=[ValueRelations(heads=3, layers=layers)]), batch)
    outside = Distillation(bert(seed=7), losses=[AttentionRelations(heads=2, layers=("bert.encoder.layer.0",))])
    with pytest.raises(
        ConfigError, match=r"'bert.encoder.layer.0' of Bert.* has no query projection named query or q_"
    ):
        loss_with(student, outside, batch)


@pytest.mark.parametrize("width", [4, 6])
def test_simkd_gives_the_student_the_classifier_of_the_teacher(width: int) -> None:
    student, teacher, batch = res_net(width), res_net(6, seed=7), collate(images(6))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    callback = Distillation(teacher, alpha=1.0, losses=[SimKD(layers=("fc",))])
    with attach(student, optimizer, [callback], total_steps=9) as session:
        for _ in range(3):
            optimizer.zero_grad()
            student.train()(**batch).loss.backward()
            optimizer.step()
        session.metrics()
        loss = student(**batch).loss.detach()
        (feature,) = features_of(student, batch, "fc", inputs=True)
        (target,) = features_of(teacher, batch, "fc", inputs=True)
        if width == 6:
            assert not hasattr(student, "torchopt_distillation")
            projected = feature
        else:
            (p,) = student.torchopt_distillation.projectors
            projected = feature @ p.weight.detach().double().T + p.bias.detach().double()
        distances = list((projected - target).square().mean(1))
        assert float(loss) == pytest.approx(weighted(distances, batch["labels"]), rel=1e-4)
        with torch.no_grad():
            expected = teacher.fc(projected.float())
            found = student.fc(feature.float())
        assert torch.allclose(found, expected, atol=1e-5)
    with torch.no_grad():  # and so it stays, with nothing left of the callback
        assert torch.allclose(student.fc(feature.float()), expected, atol=1e-5)
    assert all("torchopt" not in name for name in student.state_dict())


def test_simkd_needs_linear_classifiers_of_the_same_classes() -> None:
    student, batch = res_net(4), collate(images(4))
    with pytest.raises(CallbackError, match="needs linear classifiers of the same classes"):
        loss_with(student, Distillation(res_net(6, classes=5), losses=[SimKD(layers=("fc",))]), batch)
    with pytest.raises(CallbackError, match="needs linear classifiers of the same classes"):
        loss_with(student, Distillation(res_net(6), losses=[SimKD(layers=("stem",))]), batch)


def test_half_precision_features_are_compared_in_float32() -> None:
    student, teacher, batch = bert(), bert(seed=7), batch_of(padded_tokens(4))
    losses: Any = [Hint(layers={LAYER: LAYER}), SoftTargets()]
    _, full = loss_with(student, Distillation(teacher, losses=losses), batch)
    _, half = loss_with(student, Distillation(teacher.bfloat16(), losses=losses), batch)
    assert half["hint_loss"] == pytest.approx(full["hint_loss"], rel=0.02)
    assert half["hint_loss"] != full["hint_loss"]
    student.bfloat16()
    with attach(student, torch.optim.SGD(student.parameters(), lr=0.1), [Distillation(teacher, losses=losses)]):
        student.train()(**batch).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)


def test_dkd_without_class_labels_is_refused() -> None:
    class Unsupervised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.fc(x)
            return {"loss": logits.square().mean(), "logits": logits}

    with pytest.raises(CallbackError, match="DKD needs a class label for each position"):
        loss_with(Unsupervised(), Distillation(Unsupervised(), losses=[DKD()]), {"x": torch.randn(2, 4)})
    loss_with(Unsupervised(), Distillation(Unsupervised(), losses=[JSD(), DIST()]), {"x": torch.randn(2, 4)})


def test_losses_are_data_too() -> None:
    assert set(loss_types()) == {
        *("attention_relations", "attention_transfer", "cosine", "dist", "dkd", "fsp", "hint", "jsd", "rkd", "sim_kd"),
        *("soft_targets", "value_relations"),
    }
    data = ["dkd", {"hint": {"weight": 0.1, "layers": {"a": "b"}}}, {"jsd": {"weight": {"initial": 1.0, "final": 0.0}}}]
    made = make_losses(data)
    assert made[:2] == (DKD(), Hint(weight=0.1, layers={"a": "b"}))
    assert make_losses(made) == made


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("dkd", "losses must be a list"),
        (["kd"], "no loss is named 'kd'; known: .*'dkd'"),
        ([{"dkd": {"betta": 1.0}}], r"DKD: unknown \['betta'\]; it has .*'beta'"),
        ([{"dkd": {"beta": "8"}}], "DKD: beta: Input should be a valid number"),
        ([{"jsd": {"beta": 2.0}}], "beta must be in"),
        ([{"hint": {"weight": -1.0}}], "weight must be >= 0"),
        ([{"soft_targets": {"temperature": 0.0}}], "temperature must be positive"),
        ([{"soft_targets": {"teacher": 1}}], "there is no teacher 1 among 1"),
        ([{"value_relations": {}}], r"ValueRelations: missing \['heads'\]"),
        ([{"value_relations": {"heads": 0}}], "heads must be at least 1"),
    ],
)
def test_wrong_losses_are_refused_when_given(losses: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(nn.Linear(1, 1), losses=losses)


def test_form_and_scale_go_with_the_simple_form_alone() -> None:
    with pytest.raises(ConfigError, match="are options of SoftTargets"):
        Distillation(nn.Linear(1, 1), losses=["dkd"], form="ce")
    with pytest.raises(CallbackError, match="Hint compares features"):
        Distillation(nn.Linear(1, 1), losses=["hint"]).loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))


def test_a_loop_that_owns_the_loss_takes_any_loss_on_logits() -> None:
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, -100])
    found = Distillation(nn.Linear(1, 1), losses=[JSD(beta=0.3)], alpha=0.4).loss(student, teacher, labels)
    hard = nn.functional.cross_entropy(student[:4], labels[:4])
    soft = 4.0 * js_divergence(student[:4], teacher[:4], 0.3, 2.0).mean()
    assert float(found) == pytest.approx(float(0.6 * hard + 0.4 * soft), rel=1e-5)
    plain = Distillation(nn.Linear(1, 1), losses=["soft_targets"], alpha=1.0, hard_weight=0.0)
    expected = 4.0 * soft_kl_divergence(student[:4], teacher[:4], 2.0).mean()
    assert float(plain.loss(student, teacher, labels)) == pytest.approx(float(expected), rel=1e-5)
